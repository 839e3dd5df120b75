"""Runs the shards of a stage on the ranks of a world, which torchrun started.

The first rank leads: it alone calls the stage, through a RankRunner, and writes what is written once. The others follow
it: they wait for the names of shards, do their share of them, and send back the records.
"""

import functools
import json
from collections.abc import Callable, Generator, Sequence
from typing import final

from curation.engine.manifest import ShardRecord
from curation.engine.ranks import World, texts_of_ranks
from curation.engine.runner import Runner, Shard, Worker, name_shard
from curation.engine.stage import make_marking_worker


@final
class RankRunner(Runner):
    """The leading rank's runner. `dismiss` must be called when the stage is done, or the others wait for more.

    A rank that fails takes the others with it: their next exchange fails, and torchrun stops them.
    """

    def __init__(self, world: World) -> None:
        assert world.is_first
        self._world = world
        self.num_workers = world.num_ranks

    def map(
        self, stage: str, make_worker: Callable[[], Worker], shards: Sequence[Shard], *, max_poison_shards: int = 0
    ) -> Generator[ShardRecord, None, None]:
        texts_of_ranks(self._world, json.dumps([shard.name for shard in shards]))
        yield from _exchanged(self._world, stage, make_worker, shards)

    def dismiss(self) -> None:
        """Tell the others that there are no more shards."""
        texts_of_ranks(self._world, "[]")


def follow(world: World, stage: str, make_worker: Callable[[], Worker], shards: Sequence[Shard], output: str) -> None:
    """What every rank but the first calls, with all shards of the stage: does its share of what is left of them."""
    by_name = {shard.name: shard for shard in shards}
    make_marking = functools.partial(make_marking_worker, make_worker, output)
    while names := json.loads(texts_of_ranks(world, "")[0]):
        _exchanged(world, stage, make_marking, [by_name[name] for name in names])


def _exchanged(
    world: World, stage: str, make_worker: Callable[[], Worker], shards: Sequence[Shard]
) -> list[ShardRecord]:
    """The records of all shards, of which this rank does every so many-th."""
    worker: Worker | None = None
    own = []
    for shard in shards[world.rank :: world.num_ranks]:
        try:
            worker = worker or make_worker()
            own.append(worker(shard).model_dump_json())
        except Exception as error:
            raise name_shard(stage, shard, error) from error
    by_rank = [json.loads(text) for text in texts_of_ranks(world, json.dumps(own))]
    records = [by_rank[place % world.num_ranks][place // world.num_ranks] for place in range(len(shards))]
    return [ShardRecord.model_validate_json(record) for record in records]
