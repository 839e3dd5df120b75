"""The console script `seedbed`: every command of a user under one name.

    seedbed status RUN
    python -m pipelines.status RUN     the same command, without the script

COMMANDS is the whole list. The module of a command is imported when the command is called, or when its options are
completed. So the help, the version and the completion of names need neither torch nor any other large library.
"""

from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from curation.engine import entry

DISTRIBUTION = "seedbed"


@dataclass(frozen=True)
class Command:
    """One command: the function `command_line` of a module. The docstring of that function begins with the summary."""

    name: str
    module: str
    summary: str


COMMANDS = (
    Command("init", "pipelines.init", "Write a small commented config for images of your own."),
    Command("curate", "pipelines.curate", "Build a corpus from trusted seeds and a large pool."),
    Command("status", "pipelines.status", "Print the work of a run that is done, running, stopped and left."),
    Command("report", "pipelines.report", "Write the report of a finished run again."),
    Command("verify", "pipelines.runs.verify", "Check every byte of a run."),
    Command("train", "pipelines.train", "Train a Vision Transformer on a corpus, and print its losses."),
    # Not pipelines.evaluate: it compares all models that a config lists, and a user has one model to evaluate.
    Command("evaluate", "evaluation.run", "Evaluate a frozen model."),
    Command("doctor", "pipelines.doctor", "Print what this machine has, and which settings suit it."),
)


class CommandGroup(TyperGroup):
    """Holds a stand-in with the name and summary of each command, and imports a command when it is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, stand_in, rest = super().resolve_command(ctx, args)
        module = next((command.module for command in COMMANDS if command.name == name), None)
        return name, stand_in if module is None else _imported(module), rest


def _imported(module: str) -> Any:
    """The command of a module, as `python -m` runs it."""
    return typer.main.get_command(entry.app_of(import_module(module).command_line))


def about(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version of Seedbed, and exit.")] = False,
) -> None:
    """Build an image corpus from trusted seeds and a large pool; train and evaluate on it.

    \b
    Examples:
      seedbed curate --seeds birds=photos/birds --pool photos --output runs/birds
      seedbed status runs/birds
      seedbed curate --help
    """
    if version:
        print(f"{DISTRIBUTION} {metadata.version(DISTRIBUTION)}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def app() -> typer.Typer:
    """All commands. `seedbed` alone prints the help."""
    commands = typer.Typer(
        cls=CommandGroup,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings=entry.HELP_OPTIONS,
        invoke_without_command=True,
    )
    commands.callback()(about)
    for command in COMMANDS:
        commands.command(command.name, help=command.summary)(lambda: None)
    return commands


def main() -> None:
    """Run the command that the command line names, and exit with a status of entry.py."""
    entry.run(app())


if __name__ == "__main__":
    from pipelines import cli  # by its real name, or its classes would exist twice

    cli.main()
