"""Nearest neighbours by inner product, exact and approximate. The only file that imports faiss.

Legend: Q queries, N vectors, D dimensions, K neighbours. Vectors are unit length: inner product is cosine.

Exact search multiplies every query with every vector in low precision (scan.py), which yields a few candidates, and
scores these in float32, pair by pair. What is found, to the last bit, depends neither on how the vectors are cut into
blocks nor on the number of threads; a matrix product alone would not give that.
"""

import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import faiss
import numpy as np
import torch
from pydantic import Field, model_validator

from curation import scan
from curation.config import Settings
from curation.errors import ConfigError

# torch calls its sparse matrices a beta; what is used of them is compared with plain products in the tests.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

# Rows that are held as float32 and as codes at a time: 25 MB and 6 MB at D 384. Assumed.
BLOCK_ROWS = 16_384
# Tiles whose products are held until the floor of their candidates is known, at least: 8 MB each on a CPU. Assumed.
HELD_TILES = 8
# The most rows of a block where k is large, and a floor rests on many groups. Assumed: 100 MB at D 384.
MAX_BLOCK_ROWS = 65_536
# Cells that vectors are compared with at a time. Assumed.
CELLS_PER_TILE = 8192
# Pairs that are scored at a time: if all rows differ and are float16, 16,384 x 1,280 float32 twice is 168 MB.
PAIR_BLOCK = 16_384
# Pairs that wait for their scores in a search by cells: 70 MB. Assumed.
WAITING_PAIRS = 2**20
# Vectors per cell that the cells are trained on, and their rounds. faiss asks for 39 to 256; the recall that every run
# measures says whether it is enough.
TRAINING_ROWS_PER_CELL = 48
TRAINING_ITERATIONS = 8
# Vectors that product quantization is trained on at least: 256 for each of its 256 codes, as faiss does.
PQ_TRAINING_ROWS = 65_536
# faiss on a GPU selects at most so many neighbours and probes (GPU_MAX_SELECTION_K), and its product quantization knows
# these code lengths (IVFPQ.cu, isSupportedPQCodeLength).
GPU_MAX_SELECTION = 2048
GPU_PQ_BYTES = (1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96)


class SearchConfig(Settings):
    """How neighbours are searched."""

    backend: Literal["exact", "ivf"] = "exact"
    """Whether every vector is compared, or only those in the `num_probes` cells nearest to the query (inverted lists).
    Then the recall is measured in every run."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where products are computed. Asking for a GPU that is not there is an error."""
    rows_per_part: int = Field(default=1_000_000, ge=1)
    """Vectors that a worker holds at a time, as float16: 2 GB at 1,000 dimensions. Of `pairs`, with `ivf`, those of one
    group of cells; others that visit it come on top."""
    rows_per_cell: int = Field(default=1000, ge=1)
    """With `ivf`: vectors per cell on average."""
    num_probes: int = Field(default=16, ge=1)
    """With `ivf`: cells that each query visits."""
    codes: Literal["flat", "pq"] = "flat"
    """With `ivf`: whether lists hold the vectors themselves, or product quantization codes (a part then takes
    `pq_bytes` a vector) of which `overfetch` times k are scored anew with the vectors."""
    pq_bytes: int = Field(default=64, ge=1)
    """With `pq`: bytes per vector; must divide the vectors' width."""
    overfetch: int = Field(default=4, ge=1)
    """With `pq`: how many times k vectors are fetched by their codes."""
    min_recall: float = Field(default=0.95, ge=0, le=1)
    """With `ivf`: the share of the true neighbours, on a sample, below which the stage stops."""
    recall_queries: int = Field(default=500, ge=1)
    """With `ivf`: queries in that sample."""
    seed: int = 0
    """Of the cells and of the sample."""

    @model_validator(mode="after")
    def _fits_the_gpu(self) -> "SearchConfig":
        if self.device == "cuda" and self.codes == "pq":
            if self.num_probes > GPU_MAX_SELECTION:
                raise ValueError(f"num_probes is {self.num_probes}; faiss on a GPU takes {GPU_MAX_SELECTION} at most")
            if self.pq_bytes not in GPU_PQ_BYTES:
                raise ValueError(
                    f"pq_bytes is {self.pq_bytes}; faiss on a GPU takes {', '.join(map(str, GPU_PQ_BYTES))}"
                )
        return self

    def require_recall(self, facts: Mapping[str, Any]) -> None:
        """Raise ConfigError where the recall among the `facts` of a search is below `min_recall`."""
        recall = facts.get("recall")
        if recall is not None and recall < self.min_recall:
            raise ConfigError(
                f"The search found {recall:.4f} of the {facts['recall_neighbors']:,} nearest neighbours of a sample; "
                f"search.min_recall is {self.min_recall:g}. Raise search.num_probes ({self.num_probes}), lower "
                'min_recall, or set search.backend = "exact".'
            )

    @property
    def num_gpus(self) -> int:
        """GPUs that one worker needs."""
        return int(self.device == "cuda")

    def num_cells(self, num_vectors: int) -> int:
        """The cells of so many vectors."""
        return max(1, round(num_vectors / self.rows_per_cell))


