"""The items of a stage that are done, and how many there are, from its shards and from reports inside them.

The number of items of a shard is known before the work (`Shard.num_items`), or the worker reports it, or it is unknown
until the shard ends: no header of a tar says how many images it holds. The mean of the finished ones then estimates the
others; before the first has finished, the total is unknown.
"""

from collections.abc import Mapping, Sequence
from typing import final

from curation.engine.progress import Counts
from curation.engine.runner import Reported, Shard


@final
class ShardCounts:
    """Counts for the shards of one map. A shard counts once, whatever its attempts reported."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._num_shards = len(shards)
        self._unfinished = {shard.name: shard.num_items for shard in shards}
        self._reported: Mapping[str, Reported] = {}
        self._num_unknown = sum(not shard.num_items for shard in shards)  # unfinished shards of unknown size
        self._left = sum(self._unfinished.values())  # items of the other unfinished shards
        self._done = 0
        self._sizes: list[int] = [0, 0]  # of finished shards whose size was unknown: their number, and their items

    def report(self, reported: Mapping[str, Reported]) -> None:
        """Take the latest reports of all shards in progress, by name."""
        self._reported = reported

    def finish(self, name: str, num_items: int) -> None:
        """Count a finished shard with its items."""
        known = self._drop(name)
        self._done += num_items
        if not known:
            self._sizes = [self._sizes[0] + 1, self._sizes[1] + num_items]

    def set_aside(self, name: str) -> None:
        """Count a shard that has no result: its items are no longer part of the total."""
        self._drop(name)

    def _drop(self, name: str) -> int:
        known = self._unfinished.pop(name)
        self._left -= known
        self._num_unknown -= not known
        return known

    def counts(self) -> Counts:
        """The counts now."""
        mean = self._sizes[1] / self._sizes[0] if self._sizes[0] else None
        done, total = self._done, float(self._done + self._left)
        num_estimated = self._num_unknown
        for name, (num_items, size) in self._reported.items():
            known = self._unfinished.get(name)
            if known is None:
                continue
            part = min(num_items, size) if size else num_items
            if known:
                done += known * part // size if size else min(part, known)
                continue
            done += part
            if size:
                num_estimated -= 1
                total += size
            else:  # at least the items that it has, at least the mean: the mean is added below
                total += max(0.0, part - (mean or 0.0))
        shards = self._num_shards - len(self._unfinished), self._num_shards
        if num_estimated and mean is None:
            return Counts(done, None, shards=shards)
        total += num_estimated * (mean or 0.0)
        return Counts(done, max(done, round(total)), is_estimate=num_estimated > 0, shards=shards)
