"""Measures on a GPU, in nine minutes, what only a GPU can show: python -m pipelines.bench.gpu --images FOLDER

FOLDER holds real photographs, at most 50 MB of them; rows cut as many crops from them as they need. Each row is a
process of its own with its own time limit (gpu_row.py), the most telling row first. As soon as a row ends, its JSON
line is appended to the output, so a run that is cut short leaves its rows. The last output is a table in Markdown.

A line has the fields of gpu_row.Figures (value, unit, goal, peer, others), and beside them:

    name      of the row
    status    done           all figures are there
              not installed  a library is missing; `reason` names it
              not here       the row's data or device are not on this machine
              failed         `reason` is the last line of the error
              out of time    stopped at its limit; the figures are those known by then, if any
    reason    of a status other than done
    machine, torch, date, seconds

Before a run on a GPU, `--make-reference` on a CPU writes the vectors and decisions of the row `curation`; the run reads
them with `--reference`. `--tiny` runs every row on a CPU with tiny counts and models, as a test of the rows themselves.
"""

import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from curation.engine import command, progress
from curation.errors import InputError
from pipelines.bench import gpu_pictures
from pipelines.bench.gpu_row import REFERENCE_FACTS, Setup

# The time of a whole run. Assumed: a GPU is booked for ten minutes.
SECONDS_IN_ALL = 540.0
# The time of all tiny rows on a CPU, and the least limit of one: a busy machine takes ten times as long as a quiet one.
TINY_SECONDS_IN_ALL, TINY_LIMIT = 300.0, 90.0
# A row with less time than this left is not started. Assumed: importing torch takes as long.
MIN_SECONDS = 8.0
# Lines of a failed row's output that are shown.
SHOWN_LINES = 15


@dataclass(frozen=True)
class Row:
    """One row: its name, the module whose ROWS has it, and its time limit in seconds."""

    name: str
    module: str
    limit: float


# The most telling first. Limits are assumed; on an H200 most rows should end well before theirs.
ROWS = (
    Row("embed", "pipelines.bench.gpu_curation", 85),
    Row("train-large", "pipelines.bench.gpu_training", 75),
    Row("curation", "pipelines.bench.gpu_curation", 120),
    Row("step", "pipelines.bench.gpu_training", 45),
    Row("search", "pipelines.bench.gpu_search", 75),
    Row("train-base", "pipelines.bench.gpu_training", 45),
    Row("train-small", "pipelines.bench.gpu_training", 45),
    Row("resume", "pipelines.bench.gpu_training", 60),
    Row("fsdp", "pipelines.bench.gpu_training", 45),
    Row("workers", "pipelines.bench.gpu_curation", 60),
    Row("join", "pipelines.bench.gpu_search", 60),
    Row("kmeans", "pipelines.bench.gpu_search", 60),
    Row("cells", "pipelines.bench.gpu_search", 60),
    Row("train-compiled", "pipelines.bench.gpu_training", 120),
    Row("demo", "pipelines.bench.gpu_curation", 180),
)
NAMES = ", ".join(row.name for row in ROWS)

Line = dict[str, Any]


def run(rows: Sequence[Row], setup: Setup, output: Path, *, seconds_in_all: float) -> list[Line]:
    """Run the rows one after another and append the line of each to `output`; returns the lines."""
    deadline = time.monotonic() + seconds_in_all
    facts = {"machine": machine(), "torch": version("torch"), "date": str(datetime.date.today())}
    output.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for row in rows:
        left = deadline - time.monotonic()
        started = time.monotonic()
        folder = Path(setup.folder, row.name)
        folder.mkdir()
        if left < MIN_SECONDS:
            line: Line = {"status": "out of time", "reason": f"all {seconds_in_all:g} seconds are over"}
        else:
            line = run_row(row, Setup(**(asdict(setup) | {"folder": str(folder)})), min(row.limit, left))
        shutil.rmtree(folder, ignore_errors=True)
        line = {"name": row.name, **line, **facts, "seconds": round(time.monotonic() - started, 1)}
        with output.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        lines.append(line)
        progress.say(f"bench-gpu: {row.name}: {_status(line)}, {line['seconds']} s")
    return lines


def run_row(row: Row, setup: Setup, limit: float) -> Line:
    """The figures and the status of one row, run in a process of its own that is stopped after `limit` seconds."""
    figures, log = Path(setup.folder + ".jsonl"), Path(setup.folder + ".log")
    arguments = [row.module, row.name, str(figures), json.dumps(asdict(setup))]
    with log.open("wb") as messages:
        # A process group, so that the processes that the row starts end with it.
        process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.bench.gpu_row", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=messages,
            stderr=messages,
            process_group=0,
        )
        try:
            process.wait(timeout=limit)
            end: Line = {"status": "failed", "reason": _last_line(log, process.returncode)}
        except subprocess.TimeoutExpired:
            end = {"status": "out of time", "reason": f"stopped after {limit:.0f} seconds"}
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    line: Line = {"value": None, "unit": "", "goal": "", "peer": "", "others": {}}
    for text in figures.read_text().splitlines() if figures.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # a line that a killed row left unfinished
            part = json.loads(text)
            end = part if "status" in part else end
            line |= part
    if end["status"] == "failed":
        shown = log.read_text(errors="replace").splitlines()[-SHOWN_LINES:]
        progress.say("\n".join(f"{row.name} | {text}" for text in shown))
    return line | end


