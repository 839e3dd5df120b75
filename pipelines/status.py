"""What a run has done, is doing and has left, from its files alone: another process may run it, or nobody.

    python -m pipelines.status runs/demo

A shard is done when its marker is there, whatever the log says; the log (engine/run_log.py) adds who works on what,
whether the driver still lives, and how long things took. On standard output a line a stage, and the steps of the one
that is under way.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from curation.engine import command, run_log
from curation.engine.manifest import MANIFEST_NAME, PROGRESS_NAME, done_shards, plan_in, require_manifest, step_folder
from curation.engine.run_log import Driver, Note, StageTimes
from curation.engine.stage import PREPARED
from curation.errors import InputError
from curation.files import paths
from curation.run_folder import STAGES

# How often the files are looked at again when they were being moved at that moment. Assumed.
ATTEMPTS = 5
# Shards under way that are named, of each stage.
MOST_NOTES = 20
State = Literal["done", "running", "stale", "stopped", "left"]


@dataclass(frozen=True)
class StageStatus:
    """What there is of one stage, or of a step of one. Numbers count shards."""

    name: str
    state: State
    """`stale`: begun by a driver that gives no sign of life any more; `stopped`: by one that ended in order."""
    num_shards: int | None
    """None while the stage has not begun."""
    done: int
    running: tuple[Note, ...]
    """What workers are at."""
    stale: tuple[Note, ...]
    """What workers were at when the driver was lost."""
    seconds_left: float | None
    """At the rate since the driver began with this stage; None where there is no rate, or no driver."""

    @property
    def left(self) -> int | None:
        """Shards that nobody has begun."""
        return None if self.num_shards is None else max(0, self.num_shards - self.done - len(self.running))


@dataclass(frozen=True)
class RunStatus:
    """What there is of a run."""

    run: str
    driver: Driver | None
    seconds_silent: float | None
    """Since the driver's last sign of life."""
    state: State
    """Of what is begun and not done."""
    why_stopped: str | None
    stages: tuple[StageStatus, ...]


def read(run: str, *, now: float | None = None) -> RunStatus:
    """The status of the run in the folder `run`, as of `now` (seconds since 1970). Raises InputError where none is."""
    now = time.time() if now is None else now
    if not paths.is_folder(run):
        raise InputError(f"No run at '{run}': {'it is a file' if paths.exists(run) else 'there is nothing'}.")
    names = set(paths.list_names(run))
    if not names & {"run.toml", run_log.FOLDER, *STAGES}:
        what = "the folder of one stage" if MANIFEST_NAME in names else "no folder that a run wrote"
        raise InputError(f"No run at '{run}': it is {what}. Give what --output named for pipelines.curate.")
    for attempt in range(ATTEMPTS):
        try:
            return _read(run, names, now)
        except FileNotFoundError:  # of a stage that ended just now, or of markers that were gathered
            if attempt == ATTEMPTS - 1:
                raise
    raise AssertionError


def _read(run: str, names: set[str], now: float) -> RunStatus:
    driver = run_log.read_driver(run)
    silent = None if driver is None else max(0.0, now - driver.beat)
    state: State = "stopped" if silent is None else "running" if silent <= run_log.SECONDS_UNTIL_LOST else "stale"
    notes = [note for note in run_log.read_notes(run) if driver is None or note.started >= driver.started - 1]
    times = run_log.times(run)
    stages: list[StageStatus] = []
    for name in STAGES:
        stages += _stage(paths.join(run, name), name, state, notes, times, now) if name in names else [_left(name)]
    return RunStatus(run, driver, silent, state, run_log.why_stopped(run), tuple(stages))


def _left(name: str) -> StageStatus:
    return StageStatus(name, "left", None, 0, (), (), None)


def _stage(
    folder: str, name: str, state: State, notes: Sequence[Note], times: dict[str, StageTimes], now: float
) -> list[StageStatus]:
    """The status of the stage in `folder`, and of the steps of an unfinished one behind it."""
    if paths.exists(paths.join(folder, MANIFEST_NAME)):
        num_shards = times[name].num_shards if name in times else require_manifest(folder).plan.num_shards
        return [StageStatus(name, "done", num_shards, num_shards, (), (), None)]
    plan = plan_in(folder)
    if plan is None:
        return [_left(name)]
    marked = done_shards(folder) - {PREPARED}
    own = tuple(note for note in notes if note.stage == name and note.shard not in marked)
    steps: list[StageStatus] = []
    for step in paths.list_names(paths.join(folder, PROGRESS_NAME)):
        path = step_folder(folder, step)
        if not step.endswith((".json", ".jsonl")) and plan_in(path) is not None:
            steps += _stage(path, f"{name}/{step}", state, notes, times, now)
    log, seconds_left = times.get(name), None
    if state == "running" and log is not None and log.shards_since:
        seconds_left = (plan.num_shards - len(marked)) * (now - log.begun) / log.shards_since
    running, stale = (own, ()) if state == "running" else ((), own)
    return [StageStatus(name, state, plan.num_shards, len(marked), running, stale, seconds_left), *steps]


