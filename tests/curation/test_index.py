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
