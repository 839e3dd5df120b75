"""Prefetch results in threads, so that reading and decoding continue while a model or a product computes.

Results come in the order of the items, whichever thread finishes first, so that bytes do not depend on the threads.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Threads, and results prefetched, when files are read. Assumed: an object store answers in 50 to 200 ms, and each file
# takes memory.
FILES_AHEAD = 2


@dataclass
class Meter:
    """Counts of a prefetch so far, which show whether the caller or the threads are slower."""

    taken: int = 0
    """Results taken by the caller."""
    ready: int = 0
    """Results ready when one was taken, summed over all results taken."""
    seconds_waited: float = 0.0
    """Time that the caller waited for results, in seconds."""


def prefetch(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    threads: int = FILES_AHEAD,
    ahead: int = FILES_AHEAD,
    meter: Meter | None = None,
) -> Iterator[Result]:
    """`function(item)` for each item, in order. Threads compute up to `ahead` results before the caller takes them.

    The caller's thread iterates over `items`. An error is raised in place of its item's result; later results are
    dropped, as they are when the caller stops early.
    """
    meter = meter or Meter()
    pool = ThreadPoolExecutor(threads)
    waiting: deque[Future[Result]] = deque()

    def take() -> Result:
        meter.taken += 1
        meter.ready += sum(future.done() for future in waiting)
        started = time.perf_counter()
        result = waiting.popleft().result()
        meter.seconds_waited += time.perf_counter() - started
        return result

    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield take()
        while waiting:
            yield take()
    finally:
        pool.shutdown(cancel_futures=True)
