"""Prints the status of a run from its files alone, whether or not a process works on it.

    seedbed status runs/demo

A shard is done when its marker exists, whatever the log says. The log (engine/run_log.py) adds the shard of each
worker, the driver's last heartbeat, and times. Standard output has one line for each stage, and for each step of the
stage that is running.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from curation.engine import command, progress, run_log
from curation.engine.manifest import (
    MANIFEST_NAME,
    PROGRESS_NAME,
    done_shards,
    plan_in,
    ready_folder,
    require_manifest,
    step_folder,
)
from curation.engine.run_log import Driver, Note, StageTimes, StoppedLine
from curation.engine.stage import PREPARED
from curation.files import paths
from curation.run_folder import STAGES, require_run

# Attempts to read the files, since a stage may move them meanwhile. Assumed.
MAX_ATTEMPTS = 5
# Unfinished shards that are printed, of each stage. Assumed.
MAX_NOTES = 20
State = Literal["done", "running", "stale", "stopped", "left"]


@dataclass(frozen=True)
class StageStatus:
    """The status of one stage, or of a step of a stage. Numbers count shards."""

    name: str
    state: State
    """`stale`: unfinished, and its driver has no heartbeat; `stopped`: unfinished, and its driver ended in order."""
    num_shards: int | None
    """None while the stage has not begun."""
    done: int
    running: tuple[Note, ...]
    """The unfinished shards of workers."""
    stale: tuple[Note, ...]
    """The unfinished shards of workers whose driver was lost."""
    seconds_left: float | None
    """At the rate since the driver began this stage; None where there is no rate, or no driver."""

    @property
    def left(self) -> int | None:
        """Shards that no worker has begun."""
        return None if self.num_shards is None else max(0, self.num_shards - self.done - len(self.running))


@dataclass(frozen=True)
class RunStatus:
    """The status of a run."""

    run: str
    driver: Driver | None
    seconds_silent: float | None
    """Since the driver's last heartbeat."""
    state: State
    """Of the stages that are begun and not done."""
    why_stopped: StoppedLine | None
    stages: tuple[StageStatus, ...]


def read(run: str, *, now: float | None = None) -> RunStatus:
    """The status of the run in the folder `run` at `now` (seconds since 1970). Raises InputError if there is no run."""
    now = time.time() if now is None else now
    names = require_run(run)
    for attempt in range(MAX_ATTEMPTS):
        try:
            return _read(run, names, now)
        except FileNotFoundError:  # a stage ended meanwhile, or its markers were gathered
            if attempt == MAX_ATTEMPTS - 1:
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
    """The status of the stage in `folder`, followed by the steps of an unfinished stage."""
    if paths.exists(paths.join(folder, MANIFEST_NAME)):
        num_shards = times[name].num_shards if name in times else require_manifest(folder).plan.num_shards
        return [StageStatus(name, "done", num_shards, num_shards, (), (), None)]
    plan = plan_in(folder)
    if plan is None:
        return [_left(name)]
    marked = (done_shards(folder) | done_shards(ready_folder(folder))) - {PREPARED}
    unfinished = tuple(note for note in notes if note.stage == name and note.shard not in marked)
    steps: list[StageStatus] = []
    for step in paths.list_names(paths.join(folder, PROGRESS_NAME)):
        path = step_folder(folder, step)
        if not step.endswith((".json", ".jsonl")) and plan_in(path) is not None:
            steps += _stage(path, f"{name}/{step}", state, notes, times, now)
    log, seconds_left = times.get(name), None
    if state == "running" and log is not None and log.shards_since:
        seconds_left = (plan.num_shards - len(marked)) * (now - log.begun) / log.shards_since
    running, stale = (unfinished, ()) if state == "running" else ((), unfinished)
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
        for note in (*stage.running, *stage.stale)[:MAX_NOTES]:
            age = duration(max(0.0, now - note.started))
            console.print(f"{stage.name}, shard {note.shard}: begun {age} ago by {note.worker}", soft_wrap=True)
    console.print(_summary(status), soft_wrap=True)


