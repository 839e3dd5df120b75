"""The progress display: at widths of 80 and 120 columns on a terminal, and in plain lines without one."""

import io
import time

import pytest
from rich.console import Console
from rich.text import Text

from curation.engine import progress
from curation.engine.progress import Counts

STAGES = ("ingest", "embed", "describe", "pairs", "dedup", "cluster", "retrieve", "corpus")
NOTE = "model 91% of the time, waiting for pictures 9%; threads decode 35% of it, 12.3 pictures ready"
LONG_NAME = "cluster/level-0/round-0/iteration-00000"


def rendered(width: int, display: object) -> list[str]:
    """The lines of a display on a terminal of this width."""
    written = io.StringIO()
    Console(file=written, width=width, force_terminal=True, color_system="truecolor").print(display)
    return Text.from_ansi(written.getvalue()).plain.splitlines()


def display(name: str, counts: Counts, *, note: str = "") -> progress._Display:
    shown = progress._Display(name, "images", counts, note=note)
    shown.started -= 100
    return shown


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", ["embed", LONG_NAME])
@pytest.mark.parametrize(
    ("counts", "words"),
    [
        (Counts(0, 3801), ["0 of 3,801 images", "2 min so far"]),
        (Counts(1240, 3801), ["1,240 of 3,801 images", "12.4/s", "3 min left"]),
        (Counts(1_240_000, 380_100_000), ["1,240,000 of 380,100,000 images", "12,400/s", "8 h 29 min left"]),
        (Counts(46_100, 120_000, is_estimate=True), ["46,100 of about 120,000 images", "461/s", "3 min left"]),
        (Counts(46_100, None, shards=(3, 20)), ["46,100 images, 3 of 20 shards", "461/s", "2 min so far"]),
    ],
)
def test_bar_and_numbers_stay_on_the_first_line_and_the_note_lies_below(
    width: int, name: str, counts: Counts, words: list[str]
) -> None:
    with progress.run_of(STAGES):
        first, *below = rendered(width, display(name, counts, note=NOTE))
    for word in words:
        assert word in first
    assert first.count("━") >= 6, first
    assert max(map(len, [first, *below])) <= width - progress.FREE_COLUMNS
    assert "-00000 " in first if name == LONG_NAME else first.startswith("embed ")
    assert NOTE in " ".join(line.strip() for line in below)
    place = "stage 6 of 8, then retrieve, corpus" if name == LONG_NAME else "stage 2 of 8, then describe, pairs"
    assert any(place in line for line in below)
    if name == LONG_NAME and width == 80:
        assert name in (line.strip() for line in below), "a name that is cut is whole on the line below"


def test_time_left_of_the_run_is_shown_only_where_all_that_follows_is_known() -> None:
    shown = display("retrieve", Counts(50, 100))
    with progress.run_of(STAGES, {"corpus": 200.0}):
        assert "  stage 7 of 8, about 5 min left of the run" in rendered(80, shown)
        before = rendered(80, display("cluster", Counts(50, 100)))
        assert "  stage 6 of 8, then retrieve, corpus" in before
        assert shown.plain_line().endswith("2 min left, about 5 min left of the run")
    assert len(rendered(80, shown)) == 1, "outside a run there is neither a number nor a rest"
    with progress.run_of(STAGES):
        assert rendered(80, display("corpus", Counts(50, 100)))[1:] == ["  stage 8 of 8"]


@pytest.mark.parametrize("done", [0, 1, 5, 10])
@pytest.mark.parametrize("total", [None, 0, 10])
def test_time_left_is_neither_negative_nor_infinite(done: int, total: int | None) -> None:
    counts = Counts(min(done, total) if total is not None else done, total)
    for seconds in (0.0, 1e-9, 1e9):
        left = counts.seconds_left(seconds)
        assert left is None or 0 <= left < float("inf")
        assert (left is None) == (total is None or counts.done == 0)


def plain(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)


