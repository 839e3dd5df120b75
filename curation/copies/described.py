"""The described images of a run, row by row: their descriptors and thumbnails, and the comparison of their pairs."""

import functools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from curation.copies import holdout_pairs
from curation.copies.compare_drawings import DrawingComparer
from curation.copies.compare_photographs import PhotographComparer
from curation.copies.compare_thumbnails import Comparer, VerificationConfig
from curation.files import npy, parquet, schemas, vectors
from curation.files.image_ids import id_bytes
from curation.search import exact

# Prepared thumbnails that a worker keeps in memory, each up to 0.6 MB. Assumed: a shard rarely needs more, because its
# pairs are sorted by their first image.
CACHED_THUMBNAILS = 1500
# Features of photographs that a worker keeps beyond them where no step has computed features: 0.3 GB. Assumed.
CACHED_FEATURES = 8000


class DescribedRows:
    """The rows of a finished describe, numbered through all files, as the column `place` of self_join.PAIRED is.

    Legend: N unique images, P pairs.
    """

    def __init__(self, files: Sequence[str], thumbnail_files: Sequence[str]) -> None:
        self._files, self._thumbnail_files = files, thumbnail_files
        self._starts = np.cumsum([0, *(vectors.num_rows(file) for file in files)])
        self.count = int(self._starts[-1])

    def unique_ids(self) -> tuple[np.ndarray, np.ndarray]:
        """All ids (N,), ascending, as bytes, and the first row of each, (N,)."""
        columns = [parquet.read_table_columns(file, ["image_id"]).column(0) for file in self._files]
        ids, first_row = np.unique(np.concatenate([id_bytes(column) for column in columns]), return_index=True)
        return ids, first_row

    def cosine(self, rows: np.ndarray, is_needed: np.ndarray) -> np.ndarray:
        """The cosines (P,) of the descriptors in `rows` (2, P) where `is_needed` (P,) is true, else 0."""
        result = np.zeros(rows.shape[1], np.float32)
        if is_needed.any():
            unique_rows, pair = np.unique(rows[:, is_needed], return_inverse=True)
            matrix, pair = self.vectors(unique_rows), pair.reshape(2, -1)
            result[is_needed] = exact.pair_similarity(matrix, pair[0], matrix, pair[1])
        return result

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """The descriptors (R, D) float16 of `rows` (R,), in their order; (0, 1) for no row."""
        if not len(rows):
            return np.empty((0, 1), np.float16)
        unique_rows, position = np.unique(rows, return_inverse=True)
        by_file = _by_file(self._files, self._starts, unique_rows)
        return np.concatenate([vectors.read_file(file)[1][rows_in_file] for file, rows_in_file, _ in by_file])[position]

    def ids(self, rows: np.ndarray) -> dict[int, str]:
        """The image_id of each of the `rows`, in any shape."""
        id_of_row: dict[int, str] = {}
        for file, rows_in_file, file_rows in _by_file(self._files, self._starts, np.unique(rows)):
            column = parquet.read_table_columns(file, ["image_id"]).column(0).take(pa.array(rows_in_file))
            id_of_row.update(zip(file_rows.tolist(), column.to_pylist(), strict=True))
        return id_of_row

    def thumbnails(self, rows: np.ndarray) -> dict[int, bytes]:
        """The thumbnail of each of the `rows`, in any shape."""
        thumbnail_of_row: dict[int, bytes] = {}
        for file, rows_in_file, file_rows in _by_file(self._thumbnail_files, self._starts, np.unique(rows)):
            column = parquet.read_table(file, schemas.THUMBNAILS).column("thumbnail").take(pa.array(rows_in_file))
            thumbnail_of_row.update(zip(file_rows.tolist(), column.to_pylist(), strict=True))
        return thumbnail_of_row


