"""Search equals brute force, however the vectors are cut into blocks; k-means finds what is there."""

import numpy as np
import pytest

from curation import index
from tests.curation.builders import unit_vectors


def brute_force(queries: np.ndarray, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Similarities in float64 and rows of the k nearest, ties to the smallest row."""
    similarity = queries.astype(np.float64) @ vectors.astype(np.float64).T
    rows = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarity, rows, axis=1), rows


def grid_vectors(rng: np.random.Generator, count: int, width: int, distinct: int) -> np.ndarray:
    """Vectors with entries -1, 0 and 1 from a small set: sums are exact in any order, and many are equal."""
    return rng.integers(-1, 2, (distinct, width))[rng.integers(0, distinct, count)].astype(np.float32)


def cut(rng: np.random.Generator, vectors: np.ndarray, parts: int) -> list[np.ndarray]:
    """`vectors` in blocks at random places; some are empty."""
    return np.split(vectors, np.sort(rng.integers(0, len(vectors) + 1, parts)))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("seed", range(12))
def test_search_equals_brute_force(seed: int, dtype: type) -> None:
    rng = np.random.default_rng(seed)
    count, width, k = int(rng.integers(1, 2000)), int(rng.choice([2, 16, 100])), int(rng.choice([1, 4, 64]))
    vectors: np.ndarray = unit_vectors(seed, count, width).astype(dtype)
    queries = np.concatenate([vectors[:5], unit_vectors(seed + 100, 40, width).astype(dtype)])
    expected, _ = brute_force(queries, vectors, k)
    similarity, rows = index.search(queries, cut(rng, vectors, 3), k)
    assert similarity.shape == rows.shape == (len(queries), k)
    assert similarity.dtype == np.float32 and rows.dtype == np.int64
    num_found = min(k, count)
    np.testing.assert_allclose(similarity[:, :num_found], expected, atol=1e-5)
    own = np.einsum("qd,qkd->qk", queries.astype(np.float64), vectors.astype(np.float64)[rows[:, :num_found]])
    np.testing.assert_allclose(similarity[:, :num_found], own, atol=1e-5)
    assert all(len(set(row)) == num_found for row in rows[:, :num_found].tolist())
    assert (np.diff(similarity, axis=1)[:, : num_found - 1] <= 0).all()
    assert (rows[:, num_found:] == -1).all() and (similarity[:, num_found:] == -np.inf).all()


@pytest.mark.parametrize("k", [1, 5, 120])
@pytest.mark.parametrize("seed", range(8))
def test_ties_are_ranked_by_row(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = grid_vectors(rng, int(rng.integers(k, 3000)), 12, distinct=int(rng.integers(1, 60)))
    queries = grid_vectors(rng, 20, 12, distinct=20)
    expected, expected_rows = brute_force(queries, vectors, k)
    for blocks in ([vectors], cut(rng, vectors, 4)):
        similarity, rows = index.search(queries, blocks, k)
        np.testing.assert_array_equal(similarity, expected)
        # Those that tie with the last may be others; those before are these.
        before_last = expected > expected[:, -1:]
        np.testing.assert_array_equal(rows[before_last], expected_rows[before_last])
        tied = similarity[:, 1:] == similarity[:, :-1]
        assert (np.diff(rows, axis=1)[tied] > 0).all()


@pytest.mark.parametrize("seed", range(8))
def test_all_copies_are_found_in_order_where_there_is_room(seed: int) -> None:
    rng = np.random.default_rng(seed)
    distinct = unit_vectors(seed, int(rng.integers(30, 60)), int(rng.choice([37, 256]))).astype(np.float16)
    which = rng.integers(0, len(distinct), 1500)
    rows = index.search(distinct, [distinct[which]], 100)[1]
    for own, found in enumerate(rows):
        copies = np.flatnonzero(which == own)  # nothing is nearer to a vector than itself
        np.testing.assert_array_equal(found[: len(copies)], copies)


@pytest.mark.parametrize("seed", range(6))
def test_blocks_change_no_bit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = unit_vectors(seed, 1500, 130).astype(np.float16)
    queries = unit_vectors(seed + 50, 33, 130)
    similarity, rows = index.search(queries, [vectors], 10)
    for blocks in (cut(rng, vectors, 6), np.array_split(vectors, 20), iter([vectors[:0], vectors])):
        again = index.search(queries, blocks, 10)
        assert again[0].tobytes() == similarity.tobytes()
        assert again[1].tobytes() == rows.tobytes()
    one_by_one = [index.search(query[None], [vectors], 10) for query in queries]
    assert np.concatenate([rows for _, rows in one_by_one]).tobytes() == rows.tobytes()
    assert np.concatenate([own for own, _ in one_by_one]).tobytes() == similarity.tobytes()


def test_more_queries_than_are_searched_at_a_time() -> None:
    queries, vectors = unit_vectors(0, 2051, 3), unit_vectors(1, 7, 3)
    expected, rows = brute_force(queries, vectors, 2)
    found = index.search(queries, [vectors[:4], vectors[4:]], 2)
    np.testing.assert_allclose(found[0], expected, atol=1e-6)
    np.testing.assert_array_equal(found[1], rows)


@pytest.mark.parametrize("blocks", [[], [np.empty((0, 4), np.float16)], [np.empty((0, 4), np.float32)] * 3])
def test_nothing_to_find(blocks: list[np.ndarray]) -> None:
    similarity, rows = index.search(unit_vectors(0, 3, 4), blocks, 2)
    assert (similarity == -np.inf).all() and (rows == -1).all() and rows.shape == (3, 2)


def test_nobody_asks() -> None:
    similarity, rows = index.search(np.empty((0, 4), np.float16), [unit_vectors(0, 3, 4)], 2)
    assert similarity.shape == rows.shape == (0, 2)


def test_pair_similarity_is_the_inner_product_of_each_pair() -> None:
    left, right = unit_vectors(0, 30, 20).astype(np.float16), unit_vectors(1, 40, 20).astype(np.float16)
    rng = np.random.default_rng(0)
    rows, others = rng.integers(0, 30, index.PAIR_BLOCK + 5), rng.integers(0, 40, index.PAIR_BLOCK + 5)
    found = index.pair_similarity(left, rows, right, others)
    expected = np.einsum("pd,pd->p", left[rows].astype(np.float64), right[others].astype(np.float64))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert index.pair_similarity(left, rows[:0], right, others[:0]).shape == (0,)


# k-means


def separated(seed: int, num_clusters: int, points: int, width: int = 16) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points near `num_clusters` orthogonal directions, (N, D); which one each is near; the directions."""
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.normal(size=(width, width)))[0][:num_clusters].astype(np.float32)
    which = np.concatenate([np.arange(num_clusters), rng.integers(0, num_clusters, points - num_clusters)])
    matrix = directions[which] + rng.normal(scale=0.03, size=(points, width)).astype(np.float32)
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True), which, directions


