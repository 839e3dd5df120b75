"""The progress display of a stage: a bar with count, rate and remaining time, or plain lines without a terminal."""

import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

# Between two plain lines. Assumed: short enough to show progress, long enough for the log of a run of hours.
SECONDS_BETWEEN_LINES = 10.0

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


@contextlib.contextmanager
def bar(name: str, *, total: int, unit: str) -> Iterator[Callable[[int, str], None]]:
    """A progress display of `total` items (0 when unknown).

    Yields a function of the number of further items and of the note that stands after the counts.
    """
    started = time.monotonic()
    count, last_note = 0, ""
    if _console.is_terminal:
        columns = (
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(unit),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=_console, transient=True) as display:
            task = display.add_task(name, total=total or None, note="")

            def advance(items: int, note: str) -> None:
                nonlocal count, last_note
                count, last_note = count + items, note
                display.update(task, advance=items, note=note)

            yield advance
    else:
        last_line = started

        def advance(items: int, note: str) -> None:
            nonlocal count, last_note, last_line
            count, last_note = count + items, note
            now = time.monotonic()
            if now - last_line >= SECONDS_BETWEEN_LINES:
                last_line = now
                say(_line(name, count, total, unit, now - started) + _suffix(note))

        yield advance
    seconds = time.monotonic() - started
    say(
        f"{name}: {count:,} {unit} in {seconds:,.1f} s, {count / max(seconds, 1e-9):,.1f} {unit}/s" + _suffix(last_note)
    )


def _suffix(note: str) -> str:
    return f"; {note}" if note else ""


def _line(name: str, count: int, total: int, unit: str, seconds: float) -> str:
    rate = count / max(seconds, 1e-9)
    if not total:
        return f"{name}: {count:,} {unit}, {rate:,.1f} {unit}/s"
    seconds_left = (total - count) / rate if rate else float("inf")
    return f"{name}: {count:,} of {total:,} {unit}, {rate:,.1f} {unit}/s, {seconds_left:,.0f} s left"


class _Rate(ProgressColumn):
    """Items per second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.1f} {self._unit}/s" if task.speed else f"- {self._unit}/s")


def is_terminal() -> bool:
    """Whether standard error is a terminal."""
    return sys.stderr.isatty()
