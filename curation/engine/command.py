"""What all commands share: the exit status, the options, and the choice of a runner.

0    done
2    the user's input or config is wrong: one message on standard error, no traceback
1    anything else
143  stopped by SIGTERM, 130 by SIGINT; the next run goes on where this one stopped
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

import typer

from curation.config import Settings, resolved_toml
from curation.engine import progress
from curation.engine.runner import InlineRunner, Runner
from curation.errors import SeedbedError, UserError

RunnerName = Literal["ray", "inline"]

ConfigOption = Annotated[str, typer.Option("--config", help="TOML file; the stage reads its own section.")]
OutputOption = Annotated[str, typer.Option("--output", help="Folder to write, local or any fsspec URL.")]
RunnerOption = Annotated[RunnerName, typer.Option("--runner", help="Where the work runs; the bytes are the same.")]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", min=1, help="Ray workers; one for each processor when not given.")
]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Override one setting: a.b=value. Repeatable.")]
PlanOption = Annotated[bool, typer.Option("--plan", help="Print what would run, and stop.")]
ReplaceOption = Annotated[
    bool, typer.Option("--replace", help="Redo a stage whose output is of another config or of other inputs.")
]


def main(function: Callable[..., Any]) -> None:
    """Run `function` as a typer command and leave with the exit status above."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(function)
    signal.signal(signal.SIGTERM, _raise_on_sigterm)
    try:
        app()
    except UserError as error:
        print(f"error: {progress.printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except SeedbedError as error:
        # The cause's traceback helps whoever mends the code; the message in front of it helps everyone.
        if error.__cause__ is not None:
            sys.excepthook(type(error.__cause__), error.__cause__, error.__cause__.__traceback__)
        print(f"error: {progress.printable(str(error))}", file=sys.stderr)
        sys.exit(1)


def plan_or_run(
    settings: Settings,
    work: Callable[[Runner], object],
    *,
    plan: bool,
    runner: RunnerName,
    workers: int | None,
    gpus_per_worker: float = 0,
) -> None:
    """The body of a stage's command: print the resolved settings with --plan, else call `work` with the runner."""
    if plan:
        print(resolved_toml(settings), end="")
        return
    with open_runner(runner, workers, gpus_per_worker=gpus_per_worker) as chosen:
        work(chosen)


@contextlib.contextmanager
def open_runner(name: RunnerName, workers: int | None = None, *, gpus_per_worker: float = 0) -> Iterator[Runner]:
    """The runner of that name, closed at the end."""
    if name == "inline":
        yield InlineRunner()
        return
    from curation.engine.ray_runner import RayRunner

    runner = RayRunner(num_workers=workers or os.cpu_count() or 1, gpus_per_worker=gpus_per_worker)
    try:
        for line in runner.where_to_look():
            progress.say(line)
        yield runner
    finally:
        runner.close()


def _raise_on_sigterm(signal_number: int, frame: object) -> None:
    sys.exit(128 + signal_number)  # unwinds, so that workers are stopped and no temporary file stays
