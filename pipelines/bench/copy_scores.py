"""Scores copy detection on a draw of photographs (copy_pictures.py): a finished run, or a detector with a threshold.

A copy is found when its component holds its original; a copy of a holdout image, when the run dropped it as such.
Images of different pictures in one component are false pairs, unless near_duplicates.toml names the pictures. They are
counted as the fewest pairs that join the pictures of a component:

    component    pictures A A B C       2 false pairs      (A-B, B-C)
                 A A A                  none
                 A B, near-duplicates   none

A detector gives a similarity of each pair of images. At a threshold, its components are those of all pairs above.
`sweep` follows all thresholds, so detectors are compared at equal numbers of false pairs and at equal recall.

Legend: N files of the draw, C copies.
"""

import dataclasses
import functools
import itertools
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from scipy.sparse.csgraph import minimum_spanning_tree

from curation.copies.components import connected_components
from curation.copies.edits import KINDS
from curation.engine.manifest import require_manifest
from curation.errors import InputError
from curation.files import parquet, paths, schemas
from curation.run_folder import read_corpus, read_images
from pipelines.bench.copy_pictures import COPIES, TABLE

NEAR_DUPLICATES = Path(__file__).with_name("near_duplicates.toml")
ALL = "all"
COLUMNS = (*KINDS, ALL)


@dataclass(frozen=True)
class Truth:
    """What a draw holds; arrays have a value for each file."""

    folder: Path
    paths: list[str]
    """Below the folder."""
    image_ids: list[str]
    picture: np.ndarray
    """(N,) int64: the number of the picture that a file shows, edited or not."""
    picture_names: list[tuple[str, str]]
    """The package and the picture, by number."""
    alike: np.ndarray
    """(N,) int64: equal for pictures that are near-duplicates of one another."""
    original: np.ndarray
    """(N,) int64: the row of the original; of an original, its row."""
    kinds: list[str]
    roles: list[str]
    """Of the original."""

    @functools.cached_property
    def copies(self) -> np.ndarray:
        """(C,) the rows of the copies."""
        return np.flatnonzero(self.original != np.arange(len(self.original)))

    @functools.cached_property
    def row_of(self) -> dict[str, int]:
        """The row of each image."""
        return {image_id: row for row, image_id in enumerate(self.image_ids)}

    @property
    def num_pictures(self) -> int:
        """Number of distinct pictures."""
        return len(self.picture_names)

    def per_thousand(self, false_pairs: float) -> float:
        """False pairs for 1,000 distinct pictures."""
        return 1000 * false_pairs / self.num_pictures


@dataclass(frozen=True)
class Score:
    """The result of one detector, or of a run."""

    recall: Mapping[str, float]
    """By COLUMNS."""
    num_found: int
    false_pairs: int


@dataclass(frozen=True)
class RunScore(Score):
    """The result of a run."""

    candidates: int
    """Pairs that the run compared."""
    num_holdout_copies: int
    holdout_copies_kept: int
    """In the pool after dedup."""
    holdout_copies_packed: int
    """In the corpus."""
    num_packed: int
    """Images of the corpus."""
    packed_again: int
    """Images of the corpus beyond the first of each picture."""
    not_ingested: int
    """Files of the draw that the run rejected or never read."""


@dataclass(frozen=True)
class Decision:
    """Columns of schemas.DUPLICATES."""

    image_id: str
    component_id: str
    reason: str | None
    matched_image_id: str | None
    similarity: float | None


@dataclass(frozen=True)
class Point:
    """A detector at one threshold."""

    threshold: float
    num_found: int
    false_pairs: int


@dataclass(frozen=True)
class Tree:
    """The pairs that decide the components of a detector at every threshold: a maximum spanning forest."""

    first: np.ndarray
    second: np.ndarray
    similarity: np.ndarray
    """Falling."""