class FeatureRows:
    """The records of a finished step `features`, numbered as DescribedRows."""

    def __init__(self, files: Sequence[str]) -> None:
        self._files = files
        self._starts: np.ndarray | None = None

    def read(self, rows: np.ndarray) -> dict[int, np.void]:
        """The record of each of the `rows`, in any shape."""
        if self._starts is None:
            self._starts = np.cumsum([0, *(npy.num_rows(file) for file in self._files)])
        records: dict[int, np.void] = {}
        for file, rows_in_file, file_rows in _by_file(self._files, self._starts, np.unique(rows)):
            records.update(zip(file_rows.tolist(), npy.read_rows(file, rows_in_file), strict=True))
        return records


def _by_file(
    files: Sequence[str], starts: np.ndarray, rows: np.ndarray
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Each file that holds some of the ascending `rows`, with their numbers in the file and through all files."""
    bounds = np.searchsorted(rows, starts)
    for number in np.flatnonzero(np.diff(bounds)).tolist():
        file_rows = rows[bounds[number] : bounds[number + 1]]
        yield files[number], file_rows - starts[number], file_rows


class Verifier:
    """Compares the thumbnails of pairs. Keeps prepared thumbnails; the least recently used ones go first.

    features: the features of all rows, where a step has computed them; otherwise they are computed here.
    """

    def __init__(self, config: VerificationConfig, features: FeatureRows | None = None) -> None:
        self._comparer = make_comparer(config)
        self._features = features
        self._prepared: OrderedDict[int, Any] = OrderedDict()
        self._computed: OrderedDict[int, np.void] = OrderedDict()

    def compare(self, rows: np.ndarray, thumbnails: dict[int, bytes]) -> tuple[np.ndarray, np.ndarray]:
        """For each pair of `rows` (2, P) its similarity, (P,) float32, and whether it differs locally, (P,) bool.

        Pairs with equal first rows are compared at once, so they should follow one another.
        """
        known: dict[int, np.void] = {}
        if self._features is not None:
            prepared = np.fromiter(self._prepared, np.int64, len(self._prepared))
            known = self._features.read(np.setdiff1d(rows, prepared))
        similarity, differs_locally = np.zeros(rows.shape[1], np.float32), np.zeros(rows.shape[1], bool)
        starts = np.flatnonzero(np.diff(rows[0], prepend=-1))
        for start, end in zip(starts.tolist(), [*starts[1:].tolist(), rows.shape[1]], strict=True):
            others = [self._prepare(row, thumbnails, known) for row in rows[1, start:end].tolist()]
            one = self._prepare(int(rows[0, start]), thumbnails, known)
            likenesses = self._comparer.compare(one, others)
            similarity[start:end] = [likeness.similarity for likeness in likenesses]
            differs_locally[start:end] = [likeness.differs_locally for likeness in likenesses]
        return similarity, differs_locally

    def _prepare(self, row: int, thumbnails: dict[int, bytes], known: dict[int, np.void]) -> Any:
        if row in self._prepared:
            self._prepared.move_to_end(row)
            return self._prepared[row]
        features = known.get(row)
        if features is None and self._features is not None:  # it was forgotten within one call
            features = self._features.read(np.array([row]))[row]
        if features is None:
            features = self._computed.get(row)
        prepared = self._prepared[row] = self._comparer.prepare(thumbnails[row], features)
        if features is None and prepared.features is not None:
            self._computed[row] = prepared.features
        for cache, most in ((self._prepared, CACHED_THUMBNAILS), (self._computed, CACHED_FEATURES)):
            if len(cache) > most:
                cache.popitem(last=False)
        return prepared


def make_comparer(config: VerificationConfig) -> Comparer:
    """The comparer of the domain. Raises DeviceError where OpenCV is not installed."""
    match config.domain:
        case "photographs":
            return PhotographComparer(config.working_side, forbid_differences=config.local_differences == "forbid")
        case "drawings":
            return DrawingComparer(config.working_side)


def make_loader(
    config: VerificationConfig, described_rows: DescribedRows, features: FeatureRows | None
) -> holdout_pairs.Loader:
    """Gives the comparison of some pairs of rows, with their thumbnails read at once."""
    verifier = Verifier(config, features)

    def load(rows: np.ndarray) -> holdout_pairs.Compare:
        return functools.partial(verifier.compare, thumbnails=described_rows.thumbnails(rows))

    return load
