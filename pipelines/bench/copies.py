"""Measures which copies each detector finds, and how many other pairs it joins: on drawings, and on photographs.

The demo's table, of drawings:

A planted copy counts as found when its pair with the original passes the detector's threshold. For the run's decision
it counts when both are in one component. Other pairs are of images outside the planted set; the pool holds true copies
among them.

The tables of photographs are of a draw of copy_pictures.py, which a run with the profile `photos` curates. They have
the peers of copy_peers.py on the same files; copy_scores.py defines the measures.

    python -m pipelines.bench.copies --score RUN --draw DRAW           of a finished run, without peers
"""

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from rich.console import Console
from rich.table import Table

from curation.copies.edits import KINDS
from curation.engine import command, progress
from curation.engine.manifest import require_manifest
from curation.files import parquet, paths, schemas
from curation.images.hashing import hamming_distance
from curation.run_folder import read_images, read_vectors
from pipelines.bench import copy_peers, copy_pictures, copy_scores, copy_sheet
from pipelines.bench.copy_scores import Score, Truth
from pipelines.bench.tables import make_table, number
from pipelines.curate import curate

NAME = "copies"
TRANSFORMS = ("jpeg", "resize", "colour", "mirror", "crop", "border", "overlay", "rotation")
OTHER_PAIRS = "other pairs"
FALSE_PAIRS = "false"
WIDTH = 220  # characters of a printed table: a column for each kind

FastdupOption = Annotated[
    Path | None, typer.Option("--fastdup", metavar="PYTHON", help="A Python where fastdup is installed.")
]
SheetOption = Annotated[
    Path | None, typer.Option("--sheet", metavar="FOLDER", help="New folder for pages of merged pairs.")
]


def comparison(run: str, data: str) -> dict[str, dict[str, float]]:
    """For each detector: the share of each transform's copies that it finds, and the number of other pairs."""
    planted = pq.read_table(paths.join(data, "planted.parquet")).to_pylist()
    phash = {
        row["image_id"]: row["phash"]
        for row in read_images(paths.join(run, "ingest"), ["image_id", "phash"]).to_pylist()
    }
    descriptor: dict[str, np.ndarray] = {}
    for image_ids, matrix in read_vectors(paths.join(run, "describe")):
        descriptor.update(zip(image_ids, matrix.astype(np.float32), strict=True))
    component = _components(run)
    copies = {row["copy_image_id"] for row in planted}
    others = sorted(set(phash) - copies)
    hashes = np.array([phash[image_id] for image_id in others], np.uint64)
    matrix = np.stack([descriptor[image_id] for image_id in others])

    result: dict[str, dict[str, float]] = {}
    for max_bits in (0, 4, 10):
        ends = [
            np.array([phash[row[end]] for row in planted], np.uint64) for end in ("copy_image_id", "original_image_id")
        ]
        is_found = (hamming_distance(ends[0], ends[1]) <= max_bits).tolist()
        distances = (hamming_distance(value, hashes[index + 1 :]) for index, value in enumerate(hashes))
        num_others = sum(int((distance <= max_bits).sum()) for distance in distances)
        result[f"pHash within {max_bits} bits"] = _shares(planted, is_found) | {OTHER_PAIRS: num_others}
    upper = np.triu(matrix @ matrix.T, 1)
    for min_cosine in (0.66, 0.8, 0.9, 0.95):
        is_found = [
            float(descriptor[row["copy_image_id"]] @ descriptor[row["original_image_id"]]) >= min_cosine
            for row in planted
        ]
        num_others = int((upper >= min_cosine).sum())
        result[f"descriptors of the run, cosine from {min_cosine:g}"] = _shares(planted, is_found) | {
            OTHER_PAIRS: num_others
        }
    is_found = [component[row["copy_image_id"]] == component[row["original_image_id"]] for row in planted]
    sizes = np.unique([component[image_id] for image_id in others], return_counts=True)[1]
    num_others = int((sizes - 1).sum())  # the fewest pairs that join the components of this run
    result["verified on thumbnails (the run)"] = _shares(planted, is_found) | {OTHER_PAIRS: num_others}
    return result


