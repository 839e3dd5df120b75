"""Runs every benchmark: python -m pipelines.bench --run runs/demo --data data/demo

Two tables are of the demo that `make curate` wrote. `copies` adds tables of photographs from Debian packages, and
`copies-speed` is of small pictures from there. The next ones are of drawn photographs (decoding.py, embedding.py,
crops.py, training.py), of workers, tars and shards (scaling.py), and of drawn vectors (similarity.py). Each names the
works, the peers, the ratios and their targets; the first line has the machine and the date.
"""

import datetime
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from curation.engine import command
from curation.errors import InputError
from pipelines.bench import (
    copies,
    copy_pictures,
    copy_speed,
    crops,
    decoding,
    embedding,
    retrieval,
    scaling,
    similarity,
    training,
)

ALL = (
    retrieval.NAME,
    copies.NAME,
    copy_speed.NAME,
    decoding.NAME,
    embedding.NAME,
    *crops.TARGETS,
    training.NAME,
    *scaling.WORKS,
    *similarity.WORKS,
)
NAMES = ", ".join(ALL)
DRAWS = " or ".join(copy_pictures.DRAWS)
# A held-back draw is scored once, so only a run that names it measures it.
DEFAULT_DRAWS: tuple[copy_pictures.Name, ...] = ("development",)


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
    draws: Annotated[
        list[str] | None,
        typer.Option("--draw", help=f"Photographs of copies: {DRAWS}; repeatable. Default: development."),
    ] = None,
    sizes: Annotated[
        list[int] | None,
        typer.Option("--size", min=100, help="Number of pictures of copies-speed; repeatable. Default: 3000, 12000."),
    ] = None,
    packages: Annotated[
        Path | None, typer.Option("--packages", help="Folder with the .deb files of copies and copies-speed.")
    ] = None,
    fastdup: copies.FastdupOption = None,
    sheet: copies.SheetOption = None,
) -> None:
    """Run all benchmarks, or the named ones."""
    names = only or ALL
    if unknown := sorted(set(names) - set(ALL)):
        raise InputError(f"--only {unknown[0]}: there is no such benchmark. Choose from {NAMES}.")
    chosen_draws = choose_draws(draws)
    console = Console(highlight=False, width=copies.WIDTH)
    console.print(
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} processors, {platform.platform()}\n"
    )
    # Names with the function that makes the tables of the chosen ones.
    benches: list[tuple[Iterable[str], Callable[[list[str]], Iterable[Table]]]] = [
        ([retrieval.NAME], lambda _: [retrieval.table(retrieval.shares(run))]),
        (
            [copies.NAME],
            lambda _: copies.tables(run, data, chosen_draws, packages=packages, fastdup=fastdup, sheet=sheet),
        ),
        (
            [copy_speed.NAME],
            lambda _: [
                copy_speed.table(copy_speed.bench(sizes or list(copy_speed.SIZES), os.path.dirname(data), packages))
            ],
        ),
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


def choose_draws(names: Sequence[str] | None) -> list[copy_pictures.Name]:
    """The named draws of photographs, DEFAULT_DRAWS where none is named."""
    if unknown := sorted(set(names or ()) - set(copy_pictures.DRAWS)):
        raise InputError(f"--draw {unknown[0]}: there is no such draw. Choose {DRAWS}.")
    return [name for name in copy_pictures.DRAWS if name in (names or DEFAULT_DRAWS)]


if __name__ == "__main__":
    from pipelines.bench import __main__ as bench  # by its real name

    command.main(bench.command_line)
