"""Nearest neighbours among the vectors of a few cells (inverted lists), approximately. The only door to faiss.

Legend: Q queries, N vectors, D dimensions, K neighbours, P probes. Vectors are unit length: inner product is cosine.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np

from curation.errors import ConfigError
from curation.search import low_precision
from curation.search.config import GPU_MAX_SELECTION, SearchConfig
from curation.search.exact import BLOCK_ROWS, codes_of, pair_similarity
from curation.search.top_k import merge_into_best, rank_by_similarity

# Cells that vectors are compared with at a time. Assumed.
CELLS_PER_TILE = 8192
# Pairs that wait for their scores in a search by cells: 70 MB. Assumed.
WAITING_PAIRS = 2**20
# Vectors per cell that the cells are trained on, and their rounds. faiss asks for 39 to 256; the recall that every run
# measures says whether it is enough.
TRAINING_ROWS_PER_CELL = 48
TRAINING_ITERATIONS = 8
# Vectors that product quantization is trained on at least: 256 for each of its 256 codes, as faiss does.
PQ_TRAINING_ROWS = 65_536


def cells_of(vectors: np.ndarray, cells: np.ndarray, num_probes: int, *, device: str = "cpu") -> np.ndarray:
    """The `num_probes` cells that each of `vectors` (N, D) visits, (N, P) int64, the nearest first.

    `cells` (K, D) are unit vectors, at least `num_probes`. Compared by int8 codes, so nearly equal ones may come in the
    wrong order, but in the same order on every machine.
    """
    cells = np.ascontiguousarray(cells, dtype=np.float32)
    codes = low_precision.whole_number_codes(cells, device)
    step = CELLS_PER_TILE
    tiles = [codes.take(np.arange(start, min(start + step, len(cells)))) for start in range(0, len(cells), step)]
    visits = np.empty((len(vectors), num_probes), np.int64)
    step = low_precision.QUERY_ROWS[low_precision.device_kind(device)]
    for start in range(0, len(vectors), step):
        own = low_precision.to_float32(vectors[start : start + step])
        visits[start : start + step] = low_precision.nearest_by_codes(own, tiles, num_probes)
    return visits


@dataclass(frozen=True)
class CellLists:
    """Which rows are in which cells: the pairs of a row and a cell, sorted by cell, then by row."""

    rows: np.ndarray  # (P,) int64
    starts: np.ndarray  # (cells + 1,) int64

    @classmethod
    def of(cls, rows: np.ndarray, cells: np.ndarray, num_cells: int) -> "CellLists":
        """From pairs (P,) of rows and cells in any order."""
        order = np.lexsort((rows, cells))
        return cls(rows[order], np.searchsorted(cells[order], np.arange(num_cells + 1)))

    def of_cell(self, cell: int) -> np.ndarray:
        """The rows of one cell, ascending."""
        return self.rows[self.starts[cell] : self.starts[cell + 1]]


def search_cells(
    queries: np.ndarray,
    queries_in: Sequence[CellLists],
    vectors: np.ndarray,
    vectors_in: CellLists,
    k: int,
    *,
    floor: float = -np.inf,
    device: str = "cpu",
) -> tuple[np.ndarray, np.ndarray]:
    """The `k` vectors nearest to each query among those that share a cell with it, as `search` gives them.

    `queries` (Q, D) and `vectors` (N, D) are float16 or float32 and in memory, with a `floor` beside one byte a value
    of codes. The visits of `queries_in` are made one after another: when the first is to the nearest cell, what is
    there is a floor that leaves few candidates in all others. A pair may share one cell at most.
    """
    kind = low_precision.device_kind(device)
    vector_codes = None
    if floor == -np.inf:  # candidates are then all that are about as near as the k-th: hundreds, by coarse codes
        query_codes = low_precision.encode_finely(queries, device)
    else:
        vector_codes = codes_of(vectors, device)
        query_codes = vector_codes if queries is vectors else codes_of(queries, device)
    shortlist = _Shortlist(queries, vectors, k, floor)
    for visits, cell in itertools.product(queries_in, range(len(vectors_in.starts) - 1)):
        asking, members = visits.of_cell(cell), vectors_in.of_cell(cell)
        for first in range(0, len(members) if len(asking) else 0, low_precision.CELL_ROWS[kind]):
            rows = members[first : first + low_precision.CELL_ROWS[kind]]
            tile = (
                vector_codes.take(rows)
                if vector_codes
                else low_precision.encode_finely(_rows_of(vectors, rows), device)
            )
            for start in range(0, len(asking), low_precision.QUERY_ROWS[kind]):
                own = asking[start : start + low_precision.QUERY_ROWS[kind]]
                estimates = low_precision.estimate(query_codes.take(own), tile)
                least = shortlist.floor[own]
                if np.isneginf(least).any():
                    least = shortlist.floor[own] = np.maximum(least, estimates.floor(k))
                query, place, value = estimates.candidates(least)
                shortlist.add(own[query], rows[place], value, estimates.slack)
    shortlist.settle()
    return shortlist.similarity, shortlist.row


def _rows_of(matrix: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Some rows, ascending; a view where they follow one another."""
    first, last = int(rows[0]), int(rows[-1])
    return matrix[first : last + 1] if last - first == len(rows) - 1 else matrix[rows]


