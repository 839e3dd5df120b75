"""Nearest neighbours among the vectors of a few cells (inverted lists), approximately. The only door to faiss.

Legend: Q queries, N vectors, D dimensions, K cells, P probes. Vectors have unit length: inner product is cosine.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np

from curation.errors import ConfigError, DeviceError
from curation.search import exact, kmeans, low_precision
from curation.search.config import GPU_MAX_SELECTION, SearchConfig
from curation.search.exact import BLOCK_ROWS
from curation.search.top_k import merge_into_best, rank_by_similarity

# Cells that vectors are compared with at a time. Assumed.
CELLS_PER_TILE = 8192
# Pairs that a search by cells gathers before it scores them: 70 MB. Assumed.
WAITING_PAIRS = 2**20
# Vectors per cell in the training of the cells, and iterations. Assumed: faiss asks for 39 to 256 vectors; the recall
# that every run measures shows whether they are enough.
TRAINING_ROWS_PER_CELL = 48
TRAINING_ITERATIONS = 8
# Minimum of vectors in the training of product quantization: 256 for each of its 256 codes, as in faiss. Cited.
PQ_TRAINING_ROWS = 65_536
# Codes of a product quantizer of 8 bits; its training needs as many vectors. Cited: faiss.
PQ_CODES = 256


def has_gpu_code() -> bool:
    """Whether the loaded faiss is a build for GPUs."""
    return "GPU" in faiss.get_compile_options().split()


def train_cells(sample: np.ndarray, num_cells: int, *, seed: int = 0) -> np.ndarray:
    """Unit centroids (K, D) float32 of at most `num_cells` cells, by a short k-means over `sample` (N, D)."""
    starts = range(0, len(sample), BLOCK_ROWS)
    return kmeans.fit(
        lambda: (sample[start : start + BLOCK_ROWS] for start in starts),
        min(num_cells, len(sample)),
        num_iterations=TRAINING_ITERATIONS,
        start="random",
        seed=seed,
    ).centroids


def cells_of(vectors: np.ndarray, cells: np.ndarray, num_probes: int, *, device: str = "cpu") -> np.ndarray:
    """The `num_probes` cells that each of `vectors` (N, D) visits, (N, P) int64, the nearest first.

    `cells` (K, D) are unit vectors, at least `num_probes`. They are compared by int8 codes: nearly equal cells may come
    in the wrong order, but in the same order on every machine.
    """
    cells = np.ascontiguousarray(cells, dtype=np.float32)
    codes = low_precision.whole_number_codes(cells, device)
    step = CELLS_PER_TILE
    tiles = [codes.take(np.arange(start, min(start + step, len(cells)))) for start in range(0, len(cells), step)]
    visits = np.empty((len(vectors), num_probes), np.int64)
    step = low_precision.QUERY_ROWS[low_precision.device_kind(device)]
    for start in range(0, len(vectors), step):
        part = slice(start, start + step)
        visits[part] = low_precision.nearest_by_codes(low_precision.to_float32(vectors[part]), tiles, num_probes)
    return visits


@dataclass(frozen=True)
class CellLists:
    """Which rows are in which cells: M pairs of a row and a cell, sorted by cell, then by row."""

    rows: np.ndarray  # (M,) int64
    starts: np.ndarray  # (K + 1,) int64

    @classmethod
    def of(cls, rows: np.ndarray, cells: np.ndarray, num_cells: int) -> "CellLists":
        """The lists of pairs (M,) of rows and cells in any order."""
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
    """The `k` vectors nearest to each query among the vectors that share a cell with it, as `exact.search` gives them.

    `queries` (Q, D) and `vectors` (N, D) are float16 or float32 and in memory. With a `floor`, their codes add one byte
    a value. The lists of `queries_in` are searched one after another: where the first holds the nearest cell of each
    query, its results give a floor that leaves few candidates in the other cells. A query and a vector may share at
    most one cell.
    """
    kind = low_precision.device_kind(device)
    vector_codes = None
    if floor == -np.inf:  # then every vector about as near as the k-th is a candidate: hundreds, with coarse codes
        query_codes = low_precision.encode_finely(queries, device)
    else:
        vector_codes = exact.codes_of(vectors, device)
        query_codes = vector_codes if queries is vectors else exact.codes_of(queries, device)
    shortlist = _Shortlist(queries, vectors, k, floor)
    for visits, cell in itertools.product(queries_in, range(len(vectors_in.starts) - 1)):
        visitors, members = visits.of_cell(cell), vectors_in.of_cell(cell)
        for first in range(0, len(members) if len(visitors) else 0, low_precision.CELL_ROWS[kind]):
            rows = members[first : first + low_precision.CELL_ROWS[kind]]
            tile = (
                vector_codes.take(rows)
                if vector_codes
                else low_precision.encode_finely(_rows_of(vectors, rows), device)
            )
            for start in range(0, len(visitors), low_precision.QUERY_ROWS[kind]):
                block = visitors[start : start + low_precision.QUERY_ROWS[kind]]
                estimates = low_precision.estimate(query_codes.take(block), tile)
                floors = shortlist.floor[block]
                if np.isneginf(floors).any():
                    floors = shortlist.floor[block] = np.maximum(floors, estimates.floor(k))
                query, member, value = estimates.candidates(floors)
                shortlist.add(block[query], rows[member], value, estimates.slack)
    shortlist.settle()
    return shortlist.similarity, shortlist.row


def _rows_of(matrix: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The given ascending rows of `matrix`; a view where they are consecutive."""
    first, last = int(rows[0]), int(rows[-1])
    return matrix[first : last + 1] if last - first == len(rows) - 1 else matrix[rows]