def read_truth(folder: Path, labels: Path = NEAR_DUPLICATES) -> Truth:
    """The table of a draw, with the near-duplicates that people named.

    Raises InputError where `folder` is no draw.
    """
    if not (folder / TABLE).is_file():
        raise InputError(
            f"'{folder}' is no draw: it has no {TABLE}. Make one with python -m pipelines.bench.copy_pictures."
        )
    rows = parquet.read_table(str(folder / TABLE), COPIES).to_pylist()
    names = sorted({(row["package"], row["picture"]) for row in rows})
    number = {name: index for index, name in enumerate(names)}
    row_of = {row["path"]: index for index, row in enumerate(rows)}
    groups = tomllib.loads(labels.read_text())["groups"]
    members = [
        [number[key] for name in group["pictures"] if (key := (group["package"], name)) in number] for group in groups
    ]
    ends = [(one, other) for group in members for one, other in itertools.pairwise(group)]
    first, second = np.array(ends, np.int64).reshape(-1, 2).T
    alike = connected_components(len(names), [(first, second)])
    picture = np.array([number[row["package"], row["picture"]] for row in rows])
    return Truth(
        folder=folder,
        paths=[row["path"] for row in rows],
        image_ids=[row["image_id"] for row in rows],
        picture=picture,
        picture_names=names,
        alike=alike[picture].astype(np.int64),
        original=np.array([row_of[row["original_path"]] for row in rows]),
        kinds=[row["kind"] for row in rows],
        roles=[row["role"] for row in rows],
    )


def score(truth: Truth, component: np.ndarray, is_found: np.ndarray | None = None) -> Score:
    """The score of components, (N,) int64. `is_found` (C,) replaces the test of the components."""
    copies = truth.copies
    if is_found is None:
        is_found = component[copies] == component[truth.original[copies]]
    hits, counts = Counter[str](), Counter[str]()
    for row, hit in zip(copies.tolist(), is_found.tolist(), strict=True):
        for column in (truth.kinds[row], ALL):
            counts[column] += 1
            hits[column] += hit
    # Distinct pictures of each component, less one each; pictures that are alike count as one.
    num_shown = len(np.unique(np.stack([component, truth.alike]), axis=1).T)
    false_pairs = num_shown - len(np.unique(component))
    recall = {column: hits[column] / counts[column] if counts[column] else float("nan") for column in COLUMNS}
    return Score(recall=recall, num_found=hits[ALL], false_pairs=false_pairs)


def score_run(truth: Truth, run: str) -> RunScore:
    """The score of a finished run on the files of the draw.

    An image that was dropped for another one is joined with it, so a false match with the holdout is a false pair too.
    """
    num_files = len(truth.image_ids)
    # Nodes: the files, then the components of the run.
    number: dict[str, int] = {}
    ends: list[tuple[int, int]] = []
    reason: dict[int, str | None] = {}
    for decision in read_decisions(run):
        if (row := truth.row_of.get(decision.image_id)) is None:
            raise InputError(f"The run '{run}' has the image {decision.image_id}, which '{truth.folder}' lacks.")
        component = number.setdefault(decision.component_id, num_files + len(number))
        ends.append((row, component))
        if decision.matched_image_id is not None:
            ends.append((row, truth.row_of[decision.matched_image_id]))
        reason[row] = decision.reason
    first, second = np.array(ends, np.int64).reshape(-1, 2).T
    component_of = connected_components(num_files + len(number), [(first, second)])[:num_files].astype(np.int64)
    is_found = component_of[truth.copies] == component_of[truth.original[truth.copies]]
    of_holdout = np.array([truth.roles[row] == "holdout" for row in truth.copies])
    is_found[of_holdout] = [reason.get(row) == "holdout" for row in truth.copies[of_holdout]]
    holdout_copies = truth.copies[of_holdout].tolist()
    packed = {truth.row_of[image_id] for image_id in read_corpus(paths.join(run, "corpus"))["image_id"].to_pylist()}
    result = score(truth, component_of, is_found)
    return RunScore(
        recall=result.recall,
        num_found=result.num_found,
        false_pairs=result.false_pairs,
        candidates=require_manifest(paths.join(run, "pairs")).totals["candidates"],
        num_holdout_copies=len(holdout_copies),
        holdout_copies_kept=sum(row in reason and reason[row] is None for row in holdout_copies),
        holdout_copies_packed=sum(row in packed for row in holdout_copies),
        num_packed=len(packed),
        packed_again=len(packed) - len({int(truth.picture[row]) for row in packed}),
        not_ingested=num_files - len(reason),
    )