def search(
    queries: np.ndarray, blocks: Iterable[np.ndarray], k: int, *, floor: float = -np.inf, device: str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """The `k` vectors nearest to each query among all `blocks` whose similarity is at least `floor`, exactly.

    `queries` (Q, D) and each block (n, D) are float16 or float32; blocks may be streamed, only BLOCK_ROWS rows are held
    at a time, for a large `k` up to MAX_BLOCK_ROWS. Returns similarities (Q, k) float32 and rows (Q, k) int64, counted
    through the blocks in order; descending by similarity, ties by row. Where there are fewer than `k` vectors,
    similarity is -inf and row is -1.
    """
    queries = scan.to_float32(queries)
    best_similarity = np.full((len(queries), k), -np.inf, np.float32)
    best_row = np.full((len(queries), k), -1, np.int64)
    step = scan.QUERY_ROWS[scan.device_kind(device)]
    parts = [slice(start, min(start + step, len(queries))) for start in range(0, len(queries), step)]
    codes = [scan.encode_rows(queries[part], device) for part in parts]
    first_row = 0
    # Without a floor every pair of the first block is scored, so a block has the groups that a good one takes.
    block_rows = min(max(BLOCK_ROWS, 2 * k * scan.LANES), MAX_BLOCK_ROWS)
    for block in _regroup(blocks, block_rows):
        tiles = _tiles(block, device)
        for part, own in zip(parts, codes, strict=True):
            least = np.maximum(best_similarity[part, -1].astype(np.float64), floor)
            query, row = _scan_block(own, tiles, k, least)
            similarity = pair_similarity(queries[part], query, block, row)
            reached = similarity >= floor
            found = query[reached], row[reached] + first_row, similarity[reached]
            _merge(best_similarity[part], best_row[part], *found)
        first_row += len(block)
    return best_similarity, best_row


def assign(
    vectors: np.ndarray, centroids: np.ndarray, *, guess: np.ndarray | None = None, device: str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest of `centroids` (K, D) to each of `vectors` (N, D), and the cosine to it: (N,) int64, (N,) float32.

    Exact; ties go to the first. `guess` (N,) is a centroid for each vector that may be near, such as the one it had in
    the iteration before; it changes the speed alone.
    """
    centroids = np.ascontiguousarray(centroids, dtype=np.float32)
    cluster, similarity = np.zeros(len(vectors), np.int64), np.empty(len(vectors), np.float32)
    tiles = _tiles(centroids, device)
    step = scan.QUERY_ROWS[scan.device_kind(device)]
    for start in range(0, len(vectors), step):
        part = slice(start, min(start + step, len(vectors)))
        own = scan.to_float32(vectors[part])
        least = np.full(len(own), -np.inf)
        if guess is not None:
            least = pair_similarity(own, np.arange(len(own)), centroids, guess[part]).astype(np.float64)
        query, row = _scan_block(scan.encode_rows(own, device), tiles, 1, least)
        best, nearest = np.full((len(own), 1), -np.inf, np.float32), np.full((len(own), 1), -1, np.int64)
        _merge(best, nearest, query, row, pair_similarity(own, query, centroids, row))
        cluster[part], similarity[part] = nearest[:, 0], best[:, 0]
    return cluster, similarity


def cells_of(vectors: np.ndarray, cells: np.ndarray, num_probes: int, *, device: str = "cpu") -> np.ndarray:
    """The `num_probes` cells that each of `vectors` (N, D) visits, (N, P) int64, the nearest first.

    `cells` (K, D) are unit vectors, at least `num_probes`. Compared by int8 codes, so nearly equal ones may come in the
    wrong order, but in the same order on every machine.
    """
    cells = np.ascontiguousarray(cells, dtype=np.float32)
    codes = scan.whole_number_codes(cells, device)
    step = CELLS_PER_TILE
    tiles = [codes.take(np.arange(start, min(start + step, len(cells)))) for start in range(0, len(cells), step)]
    visits = np.empty((len(vectors), num_probes), np.int64)
    step = scan.QUERY_ROWS[scan.device_kind(device)]
    for start in range(0, len(vectors), step):
        own = scan.to_float32(vectors[start : start + step])
        visits[start : start + step] = scan.nearest_by_codes(own, tiles, num_probes)
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


def codes_of(matrix: np.ndarray, device: str = "cpu") -> scan.Codes:
    """Codes of `matrix` (N, D), float16 or float32, with one scale; BLOCK_ROWS rows are float32 at a time."""
    starts = range(0, max(1, len(matrix)), BLOCK_ROWS)
    return scan.encode([matrix[start : start + BLOCK_ROWS] for start in starts], device)


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
    kind = scan.device_kind(device)
    vector_codes = None
    if floor == -np.inf:  # candidates are then all that are about as near as the k-th: hundreds, by coarse codes
        query_codes = scan.encode_finely(queries, device)
    else:
        vector_codes = codes_of(vectors, device)
        query_codes = vector_codes if queries is vectors else codes_of(queries, device)
    shortlist = _Shortlist(queries, vectors, k, floor)
    for visits, cell in itertools.product(queries_in, range(len(vectors_in.starts) - 1)):
        asking, members = visits.of_cell(cell), vectors_in.of_cell(cell)
        for first in range(0, len(members) if len(asking) else 0, scan.CELL_ROWS[kind]):
            rows = members[first : first + scan.CELL_ROWS[kind]]
            tile = vector_codes.take(rows) if vector_codes else scan.encode_finely(_rows_of(vectors, rows), device)
            for start in range(0, len(asking), scan.QUERY_ROWS[kind]):
                own = asking[start : start + scan.QUERY_ROWS[kind]]
                estimates = scan.estimate(query_codes.take(own), tile)
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
        step = scan.QUERY_ROWS["cpu"]
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
        order, rank = _ranked(queries, certain)
        kth = order[rank == self._k - 1]
        floor[queries[kth]] = np.maximum(floor[queries[kth]], certain[kth])
        chosen = estimate + self._slack >= floor[query]
        query, row = query[chosen], row[chosen]
        score = pair_similarity(self._queries[part], query, self._vectors, row)
        reached = score >= self._least
        _merge(similarity, best_row, query[reached], row[reached], score[reached])
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
        built.train(scan.to_float32(vectors[::every]))
        for start in range(0, len(vectors), BLOCK_ROWS):
            built.add(scan.to_float32(vectors[start : start + BLOCK_ROWS]))
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
            rows = self._built.search(scan.to_float32(own), fetched)[1]
            query, column = np.nonzero(rows >= 0)  # short lists are filled with -1
            row = rows[query, column]
            score = pair_similarity(own, query, self._vectors, row)
            part = slice(start, start + len(own))
            _merge(best_similarity[part], best_row[part], query, row, score)
        return best_similarity, best_row


def pair_similarity(left: np.ndarray, left_rows: np.ndarray, right: np.ndarray, right_rows: np.ndarray) -> np.ndarray:
    """Inner products (P,) float32 of row `left_rows[p]` of `left` with row `right_rows[p]` of `right`."""
    result = np.empty(len(left_rows), np.float32)
    order = np.argsort(left_rows, kind="stable")
    for start in range(0, len(order), PAIR_BLOCK):
        part = order[start : start + PAIR_BLOCK]
        (one, one_rows), (other, other_rows) = _used(left, left_rows[part]), _used(right, right_rows[part])
        if len(part) > len(one) * len(other):  # repeated pairs: more places than torch lets a matrix have
            other, other_rows = other[other_rows], np.arange(len(part))
        starts = torch.from_numpy(np.searchsorted(one_rows, np.arange(len(one) + 1)))
        # A product at given places of a matrix: torch's kernel takes them one by one, so a pair's bits do not depend on
        # the others, nor on threads; and it is ten times as fast as to gather the rows of both sides.
        places = torch.sparse_csr_tensor(
            starts,
            torch.from_numpy(other_rows),
            torch.zeros(len(part)),
            size=(len(one), len(other)),
            check_invariants=False,
        )
        product = torch.sparse.sampled_addmm(places, torch.from_numpy(one), torch.from_numpy(other).T, beta=0.0)
        result[part] = product.values().numpy()
    return result


def _used(matrix: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`matrix` and `rows` (P,), or only the rows that are used, where others would have to be converted."""
    if matrix.dtype == np.float32 and matrix.flags.c_contiguous and matrix.flags.writeable:
        return matrix, rows
    used, places = np.unique(rows, return_inverse=True)
    return scan.to_float32(matrix[used]), places


def _regroup(blocks: Iterable[np.ndarray], num_rows: int) -> Iterator[np.ndarray]:
    """The rows of `blocks` as float32 in blocks of exactly `num_rows`, the last one shorter."""
    pending: list[np.ndarray] = []
    held = 0
    for block in blocks:
        start = 0
        while start < len(block):
            piece = block[start : start + num_rows - held]
            pending.append(piece)
            held, start = held + len(piece), start + len(piece)
            if held == num_rows:
                yield scan.to_float32(np.concatenate(pending) if len(pending) > 1 else pending[0])
                pending, held = [], 0
    if held:
        yield scan.to_float32(np.concatenate(pending))


def _tiles(block: np.ndarray, device: str) -> list[tuple[int, scan.Codes]]:
    """The block's tiles, each with its first row."""
    step = scan.TILE_ROWS[scan.device_kind(device)]
    starts = range(0, len(block), step)
    return [(start, scan.encode([block[start : start + step]], device)) for start in starts]


def _scan_block(
    queries: scan.Codes, tiles: list[tuple[int, scan.Codes]], k: int, floor: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Queries (C,) and rows (C,) of pairs among which are, for each query, its `k` nearest that reach its floor (Q,).

    In the order of tiles, then of queries, then of rows.
    """
    kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    held: list[tuple[int, scan.Estimates]] = []
    best = scan.BestSoFar(k)
    for number, (first_row, tile) in enumerate(tiles, start=1):
        held.append((first_row, scan.estimate(queries, tile)))
        best.add(held[-1][1])
        # A floor from few groups is low, and from fewer than k there is none: the first tiles wait for a better one.
        waits = len(held) < HELD_TILES or not np.isfinite(floor).all()
        if best.num_groups < 2 * k and waits and number < len(tiles):
            continue
        floor = np.maximum(floor, best.floor())
        for start, estimates in held:
            query, row, value = estimates.candidates(floor)
            kept.append((query, row + start, value))
        held.clear()
    if not kept:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    query, row, value = (np.concatenate(column) for column in zip(*kept, strict=True))
    chosen = value >= (floor - best.slack)[query]
    return query[chosen], row[chosen]


def _merge(
    best_similarity: np.ndarray, best_row: np.ndarray, query: np.ndarray, row: np.ndarray, similarity: np.ndarray
) -> None:
    """Put the new pairs among the best (Q, k), in place, ties by row."""
    touched = np.zeros(len(best_row), bool)
    touched[query] = True
    k = best_row.shape[1]
    old = np.flatnonzero(np.repeat(touched, k) & (best_row.reshape(-1) >= 0))
    query = np.concatenate([old // k, query])
    row = np.concatenate([best_row.reshape(-1)[old], row])
    similarity = np.concatenate([best_similarity.reshape(-1)[old], similarity])
    by_row = np.argsort(query * (row.max(initial=0) + 1) + row)  # no pair comes twice
    query, row, similarity = query[by_row], row[by_row], similarity[by_row]
    order, rank = _ranked(query, similarity)
    order, rank = order[rank < k], rank[rank < k]
    best_similarity[query[order], rank] = similarity[order]
    best_row[query[order], rank] = row[order]


def _ranked(query: np.ndarray, similarity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An order of the pairs by query, then by falling similarity, then as they come; and the rank within the query."""
    # The sort of one 64-bit key is many times faster than a sort by two: 11 bits of query, 32 of similarity, 21 of
    # place. The bits of a float, the lower ones flipped when it is negative, sort as the float does.
    bits = (similarity + np.float32(0)).view(np.int32).astype(np.int64)
    falling = (~(bits ^ ((bits >> 31) & 0x7FFFFFFF)) + 2**31).astype(np.uint64)
    if len(query) < 2**21 and (query < 2**11).all():
        place = np.arange(len(query), dtype=np.uint64)
        key = (query.astype(np.uint64) << np.uint64(53)) | (falling << np.uint64(21)) | place
        order = (np.sort(key) & np.uint64(2**21 - 1)).astype(np.int64)
    else:
        order = np.lexsort((falling, query))
    ordered = query[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=-1))
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
    return order, rank
