"""Writes the table of faults in docs/reliability.md from the measurements of `make test-cluster`.

    python -m tests.cluster.fault_table

A test that goes through a fault adds a line to `runs/faults.jsonl`, which `make test-cluster` removes first. The lines
of one fault become one row of the table.
"""

import datetime
import json
import os
import platform
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
MEASURED = ROOT / "runs/faults.jsonl"
DOCUMENT = ROOT / "docs/reliability.md"
BEGIN, END = "<!-- fault table: make test-cluster -->", "<!-- end of the fault table -->"


def add(fault: str, *, survived: bool, shards: int, twice: int, seconds: float | None) -> None:
    """Add the line of one run.

    `survived`: whether its bytes equal those of a run without faults. `shards`: of training, steps. `twice`: shards
    begun again. `seconds`: from the fault, or from the resuming command, until these were done; None without any.
    """
    MEASURED.parent.mkdir(exist_ok=True)
    with MEASURED.open("a") as file:
        line = {"fault": fault, "survived": survived, "shards": shards, "twice": twice, "seconds": seconds}
        file.write(json.dumps(line) + "\n")


def table(lines: list[dict[str, object]]) -> str:
    """The lines as a Markdown table with one row for each fault, in the order of the lines."""
    faults: dict[str, list[dict[str, object]]] = defaultdict(list)
    for line in lines:
        faults[str(line["fault"])].append(line)
    rows = [
        "| fault | runs | same bytes | begun again, at most | of | seconds until done, median (most) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for fault, runs in faults.items():
        seconds = sorted(float(str(run["seconds"])) for run in runs if run["seconds"] is not None)
        waited = f"{seconds[len(seconds) // 2]:.0f} ({seconds[-1]:.0f})" if seconds else "-"
        twice, shards = max(int(str(run["twice"])) for run in runs), max(int(str(run["shards"])) for run in runs)
        same = sum(bool(run["survived"]) for run in runs)
        rows.append(f"| {fault} | {len(runs)} | {same} | {twice} | {shards} | {waited} |")
    return "\n".join(rows)


def main() -> None:
    lines = [json.loads(line) for line in MEASURED.read_text().splitlines()]
    machine = f"{os.cpu_count()} cores ({platform.machine()}), {platform.system()}"
    head = f"Measured {datetime.date.today()} on {machine}, {len(lines)} runs, three hosts in network namespaces.\n\n"
    text = DOCUMENT.read_text()
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    DOCUMENT.write_text(f"{before}\n\n{head}{table(lines)}\n\n{after}")
    print(table(lines))


if __name__ == "__main__":
    main()
