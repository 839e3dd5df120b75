"""How many of what: caps and weights, pure functions with exact integer results."""

from collections.abc import Mapping, Sequence

import numpy as np


def cap_evenly(sizes: Sequence[int], cap: int | None) -> list[int]:
    """How many to take from each group so that the total is at most `cap`, as evenly as the sizes allow.

    The largest level c with sum(min(size, c)) <= cap; what is then left goes, one each, to the first groups that have
    more. `None` takes everything. The total is min(cap, sum(sizes)) exactly.
    """
    if any(size < 0 for size in sizes):
        raise ValueError(f"sizes must not be negative. Found: {min(sizes)}")
    if cap is None or sum(sizes) <= cap:
        return list(sizes)
    if cap < 0:
        raise ValueError(f"cap must not be negative. Found: {cap}")
    low, high = 0, max(sizes)
    while low < high:
        middle = (low + high + 1) // 2
        if sum(min(size, middle) for size in sizes) <= cap:
            low = middle
        else:
            high = middle - 1
    taken = [min(size, low) for size in sizes]
    left = cap - sum(taken)
    for index, size in enumerate(sizes):
        if left and size > taken[index]:
            taken[index] += 1
            left -= 1
    return taken


def dataset_weights(rows: Mapping[str, int], temperature: float) -> dict[str, float]:
    """The weight of one row of each dataset, such that a dataset's share of all weight goes as rows ** temperature.

    1 leaves every row equal, 0 gives every dataset the same share. Mean weight over all rows is 1.
    """
    if not 0 <= temperature <= 1:
        raise ValueError(f"temperature must lie in [0, 1]. Found: {temperature}")
    filled = {name: count for name, count in rows.items() if count}
    mass = np.array([float(count) ** temperature for count in filled.values()])
    if not filled:
        return {}
    share = mass / mass.sum()
    total = sum(filled.values())
    return {name: float(share[i] * total / count) for i, (name, count) in enumerate(filled.items())}
