"""Runs one row of gpu.py in a process of its own, and writes down each figure as soon as it is known.

    python -m pipelines.bench.gpu_row MODULE ROW FIGURES.jsonl '{"images": ..., "folder": ..., ...}'

A row is a generator of Figures in the dictionary ROWS of its module. Each Figures replaces the one before, so a row
that is stopped leaves its last one. The module is imported here and not at the top: processes that a row starts import
this file, and torch takes seconds.
"""

import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

# The file of a reference folder that says from which photographs it was made.
REFERENCE_FACTS = "reference.json"


@dataclass(frozen=True)
class Setup:
    """What a row gets."""

    images: str
    """Folder of real photographs."""
    folder: str
    """An empty folder, deleted after the row."""
    tiny: bool
    """Whether all counts and models are tiny and the device is a CPU."""
    reference: str | None = None
    """Folder that `--make-reference` wrote on a CPU."""
    demo: str = "data/demo"
    """Folder of the demo's images; it may be absent."""

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """The device of the row."""
        return "cpu" if self.tiny else "cuda"


@dataclass(frozen=True)
class Figures:
    """The measurements of a row so far."""

    value: float
    """The main figure."""
    unit: str
    goal: str = ""
    peer: str = ""
    """What the value is compared with, and the peer's own figure."""
    others: Mapping[str, float | str] = field(default_factory=dict)
    """Further figures by their names, which hold the units."""


class NotHereError(Exception):
    """The data or the device of a row are not on this machine."""


RowWork = Callable[[Setup], Iterator[Figures]]


def run(module: str, row: str, figures_path: str, setup: Setup) -> int:
    """Run a row and append its figures, then its status if it was not done; returns the exit status."""

    def write(line: Mapping[str, object]) -> None:
        with Path(figures_path).open("a") as file:
            file.write(json.dumps(line) + "\n")

    try:
        works: Mapping[str, RowWork] = importlib.import_module(module).ROWS
        for figures in works[row](setup):
            write(asdict(figures))
    except ModuleNotFoundError as error:
        write({"status": "not installed", "reason": str(error)})
    except NotHereError as error:
        write({"status": "not here", "reason": str(error)})
    except Exception as error:
        traceback.print_exc()
        message = traceback.format_exception_only(error)[-1].strip()
        write({"status": "failed", "reason": message.splitlines()[-1].strip()})
    else:
        write({"status": "done", "reason": ""})
        return 0
    return 1


if __name__ == "__main__":
    from pipelines.bench import gpu_row  # by its real name: otherwise each class would exist twice

    module, row, figures_path, setup = sys.argv[1:]
    status = gpu_row.run(module, row, figures_path, gpu_row.Setup(**json.loads(setup)))
    sys.stdout.flush()
    sys.stderr.flush()
    # The figures are written. Threads of libraries abort some processes when Python ends as usual.
    os._exit(status)
