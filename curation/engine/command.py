"""The options and the choice of a runner, shared by all commands. Their exit status: entry.py."""

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

import typer

from curation.config import Settings, find, paths_in, resolved_toml
from curation.engine import entry, machine, progress
from curation.engine.manifest import MANIFEST_NAME
from curation.engine.runner import InlineRunner, Runner
from curation.files import paths

RunnerName = Literal["ray", "inline"]

CONFIG_OPTION: Any = typer.Option(
    "--config",
    metavar="FILE",
    callback=lambda path: None if path is None else find(path),
    help="TOML file of the settings, or the name of a shipped one; a stage alone reads its section of it.",
)
ConfigOption = Annotated[str, CONFIG_OPTION]
OptionalConfigOption = Annotated[str | None, CONFIG_OPTION]
OutputOption = Annotated[
    str,
    typer.Option("--output", metavar="DIR", help="Folder of the results: local, or mostly any fsspec URL (s3://...)."),
]
RunnerOption = Annotated[
    RunnerName,
    typer.Option("--runner", help="Where the work runs: in processes of Ray, or in this one. The bytes are the same."),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--workers", metavar="N", min=1, help="Number of Ray workers; by default one for each core that is usable here."
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=VALUE", help="Override a setting of the config by its dotted name. Repeatable."),
]
PlanOption = Annotated[bool, typer.Option("--plan", help="Print the plan and stop.")]
ReplaceOption = Annotated[
    bool, typer.Option("--replace", help="Redo stages with another config or other inputs, and damaged shards.")
]


def main(function: Callable[..., Any]) -> None:
    """Run `function` as a command, and exit with a status of entry.py."""
    entry.run(entry.app_of(function))


def require_apart(output: str, settings: Settings, *inputs: str, is_stage: bool = False) -> None:
    """Raise InputError where `output` is one of the `inputs` of a command, or a file or folder of its settings.

    is_stage: `output` is the folder of a stage, whose content --replace deletes; no input may lie below it.
    """
    paths.require_apart(output, [*inputs, *paths_in(settings)], or_above=is_stage)


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
    with saying_how_to_go_on("Finished shards are kept"):
        if name == "inline":
            if gpus_per_worker:
                from curation.engine.device import require_device  # torch takes a second

                require_device("cuda", gpu_setting)
            yield InlineRunner()
            return
        from curation.engine.ray_runner import RayRunner

        num_workers = workers or machine.usable_cores()
        runner = RayRunner(num_workers=num_workers, gpus_per_worker=gpus_per_worker, gpu_setting=gpu_setting)
        try:
            for line in runner.monitoring_addresses():
                progress.say(line)
            yield runner
        finally:
            runner.close()


@contextlib.contextmanager
def saying_how_to_go_on(kept: str) -> Iterator[None]:
    """Print one line when Ctrl-C or SIGTERM ends the block. kept: a sentence on the work that is kept."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, KeyboardInterrupt) or stop.code == 128 + signal.SIGTERM:
            progress.say(f"Stopped. {kept}: run the same command again to go on.")
        raise