def _summary(status: RunStatus) -> str:
    if all(stage.state == "done" for stage in status.stages):
        return "All stages are done."
    if status.driver is None:
        stopped = status.why_stopped
        if stopped is None:
            return "No process works on this run. Run the same command again to resume it."
        remedy = "Run the same command again to resume it."
        if stopped.exit_status == 2:
            remedy = "Correct this first, then run the command again: finished stages and shards are kept."
        return f"No process works on this run. It stopped with: {progress.printable(stopped.why)}\n{remedy}"
    driver = f"process {status.driver.process} on {status.driver.machine}"
    silence = duration(status.seconds_silent)
    if status.state == "stale":
        return f"Lost: {driver} has had no heartbeat for {silence}. Run the same command again to resume the run."
    running = [stage for stage in status.stages if stage.state == "running"]
    waiting = [stage.name for stage in status.stages if stage.state == "left"]
    known = [stage.seconds_left for stage in running if stage.seconds_left is not None]
    left = f"about {duration(max(known))} for the running stage" if known else "unknown before the first shards"
    rest = f"; then {', '.join(waiting)}, whose rates are unknown before they begin" if waiting else ""
    return f"Running: {driver}, last heartbeat {silence} ago. Time left: {left}{rest}."


def print_times(run: str) -> None:
    """Print the time of each stage, summed over all drivers of the run, on standard output."""
    Console(markup=False, emoji=False, highlight=False).print(times_table(run_log.times(run)))


def times_table(times: dict[str, StageTimes]) -> Table:
    """Time, bytes, items (images, vectors or rows) per second and idle share of each stage, and of its steps.

    No rate and no idle share for a stage that the pass of an earlier one made.
    """
    table = Table(
        title="Time of each stage (a step's time is part of its stage's)", title_justify="left", box=box.SIMPLE_HEAD
    )
    table.add_column("stage", no_wrap=True)
    for column in ("time", "shards", "items", "items/s", "MB written", "idle"):
        table.add_column(column, justify="right")
    order = {name: number for number, name in enumerate(STAGES)}
    for name in sorted(times, key=lambda name: (order.get(name.partition("/")[0], len(order)), "/" in name)):
        stage = times[name]
        rate = f"{stage.items / stage.seconds:,.1f}" if stage.seconds else ""
        size = f"{stage.bytes / 1e6:,.1f}"
        idle = f"{stage.idle:.0%}"
        if stage.ready and stage.ready == stage.shards:  # it worked on no item itself
            rate = idle = "-"
        table.add_row(name, duration(stage.seconds), f"{stage.shards:,}", f"{stage.items:,}", rate, size, idle)
    table.add_section()
    table.add_row("all", duration(sum(stage.seconds for name, stage in times.items() if "/" not in name)))
    return table


def duration(seconds: float | None) -> str:
    """Seconds in the unit that suits their size; empty for None."""
    return "" if seconds is None else progress.duration(seconds)


def command_line(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder of the run, local or any fsspec URL.")],
) -> None:
    """Print the work of a run that is done, running, stopped and left.

    Numbers count shards, the units of work of a stage. `stale` shards were begun by a process that gave no sign for 30
    seconds: it was killed, or its machine failed. The status comes from the files of the run alone, so any machine that
    sees them may ask, at any time.

    \b
    Examples:
      seedbed status runs/birds
      watch -n 10 seedbed status runs/birds
    """
    print_status(read(run))
    if torn := run_log.num_torn(run):
        Console(highlight=False).print(f"Lines of the log that cannot be read: {torn:,}. The times leave them out.")
    if times := run_log.times(run):
        Console(markup=False, emoji=False, highlight=False).print(times_table(times))


if __name__ == "__main__":
    from pipelines import status  # by its real name: otherwise each class would exist twice

    command.main(status.command_line)
