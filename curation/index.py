"""Nearest neighbours and k-means by inner product. The only file that imports faiss.

Legend: Q queries, N vectors, D dimensions, K neighbours. Vectors are unit length: inner product is cosine.

Exact search multiplies every query with every vector in low precision (scan.py), which yields a few candidates, and
scores these in float32, pair by pair. What is found, to the last bit, depends neither on how the vectors are cut into
blocks nor on the number of threads; a matrix product alone would not give that.
"""

from collections.abc import Iterable, Iterator

import faiss
import numpy as np
import torch

from curation import scan

# Rows that are held as float32 and as codes at a time: 100 MB and 25 MB at D 384. Assumed.
BLOCK_ROWS = 65_536
# Pairs that are multiplied out at a time: 8,192 x 1,280 float32 twice is 84 MB.
PAIR_BLOCK = 8192


def search(
    queries: np.ndarray, blocks: Iterable[np.ndarray], k: int, *, floor: float = -np.inf, device: str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """The `k` vectors nearest to each query among all `blocks` whose similarity is at least `floor`, exactly.

    `queries` (Q, D) and each block (n, D) are float16 or float32; blocks may be streamed, only BLOCK_ROWS rows are held
    at a time. Returns similarities (Q, k) float32 and rows (Q, k) int64, counted through the blocks in order;
    descending by similarity, ties by row. Where there are fewer than `k` vectors, similarity is -inf and row is -1.
    """
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    best_similarity = np.full((len(queries), k), -np.inf, np.float32)
    best_row = np.full((len(queries), k), -1, np.int64)
    step = scan.QUERY_ROWS[scan.device_kind(device)]
    parts = [slice(start, min(start + step, len(queries))) for start in range(0, len(queries), step)]
    codes = [scan.encode(queries[part], device, row_scales=True) for part in parts]
    first_row = 0
    for block in _regroup(blocks, BLOCK_ROWS):
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
        own = to_float32(vectors[part])
        least = np.full(len(own), -np.inf)
        if guess is not None:
            least = pair_similarity(own, np.arange(len(own)), centroids, guess[part]).astype(np.float64)
        query, row = _scan_block(scan.encode(own, device, row_scales=True), tiles, 1, least)
        best, nearest = np.full((len(own), 1), -np.inf, np.float32), np.full((len(own), 1), -1, np.int64)
        _merge(best, nearest, query, row, pair_similarity(own, query, centroids, row))
        cluster[part], similarity[part] = nearest[:, 0], best[:, 0]
    return cluster, similarity


def pair_similarity(left: np.ndarray, left_rows: np.ndarray, right: np.ndarray, right_rows: np.ndarray) -> np.ndarray:
    """Inner products (P,) float32 of row `left_rows[p]` of `left` with row `right_rows[p]` of `right`."""
    result = np.empty(len(left_rows), np.float32)
    for start in range(0, len(left_rows), PAIR_BLOCK):
        part = slice(start, start + PAIR_BLOCK)
        one, other = to_float32(left[left_rows[part]]), to_float32(right[right_rows[part]])
        result[part] = np.einsum("pd,pd->p", one, other)
    return result


def to_float32(matrix: np.ndarray) -> np.ndarray:
    """`matrix` as contiguous float32; torch converts float16 twice as fast as numpy."""
    if matrix.dtype == np.float16:
        converted: np.ndarray = torch.from_numpy(np.ascontiguousarray(matrix)).float().numpy()
        return converted
    return np.ascontiguousarray(matrix, dtype=np.float32)


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
                yield to_float32(np.concatenate(pending) if len(pending) > 1 else pending[0])
                pending, held = [], 0
    if held:
        yield to_float32(np.concatenate(pending))


def _tiles(block: np.ndarray, device: str) -> list[tuple[int, scan.Codes]]:
    """The block's tiles, each with its first row."""
    step = scan.TILE_ROWS[scan.device_kind(device)]
    starts = range(0, len(block), step)
    return [(start, scan.encode(block[start : start + step], device, row_scales=False)) for start in starts]


def _scan_block(
    queries: scan.Codes, tiles: list[tuple[int, scan.Codes]], k: int, floor: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Queries (C,) and rows (C,) of pairs among which are, for each query, its `k` nearest that reach its floor (Q,).

    In the order of tiles, then of queries, then of rows.
    """
    kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    best = scan.BestSoFar(k)
    for number, (first_row, tile) in enumerate(tiles, start=1):
        estimates = scan.estimate(queries, tile)
        best.add(estimates)
        # What reached the floor before it was raised is dropped at the end; raising it at every tile would cost more.
        if k == 1 or number & (number - 1) == 0 or number == len(tiles):
            floor = np.maximum(floor, best.floor())
        query, row, value = estimates.candidates(floor)
        kept.append((query, row + first_row, value))
    if not kept:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    query, row, value = (np.concatenate(column) for column in zip(*kept, strict=True))
    chosen = value >= (floor - best.slack)[query]
    return query[chosen], row[chosen]


def _merge(
    best_similarity: np.ndarray, best_row: np.ndarray, query: np.ndarray, row: np.ndarray, similarity: np.ndarray
) -> None:
    """Put the new pairs among the best (Q, k), in place. New rows come behind the best's and ascend for each query."""
    touched = np.zeros(len(best_row), bool)
    touched[query] = True
    k = best_row.shape[1]
    old = np.flatnonzero(np.repeat(touched, k) & (best_row.reshape(-1) >= 0))
    query = np.concatenate([old // k, query])
    row = np.concatenate([best_row.reshape(-1)[old], row])
    similarity = np.concatenate([best_similarity.reshape(-1)[old], similarity])
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


def spherical_kmeans(
    vectors: np.ndarray,
    num_clusters: int,
    *,
    num_iterations: int,
    seed: int,
    max_points_per_centroid: int | None = None,
) -> np.ndarray:
    """Unit centroids (num_clusters, D) float32 of spherical k-means over `vectors` (N, D).

    Trains on all points, or on a seeded sample of `max_points_per_centroid` for each centroid. Deterministic for one
    machine and number of threads. `num_clusters` must not exceed N.
    """
    matrix = np.ascontiguousarray(vectors, dtype=np.float32)
    assert 1 <= num_clusters <= len(matrix), (num_clusters, len(matrix))
    kmeans = faiss.Kmeans(
        matrix.shape[1],
        num_clusters,
        niter=num_iterations,
        spherical=True,
        seed=seed,
        # faiss would else subsample to 256 points per centroid without a word.
        max_points_per_centroid=max_points_per_centroid or len(matrix),
        min_points_per_centroid=1,
    )
    kmeans.train(matrix)
    centroids = np.asarray(kmeans.centroids)
    norms = np.linalg.norm(centroids, axis=1, keepdims=True)
    unit: np.ndarray = centroids / np.where(norms > 0, norms, 1)  # opposite vectors may have no direction in the mean
    return unit