def _last_line(log: Path, return_code: int) -> str:
    """Why a process ended that did not say it itself."""
    if return_code < 0:
        return f"ended by signal {-return_code} ({signal.Signals(-return_code).name})"
    written = log.read_text(errors="replace").strip().splitlines()
    return written[-1] if written else f"ended with status {return_code}"


def machine() -> str:
    """This machine in words: its GPU if there is one, its processors and its system."""
    gpu = "no GPU"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpu = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()[0]
    return f"{gpu}, {os.cpu_count()} processors, {platform.machine()}, Python {platform.python_version()}"


def version(package: str) -> str:
    """The version of an installed package, or "not installed". Imports nothing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def markdown(lines: Sequence[Line]) -> str:
    """The lines as a table, ready for docs/benchmarks.md."""
    first = lines[0]
    texts = [
        f"{first['date']}, {first['machine']}, torch {first['torch']}.",
        "",
        "| row | value | goal | peer | further figures | seconds | status |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for line in lines:
        value = "" if line.get("value") is None else f"{number(line['value'])} {line['unit']}"
        others = "; ".join(f"{name} {number(other)}" for name, other in line.get("others", {}).items())
        cells = (line["name"], value, line.get("goal", ""), line.get("peer", ""), others, str(line["seconds"]))
        texts.append("| " + " | ".join(cell.replace("|", "/") for cell in (*cells, _status(line))) + " |")
    return "\n".join(texts)


def number(value: float | str) -> str:
    """A figure with four digits that count; text as it is."""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _status(line: Line) -> str:
    return f"{line['status']}: {line['reason']}" if line["reason"] else str(line["status"])


def installed_photographs() -> str:
    """The folder of the two photographs that come with scikit-learn."""
    found = importlib.util.find_spec("sklearn")
    if found is None or not found.submodule_search_locations:
        raise InputError("scikit-learn, whose photographs --tiny takes, is not installed. Give --images FOLDER.")
    return str(Path(found.submodule_search_locations[0], "datasets", "images"))


def _check_reference(reference: str, images: str) -> None:
    """Raise InputError unless the reference was made from these photographs: better now than after minutes."""
    facts = Path(reference, REFERENCE_FACTS)
    if not facts.exists():
        raise InputError(
            f"--reference {reference}: no {REFERENCE_FACTS} there. Make it with --make-reference on a CPU."
        )
    if json.loads(facts.read_text())["photographs"] != gpu_pictures.hash_photographs(images):
        raise InputError(f"--reference {reference} was made from other photographs than those in '{images}'.")


def command_line(
    images: Annotated[
        str | None, typer.Option("--images", help="Folder of real photographs; with --tiny, scikit-learn's two.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", help="File of JSON lines to append to.")] = Path(
        "runs/bench-gpu.jsonl"
    ),
    only: Annotated[list[str] | None, typer.Option("--only", help=f"One of {NAMES}; repeatable.")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="Every row on a CPU, with tiny counts and models.")] = False,
    reference: Annotated[
        str | None, typer.Option("--reference", help="Folder of --make-reference, to compare `curation` with.")
    ] = None,
    make_reference: Annotated[
        str | None, typer.Option("--make-reference", help="Only run `curation` on the CPU, and write this folder.")
    ] = None,
) -> None:
    """Measure the rows on a GPU, or all of them in miniature on a CPU."""
    if unknown := sorted(set(only or ()) - {row.name for row in ROWS}):
        raise InputError(f"--only {unknown[0]}: there is no such row. Choose from {NAMES}.")
    if images is None and not tiny:
        raise InputError("Give --images FOLDER with real photographs, or --tiny.")
    images = images or installed_photographs()
    try:
        gpu_pictures.photographs(images)
    except ValueError as error:
        raise InputError(f"--images: {error}") from None
    if reference is not None:
        _check_reference(reference, images)
    with tempfile.TemporaryDirectory(prefix="seedbed-bench-") as folder:
        setup = Setup(images=images, folder=folder, tiny=tiny, reference=reference)
        if make_reference is not None:
            from pipelines.bench import gpu_curation

            gpu_curation.make_reference(setup, Path(make_reference))
            return
        rows = [row for row in ROWS if not only or row.name in only]
        if tiny:
            rows = [replace(row, limit=max(row.limit, TINY_LIMIT)) for row in rows]
        seconds_in_all = TINY_SECONDS_IN_ALL if tiny else SECONDS_IN_ALL
        print(markdown(run(rows, setup, output, seconds_in_all=seconds_in_all)))


if __name__ == "__main__":
    from pipelines.bench import gpu  # by its real name: otherwise each class would exist twice

    command.main(gpu.command_line)
