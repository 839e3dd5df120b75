"""The progress display: a bar with count, rate and time left, and the note on the lines below; or plain lines.

    describe  ━━━━━━━━━━━━━━━━━━━━━━╺━━━━━━━━━━━━━━━━━━━━━━━━━━━  1,240 of 3,801 images  45.2/s  57 s left
      stage 3 of 10, then pairs, self_check, dedup, cluster, retrieve, corpus, images
      model 91% of the time, waiting for pictures 9%

A terminal shows these lines while the work lasts. A pipe, a file and a terminal without cursor control (TERM=dumb) get
a plain line every SECONDS_BETWEEN_LINES. Both get one line at the end.
"""

import contextlib
import re
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

# Between two plain lines. Assumed: short enough to show progress, long enough for the log of a run of hours.
SECONDS_BETWEEN_LINES = 10.0
# Minimum columns of the bar. A longer name is cut; the line below then has all of it. Assumed.
MIN_BAR_WIDTH = 10
# Columns that stay empty on the right, for the "^C" that a terminal adds: one more line could not be erased.
FREE_COLUMNS = 3

# The time left is shown from this share of the items, or from this time, in seconds. Assumed: before both, the rate is
# mostly that of loading models.
MIN_SHARE, MIN_SECONDS = 0.02, 60.0

# Control characters, bidirectional controls and surrogates.
_CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

_console = Console(stderr=True, highlight=False)


def say(line: str) -> None:
    """Print one line on standard error, above the bar if there is one."""
    _console.print(printable(line), markup=False, soft_wrap=True)


def printable(text: str) -> str:
    """`text` with every control character except the line feed escaped.

    Untrusted file names may contain control characters, which a terminal would execute.
    """
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def is_terminal() -> bool:
    """Whether standard error is a terminal."""
    return sys.stderr.isatty()