def table(shares_of_detector: dict[str, dict[str, float]]) -> Table:
    """The result of `comparison` as a table."""
    columns = ("detector", *TRANSFORMS, OTHER_PAIRS)
    result = make_table("Share of the planted copies that each detector finds", columns, left=("detector",))
    result.columns[0].no_wrap = True
    for detector, shares in shares_of_detector.items():
        cells = [f"{shares[transform]:.2f}" for transform in TRANSFORMS]
        result.add_row(detector, *cells, f"{shares[OTHER_PAIRS]:,.0f}")
    return result


def _components(run: str) -> dict[str, str]:
    folder = paths.join(run, "dedup")
    names = require_manifest(folder).files("duplicates")
    columns = ["image_id", "component_id"]
    table = pa.concat_tables(
        parquet.read_table(paths.join(folder, name), schemas.DUPLICATES, columns) for name in names
    )
    return dict(zip(*(table[column].to_pylist() for column in columns), strict=True))


def _shares(planted: list[dict[str, str]], is_found: list[bool]) -> dict[str, float]:
    shares = {}
    for transform in TRANSFORMS:
        hits = [hit for row, hit in zip(planted, is_found, strict=True) if row["transform"] == transform]
        shares[transform] = sum(hits) / len(hits)
    return shares


# Photographs


def tables(
    run: str,
    data: str,
    draws: Sequence[copy_pictures.Name],
    *,
    packages: Path | None = None,
    fastdup: Path | None = None,
    sheet: Path | None = None,
) -> Iterator[Table]:
    """The table of the demo's run, where there is one, and those of the draws, each as soon as it is measured.

    Draws are made beside the folder `data` of the demo.
    """
    if paths.exists(paths.join(run, "dedup")):
        yield table(comparison(run, data))
    else:
        progress.say(f"copies: no table of drawings, since there is no run of the demo at '{run}' (make curate)")
    for name in draws:
        pages = None if sheet is None else sheet / name
        yield from bench(name, os.path.dirname(data), packages=packages, fastdup=fastdup, sheet=pages)


def bench(
    name: copy_pictures.Name,
    data: str,
    *,
    packages: Path | None = None,
    fastdup: Path | None = None,
    sheet: Path | None = None,
) -> list[Table]:
    """The tables of a draw, which is made in the folder `data` where it is missing; its run is made anew.

    sheet: a folder for pages of merged pairs.
    """
    draw = Path(data) / f"bench-copies-{name}"
    if not (draw / copy_pictures.TABLE).exists():
        copy_pictures.run(name, draw, packages)
    run = draw.with_name(draw.name + "-run")
    shutil.rmtree(run, ignore_errors=True)
    parts = {part: str(draw / part) for part in ("seeds", "pool", "holdout")}
    # Frames of one film are among the pictures, so a source may look alike; the score counts what is dropped wrongly.
    overrides = ["dedup.lookalikes=drop"]
    curate(
        parts["seeds"], parts["pool"], holdout=parts["holdout"], output=str(run), profile="photos", overrides=overrides
    )
    return score_tables(draw, str(run), fastdup=fastdup, sheet=sheet)


def score_tables(
    draw: Path, run: str, *, peers: bool = True, fastdup: Path | None = None, sheet: Path | None = None
) -> list[Table]:
    """The tables of a finished run on a draw, with the peers on the same files."""
    truth = copy_scores.read_truth(draw)
    ours = copy_scores.score_run(truth, run)
    if sheet is not None:
        copy_sheet.write(truth, run, sheet)
    rows: list[tuple[str, Score]] = [("Seedbed", ours)]
    equal: list[list[str]] = []
    for detector in copy_peers.detectors(truth, run, fastdup) if peers else ():
        tree = copy_scores.spanning_tree(detector.similarity)
        points = copy_scores.sweep(truth, tree)
        for threshold in detector.usual:
            rows.append((_at(detector, threshold), _score_at(truth, tree, threshold)))
        same, reached = (
            copy_scores.at_false_pairs(points, ours.false_pairs),
            copy_scores.at_recall(points, ours.num_found),
        )
        cells = [detector.name]
        if same is None:
            cells += ["-", "0.000"]
        else:
            rows.append((f"{_at(detector, same.threshold)} *", _score_at(truth, tree, same.threshold)))
            cells += [_threshold(detector, same.threshold), f"{same.num_found / len(truth.copies):.3f}"]
        if reached is None:
            cells += ["-", "never"]
        else:
            cells += [_threshold(detector, reached.threshold), f"{truth.per_thousand(reached.false_pairs):.0f}"]
        equal.append(cells)
    tables = [_recall_table(truth, rows), _run_table(truth, ours)]
    if equal:
        tables.append(_equal_table(truth, ours, equal))
    return tables


