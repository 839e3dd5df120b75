"""Caps and weights: exact sums, as even as can be."""

import itertools

import numpy as np
import pytest

from curation.balance import cap_evenly, dataset_weights


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
