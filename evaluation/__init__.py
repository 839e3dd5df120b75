"""Frozen models are scored here. The command is evaluation/run.py; every protocol is a file."""

import sys


def without_command(name: str) -> int:
    """Say which command runs the protocol `evaluation.<name>`. Gives the exit status of a user's error."""
    arguments = f"--only {name} --model PATH --config EVAL.toml --output DIR"
    print(f"error: evaluation.{name} is no command. Run: seedbed evaluate {arguments}", file=sys.stderr)
    return 2
