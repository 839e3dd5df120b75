"""Caps and weights: exact sums, as even as can be."""

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
    most_clusters,
    row_weights,
    temperature_counts,
)
from curation.retrieval_modes import Request, expected_rows, mode_of


def brute_force(sizes: list[int], cap: int) -> list[int]:
    """One at a time to the first of those that have least and can have more."""
    taken = [0] * len(sizes)
    for _ in range(min(cap, sum(sizes))):
        able = [index for index, size in enumerate(sizes) if taken[index] < size]
        taken[min(able, key=lambda index: taken[index])] += 1
    return taken


def test_nothing_to_take_or_nothing_allowed() -> None:
    assert cap_evenly([], 5) == cap_evenly([], 0) == cap_evenly([], None) == []
    assert cap_evenly([0, 0], 5) == [0, 0]
    assert cap_evenly([3, 4], 0) == [0, 0]
    assert cap_evenly([3, 4], None) == [3, 4]
    assert cap_evenly([7], 5) == [5]


@pytest.mark.parametrize("num_groups", [1, 2, 3, 4])
def test_all_small_cases_agree_with_handing_out_one_by_one(num_groups: int) -> None:
    for sizes in itertools.product(range(5), repeat=num_groups):
        for cap in range(sum(sizes) + 2):
            assert cap_evenly(sizes, cap) == brute_force(list(sizes), cap)


