"""Counts over shards of known and unknown size, with reports that may be late, missing, too high or repeated."""

import random

import pytest

from curation.engine.progress import Counts
from curation.engine.runner import Reported, Shard
from curation.engine.shard_counts import ShardCounts


def check(counts: Counts) -> None:
    """No count above its total, and no time left that is negative or infinite."""
    assert counts.done >= 0
    assert counts.total is None or counts.done <= counts.total
    left = counts.seconds_left(10.0)
    assert left is None or 0 <= left < float("inf")
    fraction = counts.fraction
    assert fraction is not None and 0 <= fraction <= 1


def random_report(generator: random.Random, size: int) -> Reported:
    """Some items of a shard of this size; some workers know the size, and some report too many."""
    num_items = generator.choice([0, size // 2, size, generator.randint(0, 2 * size + 1)])
    return Reported(num_items, generator.choice([0, size, 7 * size]))


@pytest.mark.parametrize("seed", range(60))
def test_counts_stay_within_their_totals(seed: int) -> None:
    generator = random.Random(seed)
    sizes = [generator.choice([0, 1, 10, 1000, 100_000]) for _ in range(generator.randint(0, 12))]
    is_known = [generator.random() < generator.choice([0, 0.5, 1]) for _ in sizes]
    shards = [Shard(str(n), None, size if is_known[n] else 0) for n, size in enumerate(sizes)]
    counts = ShardCounts(shards)
    check(counts.counts())
    pending, running, total = list(range(len(shards))), list[int](), 0
    while pending or running:
        while pending and len(running) < 3:
            running.append(pending.pop(0))
        for _ in range(2):  # the second may be lower: a new attempt begins at 0
            counts.report({str(n): random_report(generator, sizes[n]) for n in running})
            check(counts.counts())
        finished = running.pop(generator.randrange(len(running)))
        if generator.random() < 0.1:
            counts.set_aside(str(finished))
        else:
            counts.finish(str(finished), sizes[finished])
            total += sizes[finished]
        check(counts.counts())
    counts.report({str(n): Reported(5, 5) for n in range(len(shards))})  # late reports of finished shards
    assert counts.counts() == Counts(total, total, shards=(len(shards), len(shards)))


def test_known_shards_have_an_exact_total_and_counts_inside() -> None:
    counts = ShardCounts([Shard("a", None, 100), Shard("b", None, 50)])
    assert counts.counts() == Counts(0, 150, shards=(0, 2))
    counts.report({"a": Reported(30), "b": Reported(200, 800)})  # b reports candidates: a quarter of its images
    assert counts.counts() == Counts(30 + 12, 150, shards=(0, 2))
    counts.report({"a": Reported(101), "b": Reported(900, 800)})
    assert counts.counts() == Counts(100 + 50, 150, shards=(0, 2)), "no shard counts above its items"
    counts.report({"b": Reported(200, 800)})
    counts.finish("a", 100)
    assert counts.counts() == Counts(100 + 12, 150, shards=(1, 2)), "finished shards count once"
    counts.report({"b": Reported(0)})
    assert counts.counts() == Counts(100, 150, shards=(1, 2)), "a new attempt begins with no items"


def test_unknown_shards_are_unknown_before_the_first_has_finished_and_then_estimated() -> None:
    counts = ShardCounts([Shard("seeds", None, 100), *(Shard(f"tar {n}", None) for n in range(4))])
    counts.report({"tar 0": Reported(46_100)})
    assert counts.counts() == Counts(46_100, None, shards=(0, 5))
    counts.finish("tar 0", 50_000)
    assert counts.counts() == Counts(50_000, 100 + 4 * 50_000, is_estimate=True, shards=(1, 5))
    counts.report({"tar 1": Reported(60_000), "tar 2": Reported(10)})
    assert counts.counts() == Counts(110_010, 100 + 60_000 + 3 * 50_000, is_estimate=True, shards=(1, 5))
    for number in (1, 2, 3):
        counts.finish(f"tar {number}", 1000)
    counts.report({"seeds": Reported(1)})
    assert counts.counts() == Counts(53_001, 53_100, shards=(4, 5)), "the total is exact when all tars are read"


def test_a_worker_that_knows_the_size_makes_the_total_known() -> None:
    counts = ShardCounts([Shard("a", None), Shard("b", None)])
    counts.report({"a": Reported(1, 10), "b": Reported(2, 20)})
    assert counts.counts() == Counts(3, 30, shards=(0, 2))
    counts.report({"a": Reported(15, 10), "b": Reported(2, 20)})
    assert counts.counts() == Counts(12, 30, shards=(0, 2))