class _Shortlist:
    """The `k` nearest vectors found so far for each query, and pairs that may be nearer, which wait for their scores.

    To rank and score a few pairs takes nearly as long as many, so those of many cells wait for one another. What is
    found does not depend on when they are settled, nor on the order in which they come.
    """

    def __init__(self, queries: np.ndarray, vectors: np.ndarray, k: int, floor: float) -> None:
        self._queries, self._vectors, self._k, self._least = queries, vectors, k, floor
        self.similarity = np.full((len(queries), k), -np.inf, np.float32)
        self.row = np.full((len(queries), k), -1, np.int64)
        self.floor = np.full(len(queries), floor, np.float64)  # what is below is no candidate
        self._waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._num_waiting, self._slack = 0, 0.0

    def add(self, query: np.ndarray, row: np.ndarray, estimate: np.ndarray, slack: np.ndarray) -> None:
        """Pairs (P,), none of which came before, and their similarities within `slack` (any shape)."""
        self._waiting.append((query, row, estimate.astype(np.float32)))
        self._num_waiting += len(query)
        self._slack = max(self._slack, float(slack.max(initial=0)))
        if self._num_waiting >= WAITING_PAIRS:
            self.settle()

    def settle(self) -> None:
        """Score what waits."""
        if not self._num_waiting:
            return
        query, row, estimate = (np.concatenate(column) for column in zip(*self._waiting, strict=True))
        self._waiting.clear()
        self._num_waiting = 0
        order = np.argsort(query, kind="stable")
        query, row, estimate = query[order], row[order], estimate[order]
        step = low_precision.QUERY_ROWS["cpu"]
        for first in range(0, len(self._queries), step):
            begin, end = np.searchsorted(query, (first, first + step))
            if begin < end:
                part = slice(first, first + step)
                self._settle(part, query[begin:end] - first, row[begin:end], estimate[begin:end])

    def _settle(self, part: slice, query: np.ndarray, row: np.ndarray, estimate: np.ndarray) -> None:
        similarity, best_row, floor = self.similarity[part], self.row[part], self.floor[part]
        # What k pairs of a query reach for certain leaves few to be scored.
        known = np.flatnonzero(best_row.reshape(-1) >= 0)
        queries = np.concatenate([known // self._k, query])
        certain = np.concatenate([similarity.reshape(-1)[known], estimate - np.float32(self._slack)])
        order, rank = rank_by_similarity(queries, certain)
        kth = order[rank == self._k - 1]
        floor[queries[kth]] = np.maximum(floor[queries[kth]], certain[kth])
        chosen = estimate + self._slack >= floor[query]
        query, row = query[chosen], row[chosen]
        score = pair_similarity(self._queries[part], query, self._vectors, row)
        reached = score >= self._least
        merge_into_best(similarity, best_row, query[reached], row[reached], score[reached])
        np.maximum(floor, similarity[:, -1], out=floor)


class CodedLists:
    """faiss's inverted lists of product quantization codes over `vectors` (N, D) float16, which score anew.

    faiss trains on a sample and holds `config.pq_bytes` a vector; float32 is needed for BLOCK_ROWS rows at a time, and
    for the sample. Raises ConfigError when `pq_bytes` does not divide D.
    """

    def __init__(self, vectors: np.ndarray, config: SearchConfig) -> None:
        self._vectors, self._config = vectors, config
        num_cells = min(config.num_cells(len(vectors)), len(vectors))
        width = vectors.shape[1]
        if width % config.pq_bytes:
            raise ConfigError(
                f"search.pq_bytes is {config.pq_bytes}, which does not divide the vectors' width of {width}; "
                "choose a divisor."
            )
        quantizer = faiss.IndexFlatIP(width)
        built: Any = faiss.IndexIVFPQ(quantizer, width, num_cells, config.pq_bytes, 8, faiss.METRIC_INNER_PRODUCT)
        for training in (built.cp, built.pq.cp):
            training.seed = config.seed
            training.min_points_per_centroid = 1  # faiss would print a warning for each; the recall is measured
        every = max(1, len(vectors) // max(TRAINING_ROWS_PER_CELL * num_cells, PQ_TRAINING_ROWS))
        if config.device != "cpu":
            built = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, built)
        built.train(low_precision.to_float32(vectors[::every]))
        for start in range(0, len(vectors), BLOCK_ROWS):
            built.add(low_precision.to_float32(vectors[start : start + BLOCK_ROWS]))
        built.nprobe = min(config.num_probes, num_cells)
        self._built, self._quantizer = built, quantizer  # faiss does not keep the quantizer alive

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The `k` nearest to each of `queries` (Q, D) among `config.overfetch` times as many by their codes.

        As `search` gives them. Raises ConfigError when a GPU cannot select so many.
        """
        fetched = min(self._config.overfetch * k, len(self._vectors))
        if self._config.device != "cpu" and fetched > GPU_MAX_SELECTION:
            raise ConfigError(
                f"search.overfetch times k is {fetched}; faiss on a GPU takes {GPU_MAX_SELECTION} at most."
            )
        best_similarity = np.full((len(queries), k), -np.inf, np.float32)
        best_row = np.full((len(queries), k), -1, np.int64)
        for start in range(0, len(queries), BLOCK_ROWS):
            own = queries[start : start + BLOCK_ROWS]
            rows = self._built.search(low_precision.to_float32(own), fetched)[1]
            query, column = np.nonzero(rows >= 0)  # short lists are filled with -1
            row = rows[query, column]
            score = pair_similarity(own, query, self._vectors, row)
            part = slice(start, start + len(own))
            merge_into_best(best_similarity[part], best_row[part], query, row, score)
        return best_similarity, best_row
