"""The progress display of a stage without a terminal."""

import pytest

from curation.engine import progress


def test_lines_have_count_rate_and_note(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with progress.bar("ingest", total=10, unit="images") as advance:
        advance(4, "")
        advance(6, "threads are busy")
    first, second, last = capsys.readouterr().err.splitlines()
    assert first.startswith("ingest: 4 of 10 images") and first.endswith("s left")
    assert second.startswith("ingest: 10 of 10 images") and second.endswith("; threads are busy")
    assert last.startswith("ingest: 10 images in") and last.endswith("images/s; threads are busy")


def test_unknown_total_shows_no_remaining_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with progress.bar("ingest", total=0, unit="images") as advance:
        advance(4, "")
    assert "left" not in capsys.readouterr().err


def test_names_are_not_read_as_markup(capsys: pytest.CaptureFixture[str]) -> None:
    progress.say("[bold]runs/[x][/bold]")
    assert capsys.readouterr().err == "[bold]runs/[x][/bold]\n"
