"""The contract between a stage and its runner. If the code disagrees with this text, the code is wrong.

1.  A runner has one operation, `map(stage, make_worker, shards)`. `make_worker` is a picklable function without
    arguments. It returns a worker: a function that processes one shard. Expensive objects (a model, an index) are
    created in `make_worker`, once per worker process.
2.  A shard is a name and a small picklable description: paths, offsets, ids. A result is small too. Workers exchange
    pixels through files, never through messages between processes. The only other messages are reports of progress
    (point 8).
3.  The result and the files of a shard depend only on the shard, the stage's config, the stage's inputs and the random
    seed. They do not depend on the worker, the order of the shards or earlier work. So every runner gives the same
    bytes, with any number of workers.
4.  Success: results come in the order of the shards. A fixed number bounds the shards that are in progress, and the
    results that wait for an earlier shard.
5.  Failure of the code: when a worker or `make_worker` raises, the map stops and raises an error that names the stage
    and the shard. A UserError keeps its type (exit status 2); any other error becomes a ShardError. Shards that
    finished before keep their files and markers.
6.  Failure of a process (Ray): when a worker process or its machine dies, its shard is assigned again, up to
    `MAX_ATTEMPTS` times in all. Meanwhile the remaining workers continue. A shard whose worker dies at every attempt is
    a poison shard. Its result is None for at most `max_poison_shards` shards; one more raises a ShardError with its
    name.
7.  Cancellation: closing the iterator early stops the workers. Shards that finished before keep their files and
    markers.
8.  Progress: inside a shard, a worker may call `report` with the items that it has done. The runner calls `on_progress`
    in the driver, about once a second, with the sums for all shards in progress: begun, and their result not yet given.
    For that a worker process sends a name and two numbers, at most once a second, however many images it reads. Reports
    are for the display only: they change no result, and they may come late or not at all. A new attempt at a shard
    begins with no items.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from curation.engine.manifest import ShardRecord
from curation.errors import SeedbedError, ShardError, UserError

# Attempts at one shard whose worker dies. Assumed: a machine rarely fails three times in a row; a shard that kills its
# worker does so every time.
MAX_ATTEMPTS = 3


@dataclass(frozen=True)
class Shard:
    """One unit of work of a stage."""

    name: str
    """Unique within the stage."""
    work: Any
    """Input of the worker."""
    num_items: int = 0
    """Images (or rows) in this shard, for progress; 0 when the number is unknown before the work."""


Worker = Callable[[Shard], ShardRecord]


class Reported(NamedTuple):
    """The items of a shard that its worker has done so far."""

    num_items: int = 0
    total: int = 0
    """The items of the shard in the same unit; 0 where the worker does not know the number."""


# Receives the reports of all shards in progress, by name.
OnProgress = Callable[[Mapping[str, Reported]], object]


class Runner(ABC):
    """Maps a worker over shards by the contract above."""

    num_workers: int
    """Maximum number of shards in progress at once."""

    @abstractmethod
    def map(
        self,
        stage: str,
        make_worker: Callable[[], Worker],
        shards: Sequence[Shard],
        *,
        max_poison_shards: int = 0,
        on_progress: OnProgress = lambda reported: None,
    ) -> Generator[ShardRecord | None, None, None]:
        """Yields the result of every shard, in the order of the shards."""


class InlineRunner(Runner):
    """Processes one shard after another in this process. A poison shard therefore ends the process."""

    num_workers = 1

    def map(
        self,
        stage: str,
        make_worker: Callable[[], Worker],
        shards: Sequence[Shard],
        *,
        max_poison_shards: int = 0,
        on_progress: OnProgress = lambda reported: None,
    ) -> Generator[ShardRecord | None, None, None]:
        worker: Worker | None = None
        for shard in shards:
            try:
                worker = worker or make_worker()
                result = process(worker, shard, on_progress, {})
            except Exception as error:
                raise shard_error(stage, shard, error) from error
            yield result


def process(worker: Worker, shard: Shard, on_progress: OnProgress, reported: dict[str, Reported]) -> ShardRecord:
    """The result of a shard in this process. `on_progress` gets its reports, beside what `reported` holds already."""

    def listen(of_shard: Reported) -> None:
        reported[shard.name] = of_shard
        on_progress(reported)

    with listening(listen):
        return worker(shard)


# Who receives the reports of the worker in this process. A stage inside the work of another one adds its own, so the
# last one counts.
_listeners: list[Callable[[int, int], None]] = []


def report(num_items: int, *, total: int = 0) -> None:
    """Report that the worker has done `num_items` more items of its shard.

    total: the items of the shard in the same unit, where the worker knows the number. They need not be those of
    `Shard.num_items`: then the share of `total` counts. Outside a map nothing happens. One thread of a worker may call
    it at a time.
    """
    if _listeners:
        _listeners[-1](num_items, total)


@contextlib.contextmanager
def listening(listen: Callable[[Reported], None]) -> Iterator[None]:
    """Call `listen` with the sum of the reports of this process in the block, after each."""
    sums = Reported()

    def add(num_items: int, total: int) -> None:
        nonlocal sums
        sums = Reported(sums.num_items + num_items, total or sums.total)
        listen(sums)

    _listeners.append(add)
    try:
        yield
    finally:
        _listeners.remove(add)


def num_items_of(shard: Shard, record: ShardRecord) -> int:
    """The items of a finished shard: the number that was known before, or else the rows of its files."""
    return shard.num_items or sum(file.rows for file in record.files)


def shard_error(stage: str, shard: Shard, error: Exception) -> SeedbedError:
    """The error to raise for `error`; its message names the stage and the shard (contract, point 5)."""
    where = f"{stage}, shard {shard.name}: "
    if isinstance(error, UserError):
        return type(error)(where + str(error))
    return ShardError(f"{where}{type(error).__name__}: {error}")
