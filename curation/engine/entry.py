"""The entry of every command: its help, its exit status, and the message of an error.

0    done
2    the user's input or config is wrong: one message on standard error, no traceback
1    anything else
143  stopped by SIGTERM, 130 by SIGINT; the next run continues with the unfinished shards

This file imports little, so that a command line is completed and its help printed at once.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Set
from typing import Any

import typer
from typer.core import TyperCommand

from curation.errors import SeedbedError, UserError

HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}


def app_of(function: Callable[..., Any]) -> typer.Typer:
    """The app of one command. typer reads the options from the signature of `function`, the help from its docstring."""
    app = typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, context_settings=HELP_OPTIONS
    )
    app.command(cls=_ManyValues)(function)
    return app


class _ManyValues(TyperCommand):
    """A command whose repeatable options take all words up to the next option: `--pool a b` is `--pool a --pool b`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        has_arguments = any(parameter.param_type_name == "argument" for parameter in self.params)
        repeatable = {
            name for parameter in self.params if getattr(parameter, "multiple", False) for name in parameter.opts
        }
        return super().parse_args(ctx, args if has_arguments else list(_spread(args, repeatable)))


def _spread(words: Iterable[str], options: Set[str]) -> Iterator[str]:
    """`words`, with the name of the option repeated before each further value of one of `options`."""
    option, is_first = "", True
    for word in words:
        if word.startswith("-"):
            option, is_first = word, True
        elif option in options:
            if not is_first:
                yield option
            is_first = False
        yield word


def run(app: typer.Typer) -> None:
    """Call `app` with the words of the command line, and exit with a status from the table above."""
    signal.signal(signal.SIGTERM, _raise_on_sigterm)
    try:
        app([_with_home(word) for word in sys.argv[1:]])
    except UserError as error:
        _print_error(error)
        sys.exit(2)
    except SeedbedError as error:
        # The traceback of the cause is for developers; the message is for every user.
        if error.__cause__ is not None:
            sys.excepthook(type(error.__cause__), error.__cause__, error.__cause__.__traceback__)
        _print_error(error)
        sys.exit(1)


def _print_error(error: SeedbedError) -> None:
    from curation.engine import progress  # it imports rich, which the help does not need

    print(f"error: {progress.printable(str(error))}", file=sys.stderr)


def _with_home(word: str) -> str:
    """The home folder in place of a `~` at the beginning of a word or of the value in `--option=value`.

    A shell replaces only some of them.
    """
    name, separator, value = word.partition("=")
    return os.path.expanduser(name) + separator + os.path.expanduser(value)


# The signals that this process was stopped by.
_stopped_by: list[int] = []


def _raise_on_sigterm(signal_number: int, frame: object) -> None:
    _stopped_by.append(signal_number)
    sys.exit(128 + signal_number)  # unwinds the stack: stops the workers and deletes temporary files


def exit_by_signal() -> None:
    """Exit with the status of the signal that stopped this process, if one did.

    For libraries that replace the status of a signal handler by another one.
    """
    if _stopped_by:
        sys.exit(128 + _stopped_by[-1])