@pytest.mark.parametrize("seed", range(5))
def test_kmeans_does_not_do_worse_than_the_clusters_that_are_there(seed: int) -> None:
    """One start may merge two clusters and split a third, as k-means does; the best of a few finds them all."""
    matrix, which, directions = separated(seed, 4, 400)
    best = max(
        (index.spherical_kmeans(matrix, 4, num_iterations=20, seed=start) for start in range(8)),
        key=lambda centroids: (matrix @ centroids.T).max(axis=1).sum(),
    )
    found = index.search(matrix, [best], 1)[1][:, 0]
    for cluster in range(4):
        assert len(set(which[found == cluster])) == 1
    np.testing.assert_allclose((directions @ best.T).max(axis=1), 1, atol=0.01)


@pytest.mark.parametrize("seed", range(5))
def test_kmeans_ends_where_every_centroid_is_the_mean_of_its_points(seed: int) -> None:
    matrix = unit_vectors(seed, 200, 4)
    centroids = index.spherical_kmeans(matrix, 6, num_iterations=200, seed=seed)
    nearest = (matrix @ centroids.T).argmax(axis=1)
    means = np.stack([matrix[nearest == cluster].mean(axis=0) for cluster in range(6)])
    np.testing.assert_allclose(centroids, means / np.linalg.norm(means, axis=1, keepdims=True), atol=1e-4)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("limit", [None, 3, 10_000])
def test_kmeans_is_deterministic_and_of_unit_length(dtype: type, limit: int | None) -> None:
    matrix: np.ndarray = unit_vectors(0, 500, 12).astype(dtype)
    before = matrix.copy()

    def centroids(seed: int) -> np.ndarray:
        return index.spherical_kmeans(matrix, 20, num_iterations=5, seed=seed, max_points_per_centroid=limit)

    first = centroids(1)
    assert first.shape == (20, 12) and first.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1, atol=1e-5)
    assert centroids(1).tobytes() == first.tobytes()
    assert centroids(2).tobytes() != first.tobytes()
    assert matrix.tobytes() == before.tobytes()


def test_kmeans_trains_on_all_points_unless_told_otherwise() -> None:
    """Of 3,000 points for one centroid faiss would sample 256."""
    matrix = unit_vectors(0, 3000, 6)
    mean = matrix.mean(axis=0) / np.linalg.norm(matrix.mean(axis=0))
    centroid = index.spherical_kmeans(matrix, 1, num_iterations=3, seed=0)[0]
    np.testing.assert_allclose(centroid, mean, atol=1e-4)
    sampled = index.spherical_kmeans(matrix, 1, num_iterations=3, seed=0, max_points_per_centroid=10)[0]
    assert np.abs(sampled - mean).max() > 1e-3


@pytest.mark.parametrize(
    ("matrix", "num_clusters"),
    [
        (unit_vectors(0, 1, 4), 1),
        (unit_vectors(0, 5, 4), 5),
        (np.repeat(unit_vectors(0, 1, 4), 10, axis=0), 3),
        (np.array([[1.0, 0], [-1.0, 0]], np.float32), 1),
    ],
    ids=["one point", "a cluster each", "all equal", "opposite"],
)
def test_kmeans_of_few_and_equal_points_is_finite(matrix: np.ndarray, num_clusters: int) -> None:
    centroids = index.spherical_kmeans(matrix, num_clusters, num_iterations=5, seed=0)
    assert np.isfinite(centroids).all()
    assert (index.search(matrix, [centroids], 1)[1] >= 0).all()
