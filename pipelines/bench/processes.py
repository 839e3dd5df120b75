"""Runs one work of a benchmark in a process of its own, so that its memory can be told from the others'."""

import json
import subprocess
import sys
from typing import Any


def in_process(module: str, work: str, arguments: dict[str, Any]) -> dict[str, float]:
    """What `python -m pipelines.bench.<module> <work> <arguments as JSON>` prints as JSON on its last line.

    Raises RuntimeError with what it printed when it fails.
    """
    command = [sys.executable, "-m", f"pipelines.bench.{module}", work, json.dumps(arguments)]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(f"The benchmark's {work} ended with status {finished.returncode}:\n{finished.stderr}")
    measured: dict[str, float] = json.loads(finished.stdout.splitlines()[-1])
    return measured