class _Shortlist:
    """The `k` nearest vectors so far of each query, and candidate pairs that wait to be scored.

    Ranking and scoring a few pairs takes nearly as long as many, so the pairs of many cells are scored together. The
    result depends neither on when they are scored nor on their order.
    """

    def __init__(self, queries: np.ndarray, vectors: np.ndarray, k: int, floor: float) -> None:
        self._queries, self._vectors, self._k, self._min_similarity = queries, vectors, k, floor
        self.similarity = np.full((len(queries), k), -np.inf, np.float32)
        self.row = np.full((len(queries), k), -1, np.int64)
        self.floor = np.full(len(queries), floor, np.float64)  # a pair below the floor of its query is no candidate
        self._waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._num_waiting, self._slack = 0, 0.0

    def add(self, query: np.ndarray, row: np.ndarray, estimate: np.ndarray, slack: np.ndarray) -> None:
        """Add new pairs (P,), each for the first time, with their similarities within `slack` (any shape)."""
        self._waiting.append((query, row, estimate.astype(np.float32)))
        self._num_waiting += len(query)
        self._slack = max(self._slack, float(slack.max(initial=0)))
        if self._num_waiting >= WAITING_PAIRS:
            self.settle()

    def settle(self) -> None:
        """Score the waiting pairs."""
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
        # k pairs of a query certainly reach a similarity, which as a floor leaves few pairs to be scored.
        known = np.flatnonzero(best_row.reshape(-1) >= 0)
        queries = np.concatenate([known // self._k, query])
        certain = np.concatenate([similarity.reshape(-1)[known], estimate - np.float32(self._slack)])
        order, rank = rank_by_similarity(queries, certain)
        kth = order[rank == self._k - 1]
        floor[queries[kth]] = np.maximum(floor[queries[kth]], certain[kth])
        chosen = estimate + self._slack >= floor[query]
        query, row = query[chosen], row[chosen]
        score = exact.pair_similarity(self._queries[part], query, self._vectors, row)
        reached = score >= self._min_similarity
        merge_into_best(similarity, best_row, query[reached], row[reached], score[reached])
        np.maximum(floor, similarity[:, -1], out=floor)


class CodedLists:
    """faiss's inverted lists of product quantization codes of `vectors` (N, D) float16, whose results are scored again.

    faiss trains on a sample and holds `config.pq_bytes` a vector. float32 copies are made of the sample, and of
    BLOCK_ROWS rows at a time. Raises ConfigError when `pq_bytes` does not divide D.
    """

    def __init__(self, vectors: np.ndarray, config: SearchConfig, *, seed: int = 0) -> None:
        self._vectors, self._config = vectors, config
        num_cells = min(config.num_cells(len(vectors)), len(vectors))
        width = vectors.shape[1]
        if width % config.pq_bytes:
            raise ConfigError(
                f"search.pq_bytes is {config.pq_bytes}, which does not divide the vectors' width of {width}; "
                "choose a divisor."
            )
        quantizer = faiss.IndexFlatIP(width)
        index: Any = faiss.IndexIVFPQ(quantizer, width, num_cells, config.pq_bytes, 8, faiss.METRIC_INNER_PRODUCT)
        for training in (index.cp, index.pq.cp):
            training.seed = seed
            training.min_points_per_centroid = 1  # or faiss prints a warning; the recall is measured anyway
        every = max(1, len(vectors) // max(TRAINING_ROWS_PER_CELL * num_cells, PQ_TRAINING_ROWS))
        if config.device != "cpu":
            if not has_gpu_code():
                raise DeviceError(
                    "search.device is 'cuda' with codes 'pq', but the installed faiss is a build for the CPU. Run: "
                    "pip uninstall faiss-cpu, then pip install faiss-gpu."
                )
            index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
        index.train(low_precision.to_float32(vectors[::every]))
        for start in range(0, len(vectors), BLOCK_ROWS):
            index.add(low_precision.to_float32(vectors[start : start + BLOCK_ROWS]))
        index.nprobe = min(config.num_probes, num_cells)
        self._index, self._quantizer = index, quantizer  # faiss does not keep the quantizer alive

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The `k` nearest to each of `queries` (Q, D), as `exact.search` gives them.

        The codes choose `config.overfetch` times as many candidates. Raises ConfigError when a GPU cannot select them.
        """
        num_fetched = min(self._config.overfetch * k, len(self._vectors))
        if self._config.device != "cpu" and num_fetched > GPU_MAX_SELECTION:
            raise ConfigError(
                f"search.overfetch times k is {num_fetched}; faiss on a GPU takes {GPU_MAX_SELECTION} at most."
            )
        best_similarity = np.full((len(queries), k), -np.inf, np.float32)
        best_row = np.full((len(queries), k), -1, np.int64)
        for start in range(0, len(queries), BLOCK_ROWS):
            block = queries[start : start + BLOCK_ROWS]
            rows = self._index.search(low_precision.to_float32(block), num_fetched)[1]
            query, column = np.nonzero(rows >= 0)  # faiss fills short lists with -1
            row = rows[query, column]
            score = exact.pair_similarity(block, query, self._vectors, row)
            part = slice(start, start + len(block))
            merge_into_best(best_similarity[part], best_row[part], query, row, score)
        return best_similarity, best_row