def read_decisions(run: str) -> list[Decision]:
    """The decision of a run on each image."""
    folder = paths.join(run, "dedup")
    columns = [field.name for field in dataclasses.fields(Decision)]
    tables = (
        parquet.read_table(file, schemas.DUPLICATES, columns)
        for file in require_manifest(folder).paths(folder, "duplicates")
    )
    return [Decision(**row) for row in pa.concat_tables(tables).to_pylist()]


def phash_of(run: str) -> dict[str, int]:
    """The perceptual hash of each image of a run."""
    table = read_images(paths.join(run, "ingest"), ["image_id", "phash"])
    return dict(zip(table["image_id"].to_pylist(), table["phash"].to_pylist(), strict=True))


def spanning_tree(similarity: np.ndarray) -> Tree:
    """The maximum spanning forest of similarities (N, N). Pairs at -inf are left out."""
    finite = np.isfinite(similarity)
    most = similarity[finite].max()
    # A distance of 0 means no edge in scipy's dense form, so the least distance is 1.
    distance = np.where(finite, most - similarity + 1.0, 0.0)
    np.fill_diagonal(distance, 0)
    tree = minimum_spanning_tree(np.maximum(distance, distance.T)).tocoo()
    order = np.argsort(tree.data, kind="stable")
    first, second = tree.row[order], tree.col[order]
    return Tree(first, second, similarity[first, second])


def components_at(tree: Tree, num_files: int, threshold: float) -> np.ndarray:
    """The component of each file, (N,), where all pairs at or above `threshold` are joined."""
    chosen = tree.similarity >= threshold
    return connected_components(num_files, [(tree.first[chosen], tree.second[chosen])]).astype(np.int64)


def sweep(truth: Truth, tree: Tree) -> list[Point]:
    """The result at every threshold that changes a component, by falling threshold."""
    num_files = len(truth.image_ids)
    root = np.arange(num_files)
    members = [[row] for row in range(num_files)]
    shown = [{int(group)} for group in truth.alike]
    copies_of: list[list[int]] = [[] for _ in range(num_files)]
    for row in truth.copies.tolist():
        copies_of[truth.original[row]].append(row)
    num_found = false_pairs = 0
    points: list[Point] = []
    edges = zip(tree.first.tolist(), tree.second.tolist(), tree.similarity.tolist(), strict=True)
    for first, second, similarity in edges:
        small, large = sorted((root[first], root[second]), key=lambda node: len(members[node]))
        for row in members[small]:
            num_found += root[truth.original[row]] == large
            num_found += sum(root[copy] == large for copy in copies_of[row])
        false_pairs += len(shown[small] | shown[large]) - len(shown[small]) - len(shown[large]) + 1
        root[members[small]] = large
        members[large] += members[small]
        shown[large] |= shown[small]
        if points and points[-1].threshold == similarity:
            points.pop()
        points.append(Point(similarity, int(num_found), false_pairs))
    return points


def at_false_pairs(points: Sequence[Point], most: int) -> Point | None:
    """The lowest threshold with at most that many false pairs; None where every threshold has more."""
    allowed = [point for point in points if point.false_pairs <= most]
    return max(allowed, key=lambda point: point.num_found) if allowed else None


def at_recall(points: Sequence[Point], least: int) -> Point | None:
    """The highest threshold that finds that many copies; None where no threshold does."""
    return next((point for point in points if point.num_found >= least), None)
