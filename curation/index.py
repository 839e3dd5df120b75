"""Nearest neighbours and k-means by inner product. The only file that imports faiss.

Legend: Q queries, N vectors, D dimensions, K neighbours. Vectors are unit length: inner product is cosine.
"""

from collections.abc import Iterable

import faiss
import numpy as np

# Queries that are searched at a time; bounds the memory of the results. Assumed.
QUERY_BLOCK = 4096
# Pairs that are multiplied out at a time: 8,192 x 1,280 float32 twice is 84 MB.
PAIR_BLOCK = 8192


def search(queries: np.ndarray, blocks: Iterable[np.ndarray], k: int) -> tuple[np.ndarray, np.ndarray]:
    """The `k` vectors nearest to each query among all `blocks`, exactly.

    `queries` (Q, D) and each block (n, D) are float16 or float32; only one block is held at a time, so they may be
    streamed. Returns similarities (Q, k) float32 and rows (Q, k) int64, counted through the blocks in order; descending
    by similarity, ties by row. Where there are fewer than `k` vectors, similarity is -inf and row is -1. Which of the
    vectors that tie at the k-th place (within the rounding of float32) are found may depend on the blocks.
    """
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    best_similarity = np.full((len(queries), k), -np.inf, np.float32)
    best_row = np.full((len(queries), k), -1, np.int64)
    first_row = 0
    for block in blocks:
        vectors = np.ascontiguousarray(block, dtype=np.float32)
        if len(vectors) and len(queries):
            for start in range(0, len(queries), QUERY_BLOCK):
                part = slice(start, start + QUERY_BLOCK)
                _, rows = faiss.knn(queries[part], vectors, min(k, len(vectors)), metric=faiss.METRIC_INNER_PRODUCT)
                # Scored again one pair at a time: a block product's last bits depend on the block's shape.
                own = np.repeat(np.arange(len(rows)), rows.shape[1])
                similarity = pair_similarity(queries[part], own, vectors, rows.reshape(-1)).reshape(rows.shape)
                similarity = np.concatenate([best_similarity[part], similarity], axis=1)
                rows = np.concatenate([best_row[part], rows + first_row], axis=1)
                order = np.lexsort((rows, -similarity), axis=1)[:, :k]
                best_similarity[part] = np.take_along_axis(similarity, order, axis=1)
                best_row[part] = np.take_along_axis(rows, order, axis=1)
        first_row += len(vectors)
    return best_similarity, best_row


def pair_similarity(left: np.ndarray, left_rows: np.ndarray, right: np.ndarray, right_rows: np.ndarray) -> np.ndarray:
    """Inner products (P,) float32 of row `left_rows[p]` of `left` with row `right_rows[p]` of `right`."""
    result = np.empty(len(left_rows), np.float32)
    for start in range(0, len(left_rows), PAIR_BLOCK):
        part = slice(start, start + PAIR_BLOCK)
        one, other = left[left_rows[part]].astype(np.float32), right[right_rows[part]].astype(np.float32)
        result[part] = np.einsum("pd,pd->p", one, other)
    return result


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
