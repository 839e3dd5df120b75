"""Times works by turns, so that a change of the machine's load meets them all."""

import time
from collections.abc import Callable, Mapping
from typing import Any


def by_turns(
    works: Mapping[str, Callable[[], Any]],
    num_rounds: int,
    *,
    num_warm_ups: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    before_each: Callable[[], Any] | None = None,
) -> dict[str, list[float]]:
    """The seconds of each work in every round after the warm-up rounds. `before_each` runs untimed before each work."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(num_warm_ups + num_rounds):
        for name, work in works.items():
            if before_each is not None:
                before_each()
            started = clock()
            work()
            seconds[name].append(clock() - started)
    return {name: values[num_warm_ups:] for name, values in seconds.items()}