def duration(seconds: float) -> str:
    """Seconds in the unit that suits their size."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours / 24:.1f} days"


# Counts


@dataclass(frozen=True)
class Counts:
    """The items done, and how many there are. `done` never exceeds `total`."""

    done: int = 0
    total: int | None = None
    """None when unknown."""
    is_estimate: bool = False
    """Whether `total` is an estimate."""
    shards: tuple[int, int] | None = None
    """The shards done and all shards, shown where the total is unknown."""

    @property
    def fraction(self) -> float | None:
        """The share of the work that is done, in [0, 1]; None when unknown."""
        done, total = self.shards if self.total is None and self.shards else (self.done, self.total)
        return None if total is None else done / total if total else 1.0

    def in_words(self, unit: str) -> str:
        """Such as "4 of about 10 images"."""
        if self.total is not None:
            return f"{self.done:,} of {'about ' if self.is_estimate else ''}{self.total:,} {unit}"
        if self.shards:
            return f"{self.done:,} {unit}, {self.shards[0]:,} of {self.shards[1]:,} shards"
        return f"{self.done:,} {unit}"

    def seconds_left(self, seconds: float, *, start: int = 0) -> float | None:
        """The time left at the mean rate, when `done` minus `start` items took `seconds`. None when unknown."""
        if self.total is None or self.done <= start:
            return None
        if seconds < MIN_SECONDS and self.done - start < MIN_SHARE * (self.total - start):
            return None
        return max(0.0, seconds * (self.total - self.done) / (self.done - start))


# The whole run


@dataclass(frozen=True)
class _Run:
    stages: tuple[str, ...] = ()
    expected_seconds: Mapping[str, float] = field(default_factory=dict)


_run = _Run()


@contextlib.contextmanager
def run_of(stages: Sequence[str], expected_seconds: Mapping[str, float] | None = None) -> Iterator[None]:
    """In this block the display of a stage shows its number among `stages`, and what is left of the run.

    expected_seconds: measured times by stage. Without all of those that follow, only the stages that follow are named:
    a stage that has not begun has no rate. Also a decorator.
    """
    global _run
    before, _run = _run, _Run(tuple(stages), expected_seconds or {})
    try:
        yield
    finally:
        _run = before


def _stage_number(name: str) -> int | None:
    """The number of the stage, from 1, whose step or itself is `name`; None outside a run."""
    stage = re.split("[/ ]", name)[0]
    return _run.stages.index(stage) + 1 if stage in _run.stages else None


def _place_in_run(name: str) -> str:
    number = _stage_number(name)
    return "" if number is None else f"stage {number} of {len(_run.stages)}"


def _rest_of_run(name: str, seconds_left: float | None) -> str:
    """What follows the stage: the time that is left of the run, where it is known, or else the names of the stages."""
    number = _stage_number(name)
    if number is None or not (following := _run.stages[number:]):
        return ""
    return _time_left_of_run(name, seconds_left) or f"then {', '.join(following)}"


def _time_left_of_run(name: str, seconds_left: float | None) -> str:
    """The time that is left of the run, where that of this stage and of all that follow is known."""
    number = _stage_number(name)
    following = () if number is None else _run.stages[number:]
    if not following or seconds_left is None or not all(stage in _run.expected_seconds for stage in following):
        return ""
    left = seconds_left + sum(_run.expected_seconds[stage] for stage in following)
    return f"about {duration(left)} left of the run"


# The display


@dataclass
class _Display:
    """What is shown at a moment. It is a renderable of rich: several lines for a terminal."""

    name: str
    unit: str = ""
    counts: Counts | None = None
    """None where nothing is counted."""
    start: int = 0
    """Items that an earlier process did, which count for no rate."""
    note: str = ""
    doing: str = ""
    """The step that is in progress, such as "reading the pairs"."""
    started: float = field(default_factory=time.monotonic)
    last_line: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def times(self) -> tuple[float, float | None, float | None]:
        """The seconds so far, the rate, and the seconds left; None where unknown."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        if self.counts is None or self.counts.done <= self.start:
            return seconds, None, None
        return seconds, (self.counts.done - self.start) / seconds, self.counts.seconds_left(seconds, start=self.start)

    def plain_line(self) -> str:
        """One line for a pipe or a file."""
        seconds, rate, left = self.times()
        parts = []
        if self.counts is not None:
            parts.append(self.counts.in_words(self.unit))
        if rate is not None:
            parts.append(f"{rate:,.1f} {self.unit}/s")
        elif self.doing:
            parts.append(self.doing)
        parts.append(f"{duration(seconds)} so far" if left is None else f"{duration(left)} left")
        if of_run := _time_left_of_run(self.name, left):
            parts.append(of_run)
        place = _place_in_run(self.name)
        return f"{self.name}{f' ({place})' if place else ''}: " + ", ".join(parts) + _suffix(self.note)

    def print_when_due(self) -> None:
        """Print a plain line, unless the last one is too recent."""
        with self.lock:
            now = time.monotonic()
            if now - self.last_line >= SECONDS_BETWEEN_LINES:
                self.last_line = now
                say(self.plain_line())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        seconds, rate, left = self.times()
        right = [] if self.counts is None else [self.counts.in_words(self.unit)]
        if rate is not None:
            right.append(f"{rate:,.0f}/s" if rate >= 100 else f"{rate:,.1f}/s")
        right.append(f"{duration(seconds)} so far" if left is None else f"{duration(left)} left")
        counts_and_times = "  ".join(right)
        name, doing = printable(self.name), printable(self.doing)
        first = name if self.counts is not None or not doing else f"{name}: {doing}"
        bar_width = 0 if self.counts is None else MIN_BAR_WIDTH
        width = options.max_width - FREE_COLUMNS
        shown = _cut(first, max(8, width - len(counts_and_times) - bar_width - 4))
        fraction = None if self.counts is None else self.counts.fraction
        line = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
        if self.counts is not None:
            line.width = width
        line.add_column(no_wrap=True)
        cells: list[Text | ProgressBar] = [Text(shown)]
        if self.counts is not None:
            line.add_column(ratio=1)
            cells.append(ProgressBar(total=1.0, completed=fraction or 0.0, pulse=fraction is None))
        line.add_column(no_wrap=True)
        line.add_row(*cells, Text(counts_and_times))
        yield line
        place = ", ".join(filter(None, (_place_in_run(name), _rest_of_run(name, left))))
        below = [first if shown != first else "", doing if self.counts is not None else "", place, self.note]
        for text in filter(None, below):
            yield _below(text, width)


