"""Runs one work of a benchmark in a process of its own, so that its memory and threads are its own.

    python -m pipelines.bench.MODULE WORK '{"argument": value, ...}'

prints the measurements as JSON on the last line. A module with works ends with `run_work`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Measurements = dict[str, float]


def in_process(module: str, work: str, *, threads: int | None = None, **arguments: Any) -> Measurements:
    """The measurements of a work of `pipelines.bench.<module>`, run in a process of its own.

    `threads`: OpenMP threads of that process. Raises RuntimeError with the error output when the work fails.
    """
    command = [sys.executable, "-m", f"pipelines.bench.{module}", work, json.dumps(arguments)]
    environment = os.environ if threads is None else {**os.environ, "OMP_NUM_THREADS": str(threads)}
    completed = subprocess.run(command, env=environment, capture_output=True, text=True)
    if completed.returncode:
        raise RuntimeError(f"The benchmark's {work} ended with status {completed.returncode}:\n{completed.stderr}")
    measurements: Measurements = json.loads(completed.stdout.splitlines()[-1])
    return measurements


def run_work(works: Mapping[str, Callable[..., Measurements]]) -> None:
    """Run the work that the command line names, with its arguments, and print its measurements."""
    print(json.dumps(works[sys.argv[1]](**json.loads(sys.argv[2]))))


def memory(field: str) -> float:
    """A memory field of this process in bytes: VmRSS is the present, VmHWM the peak. NaN outside Linux."""
    # Not resource.getrusage: the ru_maxrss of a process begins with the peak of its parent.
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    line = next(line for line in status.read_text().splitlines() if line.startswith(field + ":"))
    return 1024.0 * int(line.split()[1])
