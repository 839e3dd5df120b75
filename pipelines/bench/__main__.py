"""Every benchmark: python -m pipelines.bench --run runs/demo --data data/demo

Two tables are of the demo that `make curate` wrote, five or six of photographs (decoding.py, embedding.py, crops.py,
training.py), three of shards and workers (scaling.py), the others of drawn vectors (similarity.py).
Each names what it measures against what, the machine and the date.
"""

import datetime
import os
import platform
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from curation.engine import command
from curation.errors import InputError
from pipelines.bench import copies, crops, decoding, embedding, retrieval, scaling, similarity, training

DEMO = ("concepts", "copies")
ALL = (*DEMO, decoding.NAME, embedding.NAME, *crops.TO_REACH, training.NAME, *scaling.NAMES, *similarity.WORKS)
NAMES = ", ".join(ALL)


def command_line(
    run: Annotated[str, typer.Option("--run", help="Folder of a finished run of the demo.")] = "runs/demo",
    data: Annotated[str, typer.Option("--data", help="Folder of the demo's images.")] = "data/demo",
    only: Annotated[list[str] | None, typer.Option("--only", help=f"One of {NAMES}; repeatable.")] = None,
    scale: Annotated[int, typer.Option("--scale", min=1, help="Divide the sizes of drawn data, to try out.")] = 1,
    repeats: Annotated[
        int | None, typer.Option("--repeats", min=1, help="Runs of which the median counts; default: 1 or 3.")
    ] = None,
    photographs: Annotated[
        str | None, typer.Option("--photographs", help="Folder of JPEGs for decode, in place of drawn ones.")
    ] = None,
) -> None:
    """Measure everything, or what is named."""
    names = only or ALL
    if unknown := sorted(set(names) - set(ALL)):
        raise InputError(f"--only {unknown[0]}: there is no such benchmark. Choose from {NAMES}.")
    console = Console(highlight=False, width=190)
    console.print(
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} processors, {platform.platform()}\n"
    )
    if "concepts" in names:
        console.print(_retrieval(retrieval.shares(run)))
    if "copies" in names:
        console.print(_copies(copies.comparison(run, data)))
    if decoding.NAME in names:
        console.print(decoding.table(decoding.bench(scale=scale, repeats=repeats, folder=photographs)))
    if embedding.NAME in names:
        for table in embedding.tables(*embedding.bench(scale=scale, repeats=repeats)):
            console.print(table)
    if asked := [name for name in crops.TO_REACH if name in names]:
        console.print(crops.table(crops.bench(asked, scale=scale, repeats=repeats)))
    if training.NAME in names:
        for table in training.tables(scale=scale, repeats=repeats):
            console.print(table)
    for table in scaling.tables([name for name in scaling.NAMES if name in names], scale=scale, repeats=repeats):
        console.print(table)
    asked = [name for name in similarity.WORKS if name in names]
    for table in similarity.tables(similarity.bench(asked, scale=scale, repeats=repeats)):
        console.print(table)


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
