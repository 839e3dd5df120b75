"""Every benchmark, on the demo that `make curate` wrote: python -m pipelines.bench --run runs/demo --data data/demo

Each table names what it measures against what, the machine and the date.
"""

import datetime
import os
import platform
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from curation import command
from pipelines.bench import copies, retrieval


def command_line(
    run: Annotated[str, typer.Option("--run", help="Folder of a finished run of the demo.")] = "runs/demo",
    data: Annotated[str, typer.Option("--data", help="Folder of the demo's images.")] = "data/demo",
) -> None:
    """Measure the demo's run."""
    console = Console(highlight=False, width=140)
    console.print(
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} processors, {platform.platform()}\n"
    )
    console.print(_retrieval(retrieval.shares(run)))
    console.print(_copies(copies.comparison(run, data)))


def _retrieval(shares: dict[str, tuple[float, float, float]]) -> Table:
    table = Table(title="Share of the 4 nearest drawings with the stamp's concept", title_justify="left")
    for column in ("concept", "share", "to reach", "ratio", "by chance"):
        table.add_column(column, justify="left" if column == "concept" else "right")
    for concept, (share, to_reach, by_chance) in shares.items():
        table.add_row(concept, f"{share:.3f}", f"{to_reach:.2f}", f"{share / to_reach:.2f}", f"{by_chance:.3f}")
    return table


def _copies(comparison: dict[str, dict[str, float]]) -> Table:
    table = Table(title="Share of the planted copies that each detector finds", title_justify="left")
    table.add_column("detector", no_wrap=True)
    for column in (*copies.TRANSFORMS, "other pairs"):
        table.add_column(column, justify="right")
    for detector, shares in comparison.items():
        cells = [f"{shares[transform]:.2f}" for transform in copies.TRANSFORMS]
        table.add_row(detector, *cells, f"{shares['other pairs']:,.0f}")
    return table


if __name__ == "__main__":
    from pipelines.bench import __main__ as bench  # by its real name

    command.main(bench.command_line)
