"""The command of a stage that needs a config and the folders of earlier stages, and nothing else.

`embed` and `retrieve` also work without a config, so they have commands of their own.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from curation.config import SettingsType, load
from curation.engine import command
from curation.engine.runner import Runner
from curation.run_folder import RunFolder

# By the stage whose folder it names: the option, and the word for it in the help.
FOLDER_OPTIONS = {
    "ingest": ("--images", "ingest"),
    "embed": ("--vectors", "embed"),
    "describe": ("--descriptors", "describe"),
    "pairs": ("--pairs", "pairs"),
    "dedup": ("--dedup", "dedup"),
    "cluster": ("--clusters", "cluster"),
    "retrieve": ("--retrieved", "retrieve"),
}


def stage_command(
    section: str,
    config_class: type[SettingsType],
    run: Callable[..., object],
    summary: str,
    *,
    reads: Sequence[str] = (),
    num_gpus: Callable[[SettingsType], int] = lambda settings: 0,
    in_driver: bool = False,
) -> Callable[..., None]:
    """The command of the stage whose config is `section`: `run(settings, inputs, output, runner, replace=...)`.

    Besides the common options it has one for each of the stages in `reads` (see FOLDER_OPTIONS). `summary` is its help,
    `num_gpus` gives the GPUs that a worker needs. A stage that works `in_driver` starts no workers for any --runner.
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

        def work(chosen: Runner) -> None:
            run(settings, RunFolder(**folders), output, chosen, replace=replace)

        gpus_per_worker = num_gpus(settings)
        command.plan_or_run(
            settings,
            work,
            plan=plan,
            runner="inline" if in_driver else runner,
            workers=workers,
            gpus_per_worker=gpus_per_worker,
        )

    folder_options: dict[str, Any] = {}
    for stage in reads:
        option, name = FOLDER_OPTIONS[stage]
        folder_options[stage] = Annotated[str, typer.Option(option, help=f"Folder of the finished {name}.")]
    options: dict[str, tuple[Any, Any]] = {
        "config": (command.ConfigOption, inspect.Parameter.empty),
        **{stage: (option, inspect.Parameter.empty) for stage, option in folder_options.items()},
        "output": (command.OutputOption, inspect.Parameter.empty),
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
