"""The command of a stage that needs a config and the folders of earlier stages, and nothing else.

`embed` and `retrieve` also work without a config, so they have commands of their own.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import typer

from curation.config import SettingsType, load
from curation.engine import command
from curation.engine.runner import Runner
from curation.run_folder import RunFolder, require_stage

# The option for the folder of each stage.
FOLDER_OPTIONS = {
    "ingest": "--images",
    "embed": "--vectors",
    "describe": "--descriptors",
    "pairs": "--pairs",
    "dedup": "--dedup",
    "cluster": "--clusters",
    "retrieve": "--retrieved",
}


def stage_command(
    section: str,
    config_class: type[SettingsType],
    run: Callable[..., object],
    summary: str,
    *,
    reads: Sequence[str] = (),
    num_gpus: Callable[[SettingsType], int] = lambda settings: 0,
    check: Callable[[SettingsType], object] = lambda settings: None,
    in_driver: bool = False,
) -> Callable[..., None]:
    """The command of the stage whose config is `section`: `run(settings, inputs, output, runner, replace=...)`.

    Besides the common options it has one for each of the stages in `reads` (see FOLDER_OPTIONS). `summary` is its help,
    `num_gpus` gives the GPUs that a worker needs. `check` is called before any worker starts, and raises for wrong
    settings. A stage that works `in_driver` starts no workers for any --runner.
    """

    def command_line(
        config: str,
        output: str,
        runner: command.RunnerName,
        workers: int | None,
        overrides: list[str] | None,
        plan: bool,
        replace: bool,
        **folders: str,
    ) -> None:
        settings = load(config_class, config, overrides or (), section=section)

        if not plan:
            command.require_apart(output, settings, config, *folders.values(), is_stage=True)

        def work(chosen: Runner) -> None:
            run(settings, RunFolder(**folders), output, chosen, replace=replace)

        def check_all() -> None:
            require_folders(folders)
            check(settings)

        gpus_per_worker = num_gpus(settings)
        command.plan_or_run(
            settings,
            work,
            plan=plan,
            runner="inline" if in_driver else runner,
            workers=workers,
            gpus_per_worker=gpus_per_worker,
            output=output,
            replace=replace,
            check=check_all,
        )

    required = inspect.Parameter.empty
    options: dict[str, tuple[Any, Any]] = {
        "config": (command.ConfigOption, required),
        **{stage: (_folder_option(stage), required) for stage in reads},
        "output": (command.OutputOption, required),
        "runner": (command.RunnerOption, "ray"),
        "workers": (command.WorkersOption, None),
        "overrides": (command.SetOption, None),
        "plan": (command.PlanOption, False),
        "replace": (command.ReplaceOption, False),
    }
    # typer reads the options from the signature.
    command_line.__doc__ = summary
    command_line.__annotations__ = {name: annotation for name, (annotation, _) in options.items()} | {"return": None}
    command_line.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # not in the type stubs of functions
        [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for name, (annotation, default) in options.items()
        ]
    )
    return command_line


def require_folders(folders: Mapping[str, str]) -> None:
    """Raise InputError unless each folder, by stage, holds that finished stage."""
    for stage, folder in folders.items():
        require_stage(folder, stage, FOLDER_OPTIONS[stage])


def _folder_option(stage: str) -> Any:
    return Annotated[str, typer.Option(FOLDER_OPTIONS[stage], help=f"Folder of the finished {stage}.")]
