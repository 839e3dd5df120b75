"""Work ahead in threads, so that reading and decoding go on while a model or a product computes.

Results come in the order of the items, whatever thread was done first, so bytes do not depend on the threads.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Threads and results ahead when files are read. Assumed: an object store answers in 50 to 200 ms, and each file is
# memory.
FILES_AHEAD = 2


@dataclass
class Meter:
    """What a prefetch has told so far: whether the caller or the threads are the slower ones."""

    taken: int = 0
    """Results that the caller took."""
    ready: int = 0
    """Results that were ready when one was taken, summed."""
    seconds_waited: float = 0.0
    """How long the caller waited for results."""


def prefetch(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    threads: int = FILES_AHEAD,
    ahead: int = FILES_AHEAD,
    meter: Meter | None = None,
) -> Iterator[Result]:
    """`function(item)` for each item, in order. Up to `ahead` results are made by threads before they are asked for.

    `items` are taken by the caller's thread. An error of an item is raised in its place; those behind it are dropped,
    as they are when the caller stops early.
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