def test_lines_have_count_rate_and_note(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    plain(capsys, monkeypatch)
    with progress.run_of(STAGES), progress.bar("ingest", total=10, unit="images") as advance:
        advance(4, "")
        advance(6, "threads are busy")
    first, second, last = capsys.readouterr().err.splitlines()
    assert first.startswith("ingest (stage 1 of 8): 4 of 10 images, ") and first.endswith("s left")
    assert second.startswith("ingest (stage 1 of 8): 10 of 10 images, ") and second.endswith("; threads are busy")
    assert last.startswith("ingest: 10 images in") and last.endswith("images/s; threads are busy")


def test_unknown_total_shows_no_remaining_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain(capsys, monkeypatch)
    with progress.bar("ingest", total=0, unit="images") as advance:
        advance(4, "")
    assert "left" not in capsys.readouterr().err


def test_items_of_an_earlier_process_count_for_no_rate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain(capsys, monkeypatch)
    with progress.bar("train", total=1000, unit="steps", start=990) as advance:
        time.sleep(0.05)
        advance(1, "")
    line, last = capsys.readouterr().err.splitlines()
    assert line.startswith("train: 991 of 1,000 steps, ") and last.startswith("train: 1 steps in ")
    assert float(line.split(", ")[1].removesuffix(" steps/s")) <= 20


@pytest.mark.parametrize("environment", [{}, {"TERM": "dumb", "FORCE_COLOR": "1"}, {"NO_COLOR": "1"}])
def test_without_cursor_control_there_are_plain_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    plain(capsys, monkeypatch)
    monkeypatch.setattr(progress, "_console", Console(stderr=True, highlight=False))
    with progress.bar("ingest", total=10, unit="images") as advance:
        advance(4, "")
    errors = capsys.readouterr().err
    assert "\x1b" not in errors and errors.startswith("ingest: 4 of 10 images")


def test_a_step_is_shown_with_its_time_and_inside_the_display_that_is_open(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with progress.step("report", "reading the stages") as change:
        (shown,) = progress._open
        assert rendered(80, shown) == ["report: reading the stages  0.0 s so far"]
        shown.print_when_due()
        change("writing the page")
        shown.print_when_due()
    assert progress._open == []
    with progress.counted("dedup", "images") as show:
        (shown,) = progress._open
        with progress.step("dedup", "reading the pairs"):
            assert progress._open == [shown]
            first, second = rendered(80, shown)
            assert first.startswith("dedup ") and second == "  reading the pairs"
        assert len(rendered(80, shown)) == 1
        show(Counts(1, 2), "")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("report: reading the stages, ") and lines[1].startswith("report: writing the page, ")


def test_a_silent_stage_prints_that_it_goes_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain(capsys, monkeypatch)
    with progress.step("dedup", "deciding which images are copies"):
        time.sleep(1.1)
    assert capsys.readouterr().err.startswith("dedup: deciding which images are copies, 1.0 s so far")


def test_the_terminal_shows_the_bar_while_the_work_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    console = Console(file=written, width=80, force_terminal=True, color_system=None, legacy_windows=False)
    monkeypatch.setattr(progress, "_console", console)
    with progress.counted("embed", "images") as show:
        show(Counts(40, 100), NOTE)
        time.sleep(0.4)
        progress.say("above the bar")
    text = written.getvalue()
    assert "40 of 100 images" in text and "above the bar" in text
    final = text[text.rindex("embed: 40 images in ") :].splitlines()
    below = " ".join(line.strip() for line in final[1:])
    assert below == NOTE and max(map(len, final)) <= 80


def test_names_are_not_read_as_markup(capsys: pytest.CaptureFixture[str]) -> None:
    progress.say("[bold]runs/[x][/bold]")
    assert capsys.readouterr().err == "[bold]runs/[x][/bold]\n"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.04, "0.0 s"), (9.96, "10 s"), (99.4, "99 s"), (100, "2 min"), (7e4, "19 h 27 min")]
)
def test_durations(seconds: float, words: str) -> None:
    assert progress.duration(seconds) == words
