"""Rows and tables of benchmarks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.table import Table


@dataclass(frozen=True)
class Comparison:
    """One work, done by our code and by a peer. A value that does not apply is NaN."""

    work: str
    peer: str
    unit: Literal["s", "/s"]
    """Of both values: seconds, or images per second."""
    our_value: float
    peer_value: float
    target: str
    """The ratio to reach."""
    quality: str
    """Recall, objective or agreement, with its target."""
    ratio: float
    """How many times faster our code is, unless the work says otherwise."""
    peak_bytes: float = math.nan
    """Of our process, beyond its memory before the work."""
    input_bytes: float = math.nan
    """On disk."""


def comparison_table(title: str, rows: Sequence[Comparison], *, caption: str | None = None) -> Table:
    """A row for each comparison. All rows have the same unit. Columns without any value are left out."""
    unit = {row.unit for row in rows}.pop()
    columns = {
        "work": [row.work for row in rows],
        "peer": [row.peer for row in rows],
        f"ours, {unit}": [number(row.our_value, _digits(unit)) for row in rows],
        f"peer, {unit}": [number(row.peer_value, _digits(unit)) for row in rows],
        "ratio": [number(row.ratio, ".2f") for row in rows],
        "target": [row.target for row in rows],
        "quality (target)": [row.quality for row in rows],
        "peak MB": [number(row.peak_bytes / 1e6, ",.0f") for row in rows],
        "on disk MB": [number(row.input_bytes / 1e6, ",.0f") for row in rows],
    }
    columns = {name: cells for name, cells in columns.items() if set(cells) - {"-"}}
    table = make_table(title, columns, left=("work", "peer", "quality (target)"), caption=caption)
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    return table


def make_table(
    title: str, columns: Sequence[str] | dict[str, list[str]], *, left: Sequence[str] = (), caption: str | None = None
) -> Table:
    """An empty table; columns that `left` does not name are right-justified."""
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right")
    return table


def number(value: float, form: str) -> str:
    """The value in that format; a dash for NaN."""
    return "-" if math.isnan(value) else format(value, form)


def _digits(unit: str) -> str:
    return ".1f" if unit == "s" else ",.0f"
