"""Nearest neighbours by inner product, exactly.

Legend: Q queries, N vectors, D dimensions, K neighbours. Vectors are unit length: inner product is cosine.

Exact search multiplies every query with every vector in low precision (low_precision.py), which yields a few
candidates, and scores these in float32, pair by pair. What is found, to the last bit, depends neither on how the
vectors are cut into blocks nor on the number of threads; a matrix product alone would not give that.
"""

import warnings
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from curation.search import low_precision
from curation.search.top_k import merge_into_best

# torch calls its sparse matrices a beta; what is used of them is compared with plain products in the tests.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

# Rows that are held as float32 and as codes at a time: 25 MB and 6 MB at D 384. Assumed.
BLOCK_ROWS = 16_384
# Tiles whose products are held until the floor of their candidates is known, at least: 8 MB each on a CPU. Assumed.
HELD_TILES = 8
# The most rows of a block where k is large, and a floor rests on many groups. Assumed: 100 MB at D 384.
MAX_BLOCK_ROWS = 65_536
# Pairs that are scored at a time: if all rows differ and are float16, 16,384 x 1,280 float32 twice is 168 MB.
PAIR_BLOCK = 16_384


def search(
    queries: np.ndarray, blocks: Iterable[np.ndarray], k: int, *, floor: float = -np.inf, device: str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """The `k` vectors nearest to each query among all `blocks` whose similarity is at least `floor`, exactly.

    `queries` (Q, D) and each block (n, D) are float16 or float32; blocks may be streamed, only BLOCK_ROWS rows are held
    at a time, for a large `k` up to MAX_BLOCK_ROWS. Returns similarities (Q, k) float32 and rows (Q, k) int64, counted
    through the blocks in order; descending by similarity, ties by row. Where there are fewer than `k` vectors,
    similarity is -inf and row is -1.
    """
    queries = low_precision.to_float32(queries)
    best_similarity = np.full((len(queries), k), -np.inf, np.float32)
    best_row = np.full((len(queries), k), -1, np.int64)
    step = low_precision.QUERY_ROWS[low_precision.device_kind(device)]
    parts = [slice(start, min(start + step, len(queries))) for start in range(0, len(queries), step)]
    codes = [low_precision.encode_rows(queries[part], device) for part in parts]
    first_row = 0
    # Without a floor every pair of the first block is scored, so a block has the groups that a good one takes.
    block_rows = min(max(BLOCK_ROWS, 2 * k * low_precision.LANES), MAX_BLOCK_ROWS)
    for block in _regroup(blocks, block_rows):
        tiles = _tiles(block, device)
        for part, own in zip(parts, codes, strict=True):
            least = np.maximum(best_similarity[part, -1].astype(np.float64), floor)
            query, row = _scan_block(own, tiles, k, least)
            similarity = pair_similarity(queries[part], query, block, row)
            reached = similarity >= floor
            found = query[reached], row[reached] + first_row, similarity[reached]
            merge_into_best(best_similarity[part], best_row[part], *found)
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
    step = low_precision.QUERY_ROWS[low_precision.device_kind(device)]
    for start in range(0, len(vectors), step):
        part = slice(start, min(start + step, len(vectors)))
        own = low_precision.to_float32(vectors[part])
        least = np.full(len(own), -np.inf)
        if guess is not None:
            least = pair_similarity(own, np.arange(len(own)), centroids, guess[part]).astype(np.float64)
        query, row = _scan_block(low_precision.encode_rows(own, device), tiles, 1, least)
        best, nearest = np.full((len(own), 1), -np.inf, np.float32), np.full((len(own), 1), -1, np.int64)
        merge_into_best(best, nearest, query, row, pair_similarity(own, query, centroids, row))
        cluster[part], similarity[part] = nearest[:, 0], best[:, 0]
    return cluster, similarity


def codes_of(matrix: np.ndarray, device: str = "cpu") -> low_precision.Codes:
    """Codes of `matrix` (N, D), float16 or float32, with one scale; BLOCK_ROWS rows are float32 at a time."""
    starts = range(0, max(1, len(matrix)), BLOCK_ROWS)
    return low_precision.encode([matrix[start : start + BLOCK_ROWS] for start in starts], device)


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
    return low_precision.to_float32(matrix[used]), places


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
                yield low_precision.to_float32(np.concatenate(pending) if len(pending) > 1 else pending[0])
                pending, held = [], 0
    if held:
        yield low_precision.to_float32(np.concatenate(pending))


def _tiles(block: np.ndarray, device: str) -> list[tuple[int, low_precision.Codes]]:
    """The block's tiles, each with its first row."""
    step = low_precision.TILE_ROWS[low_precision.device_kind(device)]
    starts = range(0, len(block), step)
    return [(start, low_precision.encode([block[start : start + step]], device)) for start in starts]


def _scan_block(
    queries: low_precision.Codes, tiles: list[tuple[int, low_precision.Codes]], k: int, floor: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Queries (C,) and rows (C,) of pairs among which are, for each query, its `k` nearest that reach its floor (Q,).

    In the order of tiles, then of queries, then of rows.
    """
    kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    held: list[tuple[int, low_precision.Estimates]] = []
    best = low_precision.BestSoFar(k)
    for number, (first_row, tile) in enumerate(tiles, start=1):
        held.append((first_row, low_precision.estimate(queries, tile)))
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
