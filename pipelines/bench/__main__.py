"""Runs every benchmark: python -m pipelines.bench --run runs/demo --data data/demo

Two tables are of the demo that `make curate` wrote. The next ones are of drawn photographs (decoding.py, embedding.py,
crops.py, training.py), of workers, tars and shards (scaling.py), and of drawn vectors (similarity.py). Each names the
works, the peers, the ratios and their targets; the first line has the machine and the date.
"""

import datetime
import os
import platform
from collections.abc import Callable, Iterable
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from curation.engine import command
from curation.errors import InputError
from pipelines.bench import copies, crops, decoding, embedding, retrieval, scaling, similarity, training

ALL = (
    retrieval.NAME,
    copies.NAME,
    decoding.NAME,
    embedding.NAME,
    *crops.TARGETS,
    training.NAME,
    *scaling.WORKS,
    *similarity.WORKS,
)
NAMES = ", ".join(ALL)


def command_line(
    run: Annotated[str, typer.Option("--run", help="Folder of a finished run of the demo.")] = "runs/demo",
    data: Annotated[str, typer.Option("--data", help="Folder of the demo's images.")] = "data/demo",
    only: Annotated[list[str] | None, typer.Option("--only", help=f"One of {NAMES}; repeatable.")] = None,
    scale: Annotated[int, typer.Option("--scale", min=1, help="Divide the sizes of drawn data, for a trial.")] = 1,
    repeats: Annotated[
        int | None, typer.Option("--repeats", min=1, help="Runs whose median counts; default: 1 to 5, by benchmark.")
    ] = None,
    photographs: Annotated[
        str | None, typer.Option("--photographs", help="Folder of JPEGs for decode, in place of drawn ones.")
    ] = None,
) -> None:
    """Run all benchmarks, or the named ones."""
    names = only or ALL
    if unknown := sorted(set(names) - set(ALL)):
        raise InputError(f"--only {unknown[0]}: there is no such benchmark. Choose from {NAMES}.")
    console = Console(highlight=False, width=190)
    console.print(
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} processors, {platform.platform()}\n"
    )
    # Names with the function that makes the tables of the chosen ones.
    benches: list[tuple[Iterable[str], Callable[[list[str]], Iterable[Table]]]] = [
        ([retrieval.NAME], lambda _: [retrieval.table(retrieval.shares(run))]),
        ([copies.NAME], lambda _: [copies.table(copies.comparison(run, data))]),
        (
            [decoding.NAME],
            lambda _: [decoding.table(decoding.bench(scale=scale, repeats=repeats, folder=photographs))],
        ),
        ([embedding.NAME], lambda _: embedding.tables(*embedding.bench(scale=scale, repeats=repeats))),
        (crops.TARGETS, lambda chosen: [crops.table(crops.bench(chosen, scale=scale, repeats=repeats))]),
        ([training.NAME], lambda _: training.tables(scale=scale, repeats=repeats)),
        (scaling.WORKS, lambda chosen: [scaling.WORKS[name](scale, repeats) for name in chosen]),
        (
            similarity.WORKS,
            lambda chosen: similarity.tables(similarity.bench(chosen, scale=scale, repeats=repeats)),
        ),
    ]
    for names_of_bench, make_tables in benches:
        if chosen := [name for name in names_of_bench if name in names]:
            for table in make_tables(chosen):
                console.print(table)


if __name__ == "__main__":
    from pipelines.bench import __main__ as bench  # by its real name

    command.main(bench.command_line)
