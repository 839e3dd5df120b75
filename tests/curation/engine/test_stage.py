"""The behaviour of every stage around its shards, beyond the runner contract."""

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


def run(
    folder: Path | str,
    config: CountConfig,
    works: Sequence[int],
    *,
    replace: bool = False,
    prepare: Callable[[], ShardRecord] | None = None,
    done: list[str] | None = None,
) -> Manifest:
    """Run a stage that writes as many bytes as each of `works` says. `done` collects the names of its shards."""

    def make() -> Callable[[Shard], ShardRecord]:
        worker = make_worker(str(folder))

        def process(shard: Shard) -> ShardRecord:
            if done is not None:
                done.append(shard.name)
            return worker(shard)

        return process

    def check(done: Tally) -> None:
        if (total := done.totals["count"]) > config.limit:
            raise RejectBudgetError(f"{total} is above {config.limit}")

    stage = Stage(
        name="count",
        config=config,
        inputs={},
        output=str(folder),
        shards=[Shard(f"{number:05d}", work) for number, work in enumerate(works)],
        make_worker=make,
        prepare=prepare,
        check=check,
    )
    return run_stage(stage, InlineRunner(), replace=replace)


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


def spoil(path: str, damage: str) -> None:
    """Damage a file. "bit" keeps its size."""
    if damage == "deleted":
        paths.delete(path)
        return
    data = paths.read_bytes(path)
    spoiled = {"emptied": b"", "cut": data[:-1], "bit": bytes([data[0] ^ 1]) + data[1:]}[damage]
    paths.write_bytes(path, spoiled)


@pytest.mark.parametrize("storage", ["local", "memory"])
@pytest.mark.parametrize("damage", ["deleted", "emptied", "cut", "bit"])
def test_damage_after_the_end_is_named_and_replace_repairs_it(tmp_path: Path, storage: str, damage: str) -> None:
    output = f"memory://{tmp_path.name}" if storage == "memory" else str(tmp_path)
    whole = run(output, CountConfig(), [1, 2, 3])
    spoil(f"{output}/count-00001.txt", damage)
    done: list[str] = []
    if damage != "bit":  # other bytes of the same size are seen by `replace`, and by the stage that reads them
        with pytest.raises(InputError, match=r"count-00001\.txt (is missing|has \d bytes).*--replace"):
            run(output, CountConfig(), [1, 2, 3], done=done)
    assert done == []
    assert run(output, CountConfig(), [1, 2, 3], replace=True, done=done) == whole
    assert done == ["00001"]
    assert paths.read_bytes(f"{output}/count-00001.txt") == b"xx"
    assert run(output, CountConfig(), [1, 2, 3], done=done) == whole and done == ["00001"]
    if storage == "memory":
        paths.delete(output)


def test_a_repair_prepares_again(tmp_path: Path) -> None:
    """The workers read files that `prepare` left in the progress folder, and these are deleted at the end."""
    prepared: list[bool] = []

    def prepare() -> ShardRecord:
        prepared.append(True)
        return ShardRecord(name="prepared", files=(paths.write_bytes(f"{tmp_path}/start.txt", b"start"),))

    whole = run(tmp_path, CountConfig(), [1, 2, 3], prepare=prepare)
    for name, expected in (("count-00002.txt", ["00002"]), ("start.txt", [])):
        (tmp_path / name).unlink()
        done: list[str] = []
        assert run(tmp_path, CountConfig(), [1, 2, 3], prepare=prepare, replace=True, done=done) == whole
        assert done == expected
    assert len(prepared) == 3 and (tmp_path / "start.txt").read_bytes() == b"start"


@pytest.mark.parametrize("damage", ["deleted", "cut"])
def test_damage_of_a_finished_shard_of_an_unfinished_stage_is_done_again(tmp_path: Path, damage: str) -> None:
    with pytest.raises(RejectBudgetError):
        run(tmp_path, CountConfig(), [4, 5, 6])
    spoil(f"{tmp_path}/count-00001.txt", damage)
    done: list[str] = []
    manifest = run(tmp_path, CountConfig(limit=15), [4, 5, 6], done=done)
    assert manifest.totals == {"count": 15} and done == ["00001"]
    assert (tmp_path / "count-00001.txt").read_bytes() == b"x" * 5