def _has_cursor() -> bool:
    return _console.is_terminal and not _console.is_dumb_terminal


# The display that is open; a step inside its work is shown on it.
_open: list[_Display] = []


@contextlib.contextmanager
def _shown(display: _Display) -> Iterator[None]:
    """Show `display` while the block runs."""
    _open.append(display)
    try:
        if _has_cursor():
            with Live(display, console=_console, transient=True, refresh_per_second=4):
                yield
        else:
            ended = threading.Event()

            def keep_printing() -> None:
                while not ended.wait(1.0):
                    display.print_when_due()

            thread = threading.Thread(target=keep_printing, name="progress", daemon=True)
            thread.start()
            try:
                yield
            finally:
                ended.set()
                thread.join()
    finally:
        _open.remove(display)


@contextlib.contextmanager
def counted(
    name: str, unit: str, *, total: int | None = None, start: int = 0
) -> Iterator[Callable[[Counts, str], None]]:
    """A display of counts. Yields a function of the present counts and of the note that stands below them.

    total: None where it is unknown at the beginning. start: the items that an earlier process did.
    """
    display = _Display(name, unit, Counts(start, total), start)

    def show(counts: Counts, note: str) -> None:
        display.counts, display.note = counts, note
        if not _has_cursor():
            display.print_when_due()

    with _shown(display):
        yield show
    seconds = time.monotonic() - display.started
    assert display.counts is not None
    count = display.counts.done - start
    line = f"{name}: {count:,} {unit} in {seconds:,.1f} s, {count / max(seconds, 1e-9):,.1f} {unit}/s"
    if _has_cursor() and display.note:  # below, because it may be longer than a line of the terminal
        say(line)
        _console.print(_below(display.note, _console.width - FREE_COLUMNS))
    else:
        say(line + _suffix(display.note))


@contextlib.contextmanager
def bar(name: str, *, total: int, unit: str, start: int = 0) -> Iterator[Callable[[int, str], None]]:
    """A display of `total` items (0 when unknown), of which an earlier process did `start`.

    Yields a function of the number of further items and of the note that stands below the counts.
    """
    count = start
    with counted(name, unit, total=total or None, start=start) as show:

        def advance(items: int, note: str) -> None:
            nonlocal count
            count += items
            show(Counts(count, max(total, count) if total else None), note)

        yield advance


@contextlib.contextmanager
def step(name: str, text: str) -> Iterator[Callable[[str], None]]:
    """Show that the stage `name` does `text`, such as "reading the pairs", and for how long.

    On the display that is open, if there is one. Yields a function that changes the text.
    """
    display = _open[-1] if _open else _Display(name)
    before, display.doing = display.doing, text

    def change(new: str) -> None:
        display.doing = new

    try:
        with contextlib.nullcontext() if _open else _shown(display):
            yield change
    finally:
        display.doing = before


def _below(text: str, width: int) -> Text:
    """A text on the lines below another one. It is wrapped between words; no line is filled with spaces."""
    lines = textwrap.fill(printable(text), width, initial_indent="  ", subsequent_indent="  ")
    return Text(lines, style="dim")


def _suffix(note: str) -> str:
    return f"; {note}" if note else ""


def _cut(text: str, width: int) -> str:
    """`text` in at most `width` characters: its end, because the ends of the names of steps differ."""
    return text if len(text) <= width else "…" + text[len(text) - width + 1 :]