def _score_at(truth: Truth, tree: copy_scores.Tree, threshold: float) -> Score:
    return copy_scores.score(truth, copy_scores.components_at(tree, len(truth.paths), threshold))


def _at(detector: copy_peers.Detector, threshold: float) -> str:
    return f"{detector.name}, {_threshold(detector, threshold)}"


def _threshold(detector: copy_peers.Detector, threshold: float) -> str:
    return f"{-threshold:.0f} bits" if detector.unit == "bits" else f"{threshold:.3f}"


def _recall_table(truth: Truth, rows: list[tuple[str, Score]]) -> Table:
    columns = ("detector", *copy_scores.COLUMNS, FALSE_PAIRS)
    counts = Counter(truth.kinds[row] for row in truth.copies)
    result = make_table(
        f"{truth.folder.name}: share of the copies in the component of their original",
        columns,
        left=("detector",),
        caption=f"{truth.num_pictures} pictures, {len(truth.copies):,} copies, {min(counts.values())} or more of each "
        f"kind. {FALSE_PAIRS}: false pairs for 1,000 distinct pictures. *: at no more false pairs than Seedbed.",
    )
    result.columns[0].no_wrap = True
    for name, score in rows:
        cells = [number(score.recall[column], ".2f") for column in KINDS]
        result.add_row(
            name, *cells, f"{score.recall[copy_scores.ALL]:.3f}", f"{truth.per_thousand(score.false_pairs):.1f}"
        )
    return result


def _summary(truth: Truth, score: Score) -> tuple[str, str]:
    return f"{score.recall[copy_scores.ALL]:.3f}", f"{truth.per_thousand(score.false_pairs):.1f}"


def _run_table(truth: Truth, ours: copy_scores.RunScore) -> Table:
    rows = {
        "copies of holdout images in the kept pool": (ours.holdout_copies_kept, ours.num_holdout_copies),
        "copies of holdout images in the corpus": (ours.holdout_copies_packed, ours.num_packed),
        "images of the corpus that show a picture once more": (ours.packed_again, ours.num_packed),
        "files that the run did not read": (ours.not_ingested, len(truth.paths)),
        "candidates compared": (ours.candidates, None),
        "false pairs": (ours.false_pairs, None),
    }
    result = make_table(f"{truth.folder.name}: the run", ("measure", "number", "of"), left=("measure",))
    for name, (count, total) in rows.items():
        result.add_row(name, f"{count:,}", "" if total is None else f"{total:,}")
    return result


def _equal_table(truth: Truth, ours: Score, rows: list[list[str]]) -> Table:
    result = make_table(
        f"{truth.folder.name}: peers at the false pairs, and at the recall, of Seedbed",
        ("detector", "threshold", "recall at equal false pairs", "threshold ", "false pairs / 1,000 at equal recall"),
        left=("detector",),
    )
    result.add_row(
        "Seedbed", "", f"{ours.recall[copy_scores.ALL]:.3f}", "", f"{truth.per_thousand(ours.false_pairs):.1f}"
    )
    for cells in rows:
        result.add_row(*cells)
    return result


def command_line(
    run: Annotated[str, typer.Option("--score", metavar="RUN", help="Folder of a finished run on the draw.")],
    draw: Annotated[Path, typer.Option("--draw", help="Folder of the draw.")],
    peers: Annotated[bool, typer.Option(help="Measure the other detectors too.")] = False,
    fastdup: FastdupOption = None,
    sheet: SheetOption = None,
) -> None:
    """Score a finished run on a draw of photographs."""
    console = Console(highlight=False, width=WIDTH)
    for table_ in score_tables(draw, run, peers=peers, fastdup=fastdup, sheet=sheet):
        console.print(table_)


if __name__ == "__main__":
    from pipelines.bench import copies  # by its real name: otherwise each class would exist twice

    command.main(copies.command_line)