@pytest.mark.parametrize("seed", range(30))
def test_sum_is_exact_and_more_allowed_never_takes_less(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = (rng.pareto(1, int(rng.integers(1, 40))) * 100).astype(int).tolist()
    total, before = sum(sizes), [0] * len(sizes)
    for cap in sorted({0, total, total + 1, *rng.integers(0, total + 1, 30).tolist()}):
        taken = cap_evenly(sizes, cap)
        assert sum(taken) == min(cap, total)
        assert all(0 <= few <= size for few, size in zip(taken, sizes, strict=True))
        assert all(few >= fewer for few, fewer in zip(taken, before, strict=True))
        cut = [few for few, size in zip(taken, sizes, strict=True) if few < size]
        assert not cut or max(taken) <= min(cut) + 1, "one group has more while another could have had it"
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
    """The rule read plainly: split what a node gives evenly over its children's sizes, and go on below each."""
    held = [sizes]
    for parent in parents:
        num_clusters = max(len(parents[len(held)]) if len(held) < len(parents) else 0, int(parent.max()) + 1)
        held.append(np.array([held[-1][parent == c].sum() for c in range(num_clusters)]))
    result = [0] * len(sizes)

    def split(level: int, members: list[int], amount: int) -> None:
        for member, part in zip(members, cap_evenly([int(held[level][m]) for m in members], amount), strict=True):
            if level == 0:
                result[member] = part
            else:
                split(level - 1, np.flatnonzero(parents[level - 1] == member).tolist(), part)

    split(len(parents), list(range(len(held[-1]))), min(total, int(sizes.sum())))
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


def test_rare_branches_are_not_drowned() -> None:
    # Two halves of the world: one cluster of 100, and 50 clusters of 100.
    parents, sizes = [np.array([0] + [1] * 50)], np.full(51, 100)
    assert balanced_counts(parents, sizes, 200).tolist() == [100] + [2] * 50
    assert balanced_counts([], sizes, 51).tolist() == [1] * 51


def test_balance_of_nothing() -> None:
    empty = np.array([], np.int64)
    assert balanced_counts([], empty, 5).tolist() == []
    assert balanced_counts([empty], empty, 5).tolist() == []
    assert balanced_counts([np.array([0])], np.array([0]), 5).tolist() == [0]
    assert balanced_counts([], np.array([3]), 5).tolist() == [3]


@pytest.mark.parametrize(
    ("parents", "sizes", "total", "message"),
    [
        ([np.array([0, 0])], np.array([1]), 1, "parents of level 0 are 2, its clusters 1"),
        ([], np.array([-1, 2]), 1, "sizes must not be negative"),
        ([], np.array([1, 2]), -1, "total must not be negative"),
    ],
)
def test_hierarchies_that_cannot_be_are_refused(
    parents: list[np.ndarray], sizes: np.ndarray, total: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        balanced_counts(parents, sizes, total)


# Weights


@pytest.mark.parametrize("seed", range(40))
def test_apportioned_counts_are_within_one_of_the_exact_shares(seed: int) -> None:
    rng = np.random.default_rng(seed)
    number = int(rng.integers(1, 12))
    sizes = (rng.pareto(1, number) * 50).astype(int).tolist()
    weights = (rng.random(number) * rng.integers(0, 2, number)).tolist()
    there = sum(size for size, weight in zip(sizes, weights, strict=True) if weight)
    for total in (0, 1, there // 3, there, there + 3):
        taken = apportion(sizes, weights, total)
        assert sum(taken) == min(total, there)
        assert all(0 <= few <= size for few, size in zip(taken, sizes, strict=True))
        # The exact shares: for some level t, everyone has min(size, weight * t). Found by halving.
        low, high = Fraction(0), Fraction(10**30)
        for _ in range(300):
            middle = (low + high) / 2
            level = sum(min(Fraction(s), Fraction(w) * middle) for s, w in zip(sizes, weights, strict=True))
            low, high = (middle, high) if level < min(total, there) else (low, middle)
        for few, size, weight in zip(taken, sizes, weights, strict=True):
            assert abs(few - min(Fraction(size), Fraction(weight) * high)) < 1 + Fraction(1, 10**9)


def test_apportion_by_hand() -> None:
    assert apportion([], [], 5) == []
    assert apportion([9, 9], [0.0, 0.0], 5) == [0, 0]
    assert apportion([5, 5, 5], [1, 1, 1], 10) == [4, 3, 3], "ties go to the first"
    assert apportion([100, 100, 100], [1, 2, 3], 11) == [2, 4, 5], "the largest remainder first: 1.83, 3.67, 5.5"
    assert apportion([1, 100, 100], [1, 1, 2], 31) == [1, 10, 20], "what a small group cannot give, the others share"
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
        ([1], [1, 2], 1, "as many weights as sizes"),
        ([-1], [1], 1, "must not be negative"),
        ([1], [1], -1, "must not be negative"),
        ([1], [-0.5], 1, "weights must not be negative"),
        ([1], [float("nan")], 1, "NaN"),
    ],
)
def test_what_cannot_be_apportioned_is_refused(
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
    num_seeds, k, most, cap = (int(n) for n in rng.integers(1, 30, 4))
    request = Request(num_seeds=num_seeds, k=k, cluster_sizes=sizes, images_per_cluster=most, cap=cap)
    sample = expected_rows("sample", request, as_is=False)
    assert (sample.as_is, sample.before_cap, sample.retrieved, sample.rows) == (
        0,
        num_seeds * k,
        num_seeds * k,
        sample.before_cap,
    )
    cluster = expected_rows("cluster", request, as_is=True)
    found = sum(min(size, most) for size in sizes)
    assert (cluster.as_is, cluster.before_cap, cluster.retrieved) == (num_seeds, found, min(found, cap))
    assert cluster.rows == num_seeds + min(found, cap)
    counts = cluster_counts(sizes, most, cap)
    assert sum(counts) == cluster.retrieved and all(n <= min(s, most) for n, s in zip(counts, sizes, strict=True))
    none = expected_rows("none", request, as_is=True)
    assert (none.before_cap, none.rows) == (0, num_seeds)


def test_mode_by_size_and_most_clusters() -> None:
    assert [mode_of("by_size", count, 10) for count in (0, 10, 11)] == ["cluster", "cluster", "sample"]
    assert [mode_of(mode, 99, 10) for mode in ("sample", "cluster", "none")] == ["sample", "cluster", "none"]
    assert [most_clusters(count, 3) for count in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]
