"""Nearest neighbours by inner product, exactly.

Legend: Q queries, N vectors, D dimensions, K neighbours, P pairs. Vectors have unit length: inner product is cosine.

Exact search multiplies every query with every vector in low precision (low_precision.py). That yields a few candidates,
which are scored in float32, pair by pair. The result is the same to the last bit for any cut of the vectors into blocks
and any number of threads; a matrix product alone would not give that.
"""

import warnings
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from curation.search import low_precision
from curation.search.top_k import merge_into_best

# torch calls its sparse matrices a beta; the tests compare the operations used here with plain products.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

# Rows held as float32 and as codes at a time: 25 MB and 6 MB at D 384. Assumed.
BLOCK_ROWS = 16_384
# Minimum of tiles whose products are held until their floor is known: 8 MB each on a CPU. Assumed.
HELD_TILES = 8
# Maximum rows of a block for a large k, where a floor rests on many groups: 100 MB at D 384. Assumed.
MAX_BLOCK_ROWS = 65_536
# Pairs scored at a time. If all rows differ and are float16, 16,384 x 1,280 float32 twice is 168 MB.
PAIR_BLOCK = 16_384


def search(
    queries: np.ndarray, blocks: Iterable[np.ndarray], k: int, *, floor: float = -np.inf, device: str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """The `k` vectors nearest to each query among all `blocks` whose similarity is at least `floor`, exactly.

    `queries` (Q, D) and each block (n, D) are float16 or float32. Blocks may be streamed; BLOCK_ROWS rows are held at a
    time, for a large `k` up to MAX_BLOCK_ROWS. Returns similarities (Q, k) float32 and rows (Q, k) int64, counted
    through the blocks in order; by falling similarity, ties by row. With fewer than `k` vectors, the remaining
    similarities are -inf and the remaining rows -1.
    """
    queries = low_precision.to_float32(queries)
    best_similarity = np.full((len(queries), k), -np.inf, np.float32)
    best_row = np.full((len(queries), k), -1, np.int64)
    step = low_precision.QUERY_ROWS[low_precision.device_kind(device)]
    parts = [slice(start, min(start + step, len(queries))) for start in range(0, len(queries), step)]
    codes = [low_precision.encode_rows(queries[part], device) for part in parts]
    first_row = 0
    # Without a floor every pair of the first block is scored; a good floor takes 2 k groups, so a block has as many.
    block_rows = min(max(BLOCK_ROWS, 2 * k * low_precision.LANES), MAX_BLOCK_ROWS)
    for block in _regroup(blocks, block_rows):
        tiles = _tiles(block, device)
        for part, part_codes in zip(parts, codes, strict=True):
            floors = np.maximum(best_similarity[part, -1].astype(np.float64), floor)
            query, row = _scan_block(part_codes, tiles, k, floors)
            similarity = pair_similarity(queries[part], query, block, row)
            reached = similarity >= floor
            new_pairs = query[reached], row[reached] + first_row, similarity[reached]
            merge_into_best(best_similarity[part], best_row[part], *new_pairs)
        first_row += len(block)
    return best_similarity, best_row


def assign(
    vectors: np.ndarray, centroids: np.ndarray, *, guess: np.ndarray | None = None, device: str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest of `centroids` (K, D) to each of `vectors` (N, D), and its cosine: (N,) int64, (N,) float32.

    Exact; ties go to the first centroid. `guess` (N,) is a probably near centroid of each vector, such as that of the
    previous iteration; it changes only the speed.
    """
    centroids = np.ascontiguousarray(centroids, dtype=np.float32)
    cluster, similarity = np.zeros(len(vectors), np.int64), np.empty(len(vectors), np.float32)
    tiles = _tiles(centroids, device)
    step = low_precision.QUERY_ROWS[low_precision.device_kind(device)]
    for start in range(0, len(vectors), step):
        part = slice(start, min(start + step, len(vectors)))
        queries = low_precision.to_float32(vectors[part])
        floors = np.full(len(queries), -np.inf)
        if guess is not None:
            floors = pair_similarity(queries, np.arange(len(queries)), centroids, guess[part]).astype(np.float64)
        query, row = _scan_block(low_precision.encode_rows(queries, device), tiles, 1, floors)
        best, nearest = np.full((len(queries), 1), -np.inf, np.float32), np.full((len(queries), 1), -1, np.int64)
        merge_into_best(best, nearest, query, row, pair_similarity(queries, query, centroids, row))
        cluster[part], similarity[part] = nearest[:, 0], best[:, 0]
    return cluster, similarity


def pairs_above(
    queries: np.ndarray, vectors: np.ndarray, floor: float, *, device: str = "cpu"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pairs whose similarity is at least `floor`, exactly and without a limit on their number.

    `queries` (Q, D) and `vectors` (N, D) are float16 or float32, and both are held as float32. Returns queries (P,)
    int64, rows (P,) int64 and similarities (P,) float32, by query, then by row.
    """
    queries, vectors = low_precision.to_float32(queries), low_precision.to_float32(vectors)
    tiles = _tiles(vectors, device)
    step = low_precision.QUERY_ROWS[low_precision.device_kind(device)]
    parts = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))]
    for start in range(0, len(queries), step):
        part = queries[start : start + step]
        codes = low_precision.encode_rows(part, device)
        for first_row, tile in tiles:
            query, row, _ = low_precision.estimate(codes, tile).candidates(np.full(len(part), float(floor)))
            row = row + first_row
            similarity = pair_similarity(part, query, vectors, row)
            reached = similarity >= floor
            parts.append((query[reached] + start, row[reached], similarity[reached]))
    query, row, similarity = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((row, query))
    return query[order], row[order], similarity[order]


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
        (one, one_rows), (other, other_rows) = _used_rows(left, left_rows[part]), _used_rows(right, right_rows[part])
        if len(part) > len(one) * len(other):  # pairs repeat: torch refuses more positions than the matrix has
            other, other_rows = other[other_rows], np.arange(len(part))
        starts = torch.from_numpy(np.searchsorted(one_rows, np.arange(len(one) + 1)))
        # The product at given positions of a sparse matrix. torch's kernel computes them one by one, so the bits of a
        # pair depend neither on other pairs nor on threads. Gathering the rows of both sides takes ten times as long.
        positions = torch.sparse_csr_tensor(
            starts,
            torch.from_numpy(other_rows),
            torch.zeros(len(part)),
            size=(len(one), len(other)),
            check_invariants=False,
        )
        product = torch.sparse.sampled_addmm(positions, torch.from_numpy(one), torch.from_numpy(other).T, beta=0.0)
        result[part] = product.values().numpy()
    return result


def _used_rows(matrix: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A float32 matrix, and the positions in it of the given `rows` (P,) of `matrix`.

    A matrix that torch can use is returned as it is; of any other, only the rows in use are converted.
    """
    if matrix.dtype == np.float32 and matrix.flags.c_contiguous and matrix.flags.writeable:
        return matrix, rows
    used, positions = np.unique(rows, return_inverse=True)
    return low_precision.to_float32(matrix[used]), positions


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
    """Queries (P,) and rows (P,) of candidate pairs: at least the `k` nearest of each query that reach its floor (Q,).

    In the order of tiles, then of queries, then of rows.
    """
    kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    held: list[tuple[int, low_precision.Estimates]] = []
    best = low_precision.BestSoFar(k)
    for number, (first_row, tile) in enumerate(tiles, start=1):
        held.append((first_row, low_precision.estimate(queries, tile)))
        best.add(held[-1][1])
        # Few groups give a low floor, and fewer than k give none: the first tiles wait for a better one.
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
