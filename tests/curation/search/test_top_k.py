"""Top k and ranks within groups equal brute force, ties included, also for no rows, one row and equal rows."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from curation.search.top_k import (
    merge_into_best,
    rank_by_similarity,
    rank_in_groups,
    sort_into_groups,
    starts_group,
    top_k_of_groups,
)

DTYPES: list[Any] = [np.int32, np.int64, "S6", np.float32]
COUNTS = [0, 1, 2, 300]


def sorted_groups(seed: int, count: int, dtype: Any) -> np.ndarray:
    """Groups of unequal sizes, whose rows stand together."""
    numbers = np.sort(np.random.default_rng(seed).integers(0, 20, count))
    groups: np.ndarray = numbers.astype(dtype)
    return groups


def brute_force_ranks(groups: np.ndarray) -> list[int]:
    values = groups.tolist()
    return [values[:row].count(value) for row, value in enumerate(values)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", COUNTS)
def test_rank_counts_the_rows_before_in_the_group(count: int, dtype: Any) -> None:
    for seed in range(5):
        groups = sorted_groups(seed, count, dtype)
        ranks = rank_in_groups(groups)
        assert ranks.dtype == np.int64 and ranks.tolist() == brute_force_ranks(groups)
        assert starts_group(groups).tolist() == [rank == 0 for rank in brute_force_ranks(groups)]
    assert rank_in_groups(np.zeros(count, dtype)).tolist() == list(range(count))


@pytest.mark.parametrize("count", COUNTS)
def test_a_change_in_any_column_starts_a_group(count: int) -> None:
    rng = np.random.default_rng(count)
    columns = rng.integers(0, 3, count), rng.integers(0, 3, count).astype("S2"), rng.integers(0, 2, count)
    rows = list(zip(*(column.tolist() for column in columns), strict=True))
    expected = [row == 0 or rows[row] != rows[row - 1] for row in range(count)]
    is_first = starts_group(*columns)
    assert is_first.dtype == bool and is_first.tolist() == expected


def test_rows_that_stand_apart_are_two_groups() -> None:
    assert rank_in_groups(np.array([1, 1, 0, 1, 1, 1])).tolist() == [0, 1, 0, 0, 1, 2]
    assert rank_in_groups(np.array([-1, -1, 0])).tolist() == [0, 1, 0]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("num_groups", [1, 7, 400])
def test_sorted_groups_keep_their_order_and_have_bounds(num_groups: int, count: int) -> None:
    groups = np.random.default_rng(count).integers(0, num_groups, count)
    order, bounds = sort_into_groups(groups, num_groups)
    assert len(bounds) == num_groups + 1 and sorted(order.tolist()) == list(range(count))
    for group in range(num_groups):
        assert order[bounds[group] : bounds[group + 1]].tolist() == np.flatnonzero(groups == group).tolist()


def brute_force_top_k(groups: np.ndarray, limits: dict[Any, int], keys: list[np.ndarray]) -> list[int]:
    """The first rows of each group by all keys, equal ones by row."""
    chosen: list[int] = []
    for group in sorted(set(groups.tolist())):
        rows = [row for row, value in enumerate(groups.tolist()) if value == group]
        rows.sort(key=lambda row: (*(key[row] for key in keys), row))
        chosen += rows[: limits[group]]
    return chosen


@pytest.mark.parametrize("num_keys", [0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", COUNTS)
def test_top_k_of_groups_equals_brute_force(count: int, dtype: Any, num_keys: int) -> None:
    rng = np.random.default_rng(count)
    groups = rng.integers(0, 9, count).astype(dtype)
    keys = [rng.integers(0, 4, count).astype(kind) for kind in (np.float32, "S3", np.int64)][:num_keys]
    for k in (1, 2, 1000):
        rows = top_k_of_groups(groups, k, *keys)
        assert rows.dtype == np.int64
        assert rows.tolist() == brute_force_top_k(groups, dict.fromkeys(groups.tolist(), k), keys)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("count", COUNTS)
def test_every_group_may_have_its_own_k(count: int, dtype: type) -> None:
    rng = np.random.default_rng(count)
    groups, key = rng.integers(0, 9, count).astype(dtype), rng.integers(0, 4, count)
    k = rng.integers(0, 40, 9)
    rows = top_k_of_groups(groups, k, key)
    assert rows.tolist() == brute_force_top_k(groups, dict(enumerate(k.tolist())), [key])


def test_the_first_key_decides_before_the_second() -> None:
    groups, first, second = np.zeros(3, np.int64), np.array([1, 0, 0]), np.array([0, 2, 1])
    assert top_k_of_groups(groups, 3, first, second).tolist() == [2, 1, 0]
    assert top_k_of_groups(groups, 3, -first, second).tolist() == [0, 2, 1]


FLOATS = np.array([-np.inf, -1.5, -0.1, -1e-40, -0.0, 0.0, 1e-40, 0.1, 1.0, np.inf], np.float32)


@pytest.mark.parametrize("num_queries", [1, 5, 2**11, 2**11 + 1, 2**40])  # from 2,048 on without the 64-bit key
@pytest.mark.parametrize("count", COUNTS)
def test_rank_by_similarity_equals_a_stable_sort(count: int, num_queries: int) -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        query = rng.integers(0, num_queries, count) if seed else np.full(count, num_queries - 1)
        similarity = np.where(rng.random(count) < 0.5, rng.choice(FLOATS, count), rng.random(count).astype(np.float32))
        order, rank = rank_by_similarity(query, similarity)
        expected = sorted(range(count), key=lambda row: (query[row], -similarity[row], row))
        assert order.tolist() == expected
        assert rank.tolist() == brute_force_ranks(query[expected])


def test_rank_by_similarity_with_and_without_the_key_gives_one_order() -> None:
    rng = np.random.default_rng(0)
    query, similarity = rng.integers(0, 2**11, 5000), rng.choice(FLOATS, 5000)
    fast = rank_by_similarity(query, similarity)
    slow = rank_by_similarity(query + 2**20, similarity)
    np.testing.assert_array_equal(fast, slow)


def best_of_all(pairs: list[tuple[int, int, float]], num_queries: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    similarity = np.full((num_queries, k), -np.inf, np.float32)
    rows = np.full((num_queries, k), -1, np.int64)
    for query in range(num_queries):
        best = sorted((-value, row) for number, row, value in pairs if number == query)[:k]
        for rank, (value, row) in enumerate(best):
            similarity[query, rank], rows[query, rank] = -value, row
    return similarity, rows


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("k", [1, 3, 50])
def test_merged_pairs_are_the_best_of_all(k: int, seed: int) -> None:
    """With many equal similarities, in batches of any size, some of them empty or of one pair."""
    rng = np.random.default_rng(seed)
    num_queries = int(rng.integers(1, 12))
    all_pairs = [(query, row) for query in range(num_queries) for row in range(40)]
    drawn = rng.permutation(len(all_pairs))[: int(rng.integers(0, len(all_pairs)))]
    pairs = [(*all_pairs[number], float(rng.choice([-0.5, 0.0, 0.25, 0.75]))) for number in drawn.tolist()]
    similarity = np.full((num_queries, k), -np.inf, np.float32)
    rows = np.full((num_queries, k), -1, np.int64)
    bounds = [0, 0, *np.sort(rng.integers(0, len(pairs) + 1, 5)).tolist(), len(pairs)]
    for start, stop in pairwise(bounds):
        batch = pairs[start:stop]
        query, row = np.array([pair[:2] for pair in batch], np.int64).reshape(-1, 2).T
        merge_into_best(similarity, rows, query, row, np.array([pair[2] for pair in batch], np.float32))
        expected = best_of_all(pairs[:stop], num_queries, k)
        np.testing.assert_array_equal(rows, expected[1])
        np.testing.assert_array_equal(similarity, expected[0])
