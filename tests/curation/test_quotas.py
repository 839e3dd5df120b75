"""Caps and weights: exact sums, as even as the sizes allow."""

import itertools
from fractions import Fraction

import numpy as np
import pytest

from curation.quotas import (
    apportion,
    balanced_counts,
    cap_evenly,
    cap_evenly_within,
    cluster_counts,
    dataset_weights,
    max_chosen_clusters,
    row_weights,
    temperature_counts,
)
from curation.retrieval_modes import Request, expected_rows, mode_of


def brute_force(sizes: list[int], cap: int) -> list[int]:
    """Take one at a time from the first of the groups with the fewest taken that have more."""
    taken = [0] * len(sizes)
    for _ in range(min(cap, sum(sizes))):
        groups = [index for index, size in enumerate(sizes) if taken[index] < size]
        taken[min(groups, key=lambda index: taken[index])] += 1
    return taken


def test_empty_groups_and_a_cap_of_zero() -> None:
    assert cap_evenly([], 5) == cap_evenly([], 0) == cap_evenly([], None) == []
    assert cap_evenly([0, 0], 5) == [0, 0]
    assert cap_evenly([3, 4], 0) == [0, 0]
    assert cap_evenly([3, 4], None) == [3, 4]
    assert cap_evenly([7], 5) == [5]


@pytest.mark.parametrize("num_groups", [1, 2, 3, 4])
def test_all_small_cases_agree_with_taking_one_at_a_time(num_groups: int) -> None:
    for sizes in itertools.product(range(5), repeat=num_groups):
        for cap in range(sum(sizes) + 2):
            assert cap_evenly(sizes, cap) == brute_force(list(sizes), cap)


@pytest.mark.parametrize("seed", range(30))
def test_sum_is_exact_and_a_larger_cap_never_takes_less(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = (rng.pareto(1, int(rng.integers(1, 40))) * 100).astype(int).tolist()
    total, before = sum(sizes), [0] * len(sizes)
    for cap in sorted({0, total, total + 1, *rng.integers(0, total + 1, 30).tolist()}):
        taken = cap_evenly(sizes, cap)
        assert sum(taken) == min(cap, total)
        assert all(0 <= count <= size for count, size in zip(taken, sizes, strict=True))
        assert all(count >= count_before for count, count_before in zip(taken, before, strict=True))
        cut = [count for count, size in zip(taken, sizes, strict=True) if count < size]
        assert not cut or max(taken) <= min(cut) + 1, "one group gives more while a group that gives less has more"
        before = taken


def test_huge_sizes_are_exact() -> None:
    assert cap_evenly([2**60, 2**60, 1], 2**60 + 2) == [2**59 + 1, 2**59, 1]


@pytest.mark.parametrize(("sizes", "cap"), [([-1], 3), ([3], -1), ([], -1), ([5, -2], None)])
def test_negative_numbers_are_refused(sizes: list[int], cap: int | None) -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        cap_evenly(sizes, cap)


@pytest.mark.parametrize("temperature", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(10))
def test_mean_weight_is_one_and_shares_go_as_rows_to_the_power(seed: int, temperature: float) -> None:
    rng = np.random.default_rng(seed)
    rows = {f"dataset {n}": int(count) for n, count in enumerate(rng.integers(0, 10_000, int(rng.integers(1, 9))))}
    rows["one"] = 1
    weights = dataset_weights(rows, temperature)
    assert set(weights) == {name for name, count in rows.items() if count}
    mass = {name: weights[name] * rows[name] for name in weights}
    assert sum(mass.values()) == pytest.approx(sum(rows.values()))
    for name in weights:
        assert mass[name] / mass["one"] == pytest.approx(rows[name] ** temperature)


def test_ends_of_the_temperature() -> None:
    rows = {"large": 900, "small": 100, "none": 0}
    assert dataset_weights(rows, 1.0) == pytest.approx({"large": 1.0, "small": 1.0})
    assert dataset_weights(rows, 0.0) == pytest.approx({"large": 500 / 900, "small": 5.0})
    assert dataset_weights({}, 0.5) == dataset_weights({"none": 0}, 0.5) == {}


@pytest.mark.parametrize("temperature", [-0.1, 1.1, float("nan")])
def test_temperature_outside_its_range_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match=r"temperature must lie in \[0, 1\]"):
        dataset_weights({"a": 1}, temperature)


# Many groups at once, and hierarchies


