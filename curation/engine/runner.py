"""The contract between a stage and what runs it. If the code disagrees with this text, the code is wrong.

1.  A runner has one operation, `map(stage, make_worker, shards)`. `make_worker` is a picklable function without
    arguments; it is called once per worker process and returns a function of one shard. What is dear (a model, an
    index) is made there.
2.  A shard is a name and a small picklable description: paths, offsets, ids. A result is small too. Pixels never
    travel between processes; files do.
3.  A worker's result and files depend on its shard, the stage's config and the seed alone: not on the worker, on the
    order, or on what ran before. So any runner, with any number of workers, gives the same bytes.
4.  Results come in the order of the shards. At most a fixed number of shards is under way at once.
5.  When a worker raises, or cannot be made, the run stops and the error names the stage and the shard: a UserError
    stays one (status 2), anything else becomes a ShardError. Shards that were finished by then stay finished.
6.  When a worker process or its machine dies, its shard is given out again, up to `MAX_ATTEMPTS` times, and work goes
    on with the workers that are left until it is back. A shard that loses its worker every time is poison: its result
    is None, as long as no more than `max_poison_shards` are; else a ShardError names it.
7.  Closing the iterator early stops the workers.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from curation.engine.manifest import ShardRecord
from curation.errors import SeedbedError, ShardError, UserError

# How often one shard may lose its worker before the run gives up on it. Assumed: a machine fails rarely three times in
# a row, a shard that kills its worker does so every time.
MAX_ATTEMPTS = 3


@dataclass(frozen=True)
class Shard:
    """One unit of work: a name that is unique within its stage, and what the worker needs to know."""

    name: str
    work: Any
    num_items: int = 0
    """Images (or rows) in this shard, for progress; 0 when not known beforehand."""


Worker = Callable[[Shard], ShardRecord]


class Runner(ABC):
    """Maps a worker over shards as the contract above says."""

    num_workers: int
    """How many shards it works on at once, at most."""

    @abstractmethod
    def map(
        self, stage: str, make_worker: Callable[[], Worker], shards: Sequence[Shard], *, max_poison_shards: int = 0
    ) -> Generator[ShardRecord | None, None, None]:
        """Yield the result of every shard, in order."""


class InlineRunner(Runner):
    """Runs everything in this process, one shard after another; poison ends the process."""

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
                raise name_shard(stage, shard, error) from error
            yield result


def name_shard(stage: str, shard: Shard, error: Exception) -> SeedbedError:
    """The error to raise for `error`, with the stage and the shard in its message (contract, point 5)."""
    where = f"{stage}, shard {shard.name}: "
    if isinstance(error, UserError):
        return type(error)(where + str(error))
    return ShardError(f"{where}{type(error).__name__}: {error}")
