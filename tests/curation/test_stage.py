"""What every stage does around its shards, beyond what the runner contract already shows."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from curation import storage
from curation.config import Settings
from curation.errors import RejectBudgetError
from curation.runner import InlineRunner, Shard
from curation.stage import Tally, run_shards
from curation.storage import Manifest, ShardRecord


class CountConfig(Settings):
    limit: int = 10
    scale: int = 1


def make_worker(output: str) -> Callable[[Shard], ShardRecord]:
    def process(shard: Shard) -> ShardRecord:
        file = storage.write_bytes(f"{output}/count-{shard.name}.txt", b"x" * shard.work)
        return ShardRecord(name=shard.name, files=(file,), totals={"count": shard.work})

    return process


def run(folder: Path, config: CountConfig, works: Sequence[int]) -> Manifest:
    def check(done: Tally) -> None:
        if (total := done.totals["count"]) > config.limit:
            raise RejectBudgetError(f"{total} is above {config.limit}")

    return run_shards(
        "count",
        config=config,
        inputs={},
        output=str(folder),
        runner=InlineRunner(),
        shards=[Shard(f"{number:05d}", work) for number, work in enumerate(works)],
        make_worker=functools.partial(make_worker, str(folder)),
        check=check,
        not_in_plan=frozenset({"limit"}),
    )


@pytest.mark.parametrize("works", [[11], [5, 6], [5, 6, 1], [11, 0, 0]])
def test_check_that_failed_fails_again_until_what_it_guards_is_changed(tmp_path: Path, works: list[int]) -> None:
    for _ in range(3):
        with pytest.raises(RejectBudgetError, match="11 is above 10"):
            run(tmp_path, CountConfig(), works)
        assert storage.read_manifest(str(tmp_path)) is None
    manifest = run(tmp_path, CountConfig(limit=20), works)
    assert manifest.totals == {"count": sum(works)}
    assert "limit" not in manifest.plan.config
    assert run(tmp_path, CountConfig(limit=0), works) == manifest, "what is done is done"