@pytest.mark.parametrize("seed", range(60))
def test_capping_within_many_parents_agrees_with_capping_each(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_parents, num_children = int(rng.integers(1, 7)), int(rng.integers(0, 25))
    parents = rng.integers(0, num_parents, num_children)
    sizes = (rng.pareto(0.7, num_children) * 3).astype(np.int64) * rng.integers(0, 2, num_children)
    caps = rng.integers(0, 40, num_parents)
    taken = cap_evenly_within(parents, sizes, caps)
    for parent in range(num_parents):
        assert taken[parents == parent].tolist() == cap_evenly(sizes[parents == parent].tolist(), int(caps[parent]))


def hierarchy(seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Parents of one to four levels, some clusters empty or without children, and sizes."""
    rng = np.random.default_rng(seed)
    counts = sorted(rng.integers(1, 30, int(rng.integers(1, 5))).tolist(), reverse=True)
    parents = [rng.integers(0, above, below) for below, above in itertools.pairwise(counts)]
    return parents, (rng.pareto(1, counts[0]) * 10).astype(np.int64)


def drawn_by_recursion(parents: list[np.ndarray], sizes: np.ndarray, total: int) -> list[int]:
    """A plain implementation: split the count of a node evenly over its children, then the count of each child."""
    level_sizes = [sizes]
    for level, parent in enumerate(parents, 1):
        num_clusters = max(len(parents[level]) if level < len(parents) else 0, int(parent.max()) + 1)
        level_sizes.append(np.array([level_sizes[-1][parent == c].sum() for c in range(num_clusters)]))
    result = [0] * len(sizes)

    def split(level: int, members: list[int], count: int) -> None:
        member_sizes = [int(level_sizes[level][member]) for member in members]
        for member, member_count in zip(members, cap_evenly(member_sizes, count), strict=True):
            if level == 0:
                result[member] = member_count
            else:
                split(level - 1, np.flatnonzero(parents[level - 1] == member).tolist(), member_count)

    split(len(parents), list(range(len(level_sizes[-1]))), min(total, int(sizes.sum())))
    return result


@pytest.mark.parametrize("seed", range(40))
def test_balanced_counts_agree_with_splitting_node_by_node(seed: int) -> None:
    parents, sizes = hierarchy(seed)
    for total in (0, 1, 7, int(sizes.sum()) // 3, int(sizes.sum()), int(sizes.sum()) + 5):
        counts = balanced_counts(parents, sizes, total)
        assert counts.dtype == np.int64
        assert counts.sum() == min(total, sizes.sum())
        assert ((counts >= 0) & (counts <= sizes)).all()
        assert counts.tolist() == drawn_by_recursion(parents, sizes, total)


def test_rare_branches_get_an_equal_share() -> None:
    # Two clusters at the top: one holds a cluster of 100 images, the other 50 clusters of 100.
    parents, sizes = [np.array([0] + [1] * 50)], np.full(51, 100)
    assert balanced_counts(parents, sizes, 200).tolist() == [100] + [2] * 50
    assert balanced_counts([], sizes, 51).tolist() == [1] * 51


def test_balance_without_images_or_clusters() -> None:
    empty = np.array([], np.int64)
    assert balanced_counts([], empty, 5).tolist() == []
    assert balanced_counts([empty], empty, 5).tolist() == []
    assert balanced_counts([np.array([0])], np.array([0]), 5).tolist() == [0]
    assert balanced_counts([], np.array([3]), 5).tolist() == [3]


@pytest.mark.parametrize(
    ("parents", "sizes", "total", "message"),
    [
        ([np.array([0, 0])], np.array([1]), 1, "level 0 has 2 parents for 1 clusters"),
        ([], np.array([-1, 2]), 1, "sizes must not be negative"),
        ([], np.array([1, 2]), -1, "total must not be negative"),
    ],
)
def test_invalid_hierarchies_are_refused(
    parents: list[np.ndarray], sizes: np.ndarray, total: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        balanced_counts(parents, sizes, total)


# Weights


@pytest.mark.parametrize("seed", range(40))
def test_apportioned_counts_are_within_one_of_the_exact_shares(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_groups = int(rng.integers(1, 12))
    sizes = (rng.pareto(1, num_groups) * 50).astype(int).tolist()
    weights = (rng.random(num_groups) * rng.integers(0, 2, num_groups)).tolist()
    available = sum(size for size, weight in zip(sizes, weights, strict=True) if weight)
    for total in (0, 1, available // 3, available, available + 3):
        taken = apportion(sizes, weights, total)
        assert sum(taken) == min(total, available)
        assert all(0 <= count <= size for count, size in zip(taken, sizes, strict=True))
        # The exact share of a group is min(size, weight * t) for one t, which bisection gives.
        low, high = Fraction(0), Fraction(10**30)
        for _ in range(300):
            middle = (low + high) / 2
            level = sum(min(Fraction(s), Fraction(w) * middle) for s, w in zip(sizes, weights, strict=True))
            low, high = (middle, high) if level < min(total, available) else (low, middle)
        for count, size, weight in zip(taken, sizes, weights, strict=True):
            assert abs(count - min(Fraction(size), Fraction(weight) * high)) < 1 + Fraction(1, 10**9)


def test_apportion_by_hand() -> None:
    assert apportion([], [], 5) == []
    assert apportion([9, 9], [0.0, 0.0], 5) == [0, 0]
    assert apportion([5, 5, 5], [1, 1, 1], 10) == [4, 3, 3], "ties go to the first"
    assert apportion([100, 100, 100], [1, 2, 3], 11) == [2, 4, 5], "the largest remainder first: 1.83, 3.67, 5.5"
    assert apportion([1, 100, 100], [1, 1, 2], 31) == [1, 10, 20], "the other groups share the rest of a small group"
    assert apportion([2**60, 2**60], [0.1, 0.2], 3 * 2**58 + 1)[0] == 2**58


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_temperature_counts_are_apportioned_by_size_to_the_power(temperature: float) -> None:
    sizes = [9000, 900, 90, 0]
    taken = temperature_counts(sizes, temperature, 111)
    assert sum(taken) == 111
    assert taken == {0.0: [37, 37, 37, 0], 0.5: [78, 25, 8, 0], 1.0: [100, 10, 1, 0]}[temperature]


@pytest.mark.parametrize(
    ("sizes", "weights", "total", "message"),
    [
        ([1], [1, 2], 1, "sizes and weights must be equally many"),
        ([-1], [1], 1, "must not be negative"),
        ([1], [1], -1, "must not be negative"),
        ([1], [-0.5], 1, "weights must not be negative"),
        ([1], [float("nan")], 1, "NaN"),
    ],
)
def test_invalid_sizes_weights_and_totals_are_refused(
    sizes: list[int], weights: list[float], total: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        apportion(sizes, weights, total)


def test_row_weights_give_the_stated_shares() -> None:
    weights = row_weights({"a": 10, "b": 90, "none": 0}, {"a": 3.0, "b": 1.0, "none": 5.0})
    assert weights == pytest.approx({"a": 7.5, "b": 25 / 90})


# The rows of a dataset


@pytest.mark.parametrize("seed", range(20))
def test_rows_of_a_dataset(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 20, int(rng.integers(0, 8))).tolist()
    num_seeds, k, per_cluster, cap = (int(n) for n in rng.integers(1, 30, 4))
    request = Request(num_seeds=num_seeds, k=k, cluster_sizes=sizes, images_per_cluster=per_cluster, cap=cap)
    sample = expected_rows("sample", request, as_is=False)
    assert (sample.as_is, sample.before_cap, sample.retrieved, sample.rows) == (
        0,
        num_seeds * k,
        num_seeds * k,
        sample.before_cap,
    )
    cluster = expected_rows("cluster", request, as_is=True)
    before_cap = sum(min(size, per_cluster) for size in sizes)
    assert (cluster.as_is, cluster.before_cap, cluster.retrieved) == (num_seeds, before_cap, min(before_cap, cap))
    assert cluster.rows == num_seeds + min(before_cap, cap)
    counts = cluster_counts(sizes, per_cluster, cap)
    assert sum(counts) == cluster.retrieved
    assert all(count <= min(size, per_cluster) for count, size in zip(counts, sizes, strict=True))
    none = expected_rows("none", request, as_is=True)
    assert (none.before_cap, none.rows) == (0, num_seeds)


def test_mode_by_size_and_max_chosen_clusters() -> None:
    assert [mode_of("by_size", count, 10) for count in (0, 10, 11)] == ["cluster", "cluster", "sample"]
    assert [mode_of(mode, 99, 10) for mode in ("sample", "cluster", "none")] == ["sample", "cluster", "none"]
    assert [max_chosen_clusters(count, 3) for count in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]
