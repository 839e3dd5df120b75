"""The behaviour of every stage around its shards, beyond the runner contract."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import pytest

from curation.config import NotInPlan, Settings
from curation.engine.manifest import (
    PROGRESS_NAME,
    Manifest,
    ShardRecord,
    done_shards,
    mark_shard_done,
    read_done,
    read_manifest,
)
from curation.engine.runner import InlineRunner, Shard
from curation.engine.stage import Stage, Tally, run_stage
from curation.errors import InputError, RejectBudgetError
from curation.files import paths


class CountConfig(Settings):
    limit: Annotated[int, NotInPlan] = 10
    scale: int = 1


def make_worker(output: str) -> Callable[[Shard], ShardRecord]:
    def process(shard: Shard) -> ShardRecord:
        file = paths.write_bytes(f"{output}/count-{shard.name}.txt", b"x" * shard.work)
        return ShardRecord(name=shard.name, files=(file,), totals={"count": shard.work})

    return process


def run(folder: Path, config: CountConfig, works: Sequence[int]) -> Manifest:
    def check(done: Tally) -> None:
        if (total := done.totals["count"]) > config.limit:
            raise RejectBudgetError(f"{total} is above {config.limit}")

    stage = Stage(
        name="count",
        config=config,
        inputs={},
        output=str(folder),
        shards=[Shard(f"{number:05d}", work) for number, work in enumerate(works)],
        make_worker=functools.partial(make_worker, str(folder)),
        check=check,
    )
    return run_stage(stage, InlineRunner())


@pytest.mark.parametrize("works", [[11], [5, 6], [5, 6, 1], [11, 0, 0]])
def test_failed_check_fails_again_until_its_limit_is_raised(tmp_path: Path, works: list[int]) -> None:
    for _ in range(3):
        with pytest.raises(RejectBudgetError, match="11 is above 10"):
            run(tmp_path, CountConfig(), works)
        assert read_manifest(str(tmp_path)) is None
    manifest = run(tmp_path, CountConfig(limit=20), works)
    assert manifest.totals == {"count": sum(works)}
    assert "limit" not in manifest.plan.config
    assert run(tmp_path, CountConfig(limit=0), works) == manifest, "a finished stage is not checked again"


@pytest.mark.parametrize("storage", ["local", "memory"])
@pytest.mark.parametrize("stop", [0, 1, 3, 4, 7, 9, 10])
def test_merged_markers_count_as_markers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: str, stop: int
) -> None:
    monkeypatch.setattr("curation.engine.manifest.MARKERS_PER_FILE", 3)
    output = f"memory://{tmp_path.name}/{stop}" if storage == "memory" else str(tmp_path / "out")
    calls: list[str] = []
    seen: list[tuple[int, int]] = []

    def make() -> Callable[[Shard], ShardRecord]:
        worker = make_worker(output)

        def process(shard: Shard) -> ShardRecord:
            if len(calls) == stop:
                raise InputError("stop")
            calls.append(shard.name)
            return worker(shard)

        return process

    def attempt() -> Manifest:
        stage = Stage(
            name="count",
            config=CountConfig(),
            inputs={},
            output=output,
            shards=[Shard(f"{number:05d}", number) for number in range(10)],
            make_worker=make,
            check=lambda done: seen.append((done.num_shards, done.totals["count"])),
        )
        return run_stage(stage, InlineRunner())

    if stop < 10:
        with pytest.raises(InputError, match="stop"):
            attempt()
        assert done_shards(output) == {f"{number:05d}" for number in range(stop)}
        names = paths.list_names(paths.join(output, PROGRESS_NAME))
        assert len(names) == 1 + stop // 3 + stop % 3
        if stop >= 3:  # as after a kill, before the single markers were deleted
            mark_shard_done(output, next(read_done(output)))
        stop = -1
    manifest = attempt()
    assert seen[-1] == (10, 45) and manifest.totals == {"count": 45}
    assert [record.name for record in manifest.shards] == [f"{number:05d}" for number in range(10)]
    assert len(set(calls)) == len(calls), "no shard is processed twice"
    assert PROGRESS_NAME not in paths.list_names(output)
    uninterrupted = tmp_path / "uninterrupted"
    assert run(uninterrupted, CountConfig(limit=100), list(range(10))).shards == manifest.shards
