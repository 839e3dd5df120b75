"""Runs the shards of a stage on the ranks that torchrun started.

The first rank is the leader: only it runs the stage, with a RankRunner, and writes the stage's single files. The other
ranks are followers: they receive names of shards, process their share of them, and send the records back.
"""

import functools
import json
from collections.abc import Callable, Generator, Sequence
from typing import final

from curation.engine.manifest import ShardRecord
from curation.engine.ranks import World, gather_texts
from curation.engine.runner import OnProgress, Reported, Runner, Shard, Worker, process, shard_error
from curation.engine.stage import make_marking_worker


@final
class RankRunner(Runner):
    """The runner of the leader. Call `close` when the stage is done: until then the followers wait for shards.

    If one rank fails, the next exchange fails on every other rank, and torchrun stops them all.
    """

    def __init__(self, world: World) -> None:
        assert world.is_first
        self._world = world
        self.num_workers = world.num_ranks

    def map(
        self,
        stage: str,
        make_worker: Callable[[], Worker],
        shards: Sequence[Shard],
        *,
        max_poison_shards: int = 0,
        on_progress: OnProgress = lambda reported: None,
    ) -> Generator[ShardRecord, None, None]:
        """See the contract. The reports of the leader's worker alone reach `on_progress`."""
        gather_texts(self._world, json.dumps([shard.name for shard in shards]))
        yield from _process_and_exchange(self._world, stage, make_worker, shards, on_progress)

    def close(self) -> None:
        """Tell the followers that there are no more shards."""
        gather_texts(self._world, "[]")


def follow(world: World, stage: str, make_worker: Callable[[], Worker], shards: Sequence[Shard], output: str) -> None:
    """Process this rank's share of the unfinished shards until the leader closes its runner.

    Every rank except the first calls this. shards: all shards of the stage, finished or not.
    """
    by_name = {shard.name: shard for shard in shards}
    make_marking = functools.partial(make_marking_worker, make_worker, output)
    while names := json.loads(gather_texts(world, "")[0]):
        _process_and_exchange(world, stage, make_marking, [by_name[name] for name in names])


def _process_and_exchange(
    world: World,
    stage: str,
    make_worker: Callable[[], Worker],
    shards: Sequence[Shard],
    on_progress: OnProgress = lambda reported: None,
) -> list[ShardRecord]:
    """The records of all shards, equal on every rank. Rank r of R processes the shards r, r + R, r + 2 R, ..."""
    worker: Worker | None = None
    rank_records = []
    reported: dict[str, Reported] = {}  # of finished shards too: their records come with those of all ranks
    for shard in shards[world.rank :: world.num_ranks]:
        try:
            worker = worker or make_worker()
            rank_records.append(process(worker, shard, on_progress, reported).model_dump_json())
        except Exception as error:
            raise shard_error(stage, shard, error) from error
    by_rank = [json.loads(text) for text in gather_texts(world, json.dumps(rank_records))]
    records = [by_rank[index % world.num_ranks][index // world.num_ranks] for index in range(len(shards))]
    return [ShardRecord.model_validate_json(record) for record in records]
