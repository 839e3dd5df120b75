"""The contract between a stage and its runner. If the code disagrees with this text, the code is wrong.

1.  A runner has one operation, `map(stage, make_worker, shards)`. `make_worker` is a picklable function without
    arguments. It returns a worker: a function that processes one shard. Expensive objects (a model, an index) are
    created in `make_worker`, once per worker process.
2.  A shard is a name and a small picklable description: paths, offsets, ids. A result is small too. Workers exchange
    pixels through files, never through messages between processes.
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
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

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


class Runner(ABC):
    """Maps a worker over shards by the contract above."""

    num_workers: int
    """Maximum number of shards in progress at once."""

    @abstractmethod
    def map(
        self, stage: str, make_worker: Callable[[], Worker], shards: Sequence[Shard], *, max_poison_shards: int = 0
    ) -> Generator[ShardRecord | None, None, None]:
        """Yields the result of every shard, in the order of the shards."""


class InlineRunner(Runner):
    """Processes one shard after another in this process. A poison shard therefore ends the process."""

    num_workers = 1

    def map(
        self, stage: str, make_worker: Callable[[], Worker], shards: Sequence[Shard], *, max_poison_shards: int = 0
    ) -> Generator[ShardRecord | None, None, None]:
        worker: Worker | None = None
        for shard in shards:
            try:
                worker = worker or make_worker()
                result = worker(shard)
            except Exception as error:
                raise shard_error(stage, shard, error) from error
            yield result


def shard_error(stage: str, shard: Shard, error: Exception) -> SeedbedError:
    """The error to raise for `error`; its message names the stage and the shard (contract, point 5)."""
    where = f"{stage}, shard {shard.name}: "
    if isinstance(error, UserError):
        return type(error)(where + str(error))
    return ShardError(f"{where}{type(error).__name__}: {error}")
