"""Measures candidates of copies before any is verified: the share of copies that are proposed, and how many others.

    python -m pipelines.bench.copy_pictures --draw development --output draws/development
    python -m pipelines.bench.copy_proposals --draw draws/development --ingest RUN/ingest --describe RUN/describe

RUN is a run on the pictures of the draw. Two images are candidates where one is among the nearest descriptors of the
other, with a cosine from the floor, or where their perceptual hashes are near: as in curation/pairs.py. A copy counts
as proposed when it is a candidate of its original.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow.parquet as pq
import typer
from rich.console import Console
from rich.table import Table

from curation.copies.edits import KINDS
from curation.engine import command
from curation.errors import InputError
from curation.images.hashing import pairs_within
from curation.pairs import PairsConfig
from curation.run_folder import read_images, read_vectors
from pipelines.bench.copy_pictures import TABLE
from pipelines.bench.tables import make_table

FLOORS, NEIGHBORS = (0.25, 0.28, 0.32, 0.4, 0.5, 0.66), (16, 64)
ROWS_PER_BLOCK = 2048


def candidates(
    vectors: np.ndarray, hashes: np.ndarray, num_neighbors: int, floor: float, max_phash_distance: int
) -> np.ndarray:
    """The pairs (2, P) of rows, the smaller first, of unit vectors (N, D) and perceptual hashes (N,)."""
    size = len(vectors)
    pairs = [np.stack([one, other]) for one, other, _ in pairs_within(hashes, max_phash_distance)]
    for start in range(0, size, ROWS_PER_BLOCK):
        cosine = vectors[start : start + ROWS_PER_BLOCK] @ vectors.T
        rows = np.arange(len(cosine))
        cosine[rows, start + rows] = -2  # an image is not its neighbour
        count = min(num_neighbors, size - 1)
        nearest = np.argpartition(-cosine, count - 1, axis=1)[:, :count]
        row, position = np.nonzero(np.take_along_axis(cosine, nearest, axis=1) >= floor)
        pairs.append(np.stack([row + start, nearest[row, position]]))
    return np.unique(np.sort(np.concatenate(pairs, axis=1), axis=0), axis=1)


def shares_proposed(pairs: np.ndarray, copies: Sequence[tuple[int, int, str]]) -> dict[str, float]:
    """By kind of edit and for "all", the share of `copies` (row, row of the original, kind) that are among `pairs`."""
    proposed = set(zip(*pairs.tolist(), strict=True))
    hits: dict[str, list[bool]] = {}
    for row, original, kind in copies:
        is_proposed = (min(row, original), max(row, original)) in proposed
        for name in ("all", kind):
            hits.setdefault(name, []).append(is_proposed)
    return {kind: sum(values) / len(values) for kind, values in hits.items()}


def measure(draw: Path, ingest: str, describe: str) -> Table:
    """The table of all NEIGHBORS and FLOORS. Raises InputError where the run lacks images of the draw."""
    rows = pq.read_table(draw / TABLE, columns=["image_id", "original_image_id", "is_copy", "kind"]).to_pylist()
    table = read_images(ingest, ["image_id", "phash"])
    hash_of = dict(zip(table["image_id"].to_pylist(), table["phash"].to_pylist(), strict=True))
    vector_of: dict[str, np.ndarray] = {}
    for image_ids, matrix in read_vectors(describe):
        vector_of.update(zip(image_ids, matrix.astype(np.float32), strict=True))
    if missing := [row["image_id"] for row in rows if row["image_id"] not in vector_of.keys() & hash_of.keys()]:
        raise InputError(f"{len(missing)} images of '{draw}' are not in the run, such as {missing[0]}.")
    row_of = {image_id: row for row, image_id in enumerate(sorted(vector_of))}
    vectors = np.stack([vector_of[image_id] for image_id in row_of])
    hashes = np.array([hash_of[image_id] for image_id in row_of], np.uint64)
    copies = [(row_of[r["image_id"]], row_of[r["original_image_id"]], r["kind"]) for r in rows if r["is_copy"]]
    bits = PairsConfig().max_phash_distance
    kinds = [kind for kind in KINDS if kind in {kind for *_, kind in copies}]
    title = f"Share of {len(copies):,} copies that are candidates of their original, of {len(row_of):,} images"
    result = make_table(title, ("neighbours", "floor", "an image", "all", *kinds), left=())
    for num_neighbors in NEIGHBORS:
        for floor in FLOORS:
            pairs = candidates(vectors, hashes, num_neighbors, floor, bits)
            shares = shares_proposed(pairs, copies)
            cells = [f"{shares[name]:.2f}" for name in kinds]
            per_image = f"{pairs.shape[1] / len(row_of):.1f}"
            result.add_row(str(num_neighbors), f"{floor:g}", per_image, f"{shares['all']:.3f}", *cells)
    return result


def command_line(
    draw: Annotated[Path, typer.Option("--draw", help="Folder that copy_pictures made.")],
    ingest: Annotated[str, typer.Option("--ingest", help="Folder of the finished ingest of its pictures.")],
    describe: Annotated[str, typer.Option("--describe", help="Folder of their descriptors.")],
) -> None:
    """Measure the candidates of copies on a draw of photographs."""
    Console(highlight=False, width=240).print(measure(draw, ingest, describe))


if __name__ == "__main__":
    from pipelines.bench import copy_proposals  # by its real name: otherwise each class would exist twice

    command.main(copy_proposals.command_line)