def print_status(status: RunStatus, *, now: float | None = None) -> None:
    """Print the status on standard output."""
    now = time.time() if now is None else now
    console = Console(markup=False, emoji=False, highlight=False)
    table = Table(title=status.run, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("stage", no_wrap=True)
    table.add_column("state")
    for column in ("shards", "done", "running", "stale", "left", "time left"):
        table.add_column(column, justify="right")
    for stage in status.stages:
        numbers = (stage.num_shards, stage.done, len(stage.running), len(stage.stale), stage.left)
        cells = ["" if stage.num_shards is None else f"{number:,}" for number in numbers]
        table.add_row(stage.name, stage.state, *cells, duration(stage.seconds_left))
    console.print(table)
    for stage in status.stages:
        for note in (*stage.running, *stage.stale)[:MOST_NOTES]:
            since = duration(max(0.0, now - note.started))
            console.print(f"{stage.name}, shard {note.shard}: begun {since} ago by {note.worker}", soft_wrap=True)
    console.print(_summary(status), soft_wrap=True)


def _summary(status: RunStatus) -> str:
    if all(stage.state == "done" for stage in status.stages):
        return "All stages are done."
    if status.driver is None:
        why = f" It stopped with: {status.why_stopped}" if status.why_stopped else ""
        return "Nobody works on this run. The same command goes on with it." + why
    who = f"process {status.driver.process} on {status.driver.machine}"
    silent = duration(status.seconds_silent)
    if status.state == "stale":
        return f"Lost: {who} gave no sign of life for {silent}. The same command goes on with the run."
    now = [stage for stage in status.stages if stage.state == "running"]
    waiting = [stage.name for stage in status.stages if stage.state == "left"]
    known = [stage.seconds_left for stage in now if stage.seconds_left is not None]
    left = f"about {duration(max(known))} for what is under way" if known else "not known before the first shards"
    behind = f", and then {', '.join(waiting)}, which no rate is known of before they begin" if waiting else ""
    return f"Running: {who}, last sign of life {silent} ago. Time left: {left}{behind}."


def print_times(run: str) -> None:
    """Print what each stage took, of all drivers that worked on the run, on standard output."""
    Console(markup=False, emoji=False, highlight=False).print(times_table(run_log.times(run)))


def times_table(times: dict[str, StageTimes]) -> Table:
    """Time, bytes, images per second and idle share of each stage, and of its steps."""
    table = Table(
        title="What each stage took (a step's time is in its stage's)", title_justify="left", box=box.SIMPLE_HEAD
    )
    table.add_column("stage", no_wrap=True)
    for column in ("time", "shards", "images", "images/s", "MB written", "idle"):
        table.add_column(column, justify="right")
    order = {name: number for number, name in enumerate(STAGES)}
    for name in sorted(times, key=lambda name: (order.get(name.partition("/")[0], len(order)), "/" in name)):
        stage = times[name]
        rate = f"{stage.items / stage.seconds:,.1f}" if stage.seconds else ""
        size = f"{stage.bytes / 1e6:,.1f}"
        idle = f"{stage.idle:.0%}"
        table.add_row(name, duration(stage.seconds), f"{stage.shards:,}", f"{stage.items:,}", rate, size, idle)
    return table


def duration(seconds: float | None) -> str:
    """Seconds as a person says them; empty for None."""
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours / 24:.1f} days"


def command_line(
    run: Annotated[str, typer.Argument(metavar="OUTPUT", help="Folder of the run, local or any fsspec URL.")],
) -> None:
    """What is done, running, stale and left of a run, from its files alone."""
    print_status(read(run))
    if times := run_log.times(run):
        Console(markup=False, emoji=False, highlight=False).print(times_table(times))


if __name__ == "__main__":
    from pipelines import status  # by its real name, or its classes would exist twice

    command.main(status.command_line)
