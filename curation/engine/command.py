"""The exit status, the options and the choice of a runner, shared by all commands.

0    done
2    the user's input or config is wrong: one message on standard error, no traceback
1    anything else
143  stopped by SIGTERM, 130 by SIGINT; the next run continues with the unfinished shards
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal

import typer

from curation.config import Settings, resolved_toml
from curation.engine import progress
from curation.engine.manifest import MANIFEST_NAME
from curation.engine.runner import InlineRunner, Runner
from curation.errors import SeedbedError, UserError
from curation.files import paths

# The names of settings that hold the path of an input, in every config.
PATH_SETTINGS = frozenset(
    {"path", "folder", "weights", "concepts", "train_images", "train_masks", "test_images", "test_masks"}
)

RunnerName = Literal["ray", "inline"]

ConfigOption = Annotated[str, typer.Option("--config", help="TOML file; a stage reads its own section of it.")]
OutputOption = Annotated[str, typer.Option("--output", help="Where to write: local, mostly any fsspec URL.")]
RunnerOption = Annotated[RunnerName, typer.Option("--runner", help="Where the work runs; the bytes are the same.")]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", min=1, help="Number of Ray workers; by default one per processor.")
]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Override one setting: a.b=value. Repeatable.")]
PlanOption = Annotated[bool, typer.Option("--plan", help="Print the plan and stop.")]
ReplaceOption = Annotated[
    bool, typer.Option("--replace", help="Redo a stage with another config or other inputs, and damaged shards.")
]


def main(function: Callable[..., Any]) -> None:
    """Run `function` as a typer command and exit with a status from the table above."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(function)
    signal.signal(signal.SIGTERM, _raise_on_sigterm)
    try:
        app([_with_home(word) for word in sys.argv[1:]])
    except UserError as error:
        print(f"error: {progress.printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except SeedbedError as error:
        # The traceback of the cause is for developers; the message is for every user.
        if error.__cause__ is not None:
            sys.excepthook(type(error.__cause__), error.__cause__, error.__cause__.__traceback__)
        print(f"error: {progress.printable(str(error))}", file=sys.stderr)
        sys.exit(1)


def require_apart(output: str, settings: Settings, *inputs: str, is_stage: bool = False) -> None:
    """Raise InputError where `output` is one of the `inputs` of a command, or a file or folder of its settings.

    is_stage: `output` is the folder of a stage, whose content --replace deletes; no input may lie below it.
    """
    paths.require_apart(output, [*inputs, *_paths_in(settings.model_dump())], or_above=is_stage)


def _paths_in(values: Any) -> Iterator[str]:
    """The values of PATH_SETTINGS in nested sections and lists of them."""
    if isinstance(values, dict):
        yield from (value for key, value in values.items() if key in PATH_SETTINGS and isinstance(value, str))
        values = values.values()
    if not isinstance(values, str):
        for value in values if isinstance(values, Iterable) else ():
            yield from _paths_in(value)


def _with_home(word: str) -> str:
    """The home folder in place of a `~` at the beginning of a word or of the value in `--option=value`.

    A shell replaces only some of them.
    """
    name, separator, value = word.partition("=")
    return os.path.expanduser(name) + separator + os.path.expanduser(value)


def plan_or_run(
    settings: Settings,
    work: Callable[[Runner], object],
    *,
    plan: bool,
    runner: RunnerName,
    workers: int | None,
    gpus_per_worker: float = 0,
    output: str | None = None,
    replace: bool = False,
    check: Callable[[], object] | None = None,
) -> None:
    """The body of a stage's command: with `plan`, print the resolved settings; else call `work` with a runner.

    Before the runner starts, `check` is called, and the folder `output` must be writable, unless a stage is done there.
    """
    if plan:
        print(resolved_toml(settings), end="")
        return
    if check is not None:
        check()
    if output is not None:
        paths.require_writable(output, unless=() if replace else (paths.join(output, MANIFEST_NAME),))
    gpu_settings = settings_on_gpu(settings)
    with open_runner(runner, workers, gpus_per_worker=gpus_per_worker, gpu_settings=gpu_settings) as opened:
        work(opened)


def settings_on_gpu(settings: Settings) -> list[str]:
    """The dotted names of the settings `device` that are "cuda"."""

    def names(value: Any, path: str) -> Iterator[str]:
        for key, item in value.items() if isinstance(value, dict) else ():
            if key == "device" and item == "cuda":
                yield path + key
            yield from names(item, f"{path}{key}.")

    return list(names(settings.model_dump(mode="json"), ""))


@contextlib.contextmanager
def open_runner(
    name: RunnerName, workers: int | None = None, *, gpus_per_worker: float = 0, gpu_settings: Sequence[str] = ()
) -> Iterator[Runner]:
    """The runner with this name, closed at the end of the block. Raises an error where a worker's GPU is missing.

    gpu_settings: the names of the settings that need the GPU, for the message.
    """
    gpu_setting = ", ".join(gpu_settings) or "device"
    with _saying_how_to_go_on():
        if name == "inline":
            if gpus_per_worker:
                from curation.engine.device import require_device  # torch takes a second

                require_device("cuda", gpu_setting)
            yield InlineRunner()
            return
        from curation.engine.ray_runner import RayRunner

        num_workers = workers or os.cpu_count() or 1
        runner = RayRunner(num_workers=num_workers, gpus_per_worker=gpus_per_worker, gpu_setting=gpu_setting)
        try:
            for line in runner.monitoring_addresses():
                progress.say(line)
            yield runner
        finally:
            runner.close()


@contextlib.contextmanager
def _saying_how_to_go_on() -> Iterator[None]:
    """Print one line when Ctrl-C or SIGTERM ends the block."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, KeyboardInterrupt) or stop.code == 128 + signal.SIGTERM:
            progress.say("Stopped. Finished shards are kept: run the same command again to go on.")
        raise


def _raise_on_sigterm(signal_number: int, frame: object) -> None:
    sys.exit(128 + signal_number)  # unwinds the stack: stops the workers and deletes temporary files
