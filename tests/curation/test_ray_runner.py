"""What only Ray can do: lose a worker process and go on (runner contract, point 6), and keep strangers out."""

import functools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from curation.errors import ConfigError, ShardError
from curation.ray_runner import RayRunner
from curation.runner import Shard, Worker
from curation.storage import ShardRecord


def make_worker(diary: str) -> Worker:
    """Counts its calls in the folder `diary`; some shards kill their worker, once or always."""

    def process(shard: Shard) -> ShardRecord:
        Path(diary, f"{shard.name}-{os.urandom(4).hex()}").touch()
        if shard.work == "dies" or (shard.work == "dies once" and calls(diary, shard.name) == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        return ShardRecord(name=shard.name, totals={"process": os.getpid()})

    return process


def calls(diary: str | Path, name: str) -> int:
    return len(list(Path(diary).glob(f"{name}-*")))


def shards_of(works: list[str]) -> list[Shard]:
    return [Shard(str(number), work) for number, work in enumerate(works)]


@pytest.fixture(scope="module")
def runner() -> Iterator[RayRunner]:
    ray_runner = RayRunner(num_workers=2)
    yield ray_runner
    ray_runner.close()


@pytest.fixture
def worker(tmp_path: Path) -> Callable[[], Worker]:
    return functools.partial(make_worker, str(tmp_path))


def test_shard_of_a_dead_worker_is_given_out_again(
    runner: RayRunner, worker: Callable[[], Worker], tmp_path: Path
) -> None:
    results = list(runner.map("stage", worker, shards_of(["lives", "dies once", "lives", "lives"])))
    assert [record.name for record in results] == ["0", "1", "2", "3"]
    assert [calls(tmp_path, name) for name in "0123"] == [1, 2, 1, 1]


def test_shard_that_always_kills_its_worker_is_named(runner: RayRunner, worker: Callable[[], Worker]) -> None:
    with pytest.raises(ShardError, match="stage, shard 1: its worker died 3 times"):
        list(runner.map("stage", worker, shards_of(["lives", "dies", "lives", "lives"])))


def test_two_workers_are_two_processes(runner: RayRunner, worker: Callable[[], Worker]) -> None:
    results = list(runner.map("stage", worker, shards_of(["lives"] * 20)))
    assert len({record.totals["process"] for record in results} - {os.getpid()}) == 2


def test_stranger_without_the_token_is_refused(runner: RayRunner) -> None:
    address = ray.get_runtime_context().gcs_address
    join = [sys.executable, "-c", f"import ray; ray.init(address={address!r}, log_to_driver=False); print('joined')"]
    for token, joins in ((os.environ["RAY_AUTH_TOKEN"], True), ("0" * 64, False)):
        result = subprocess.run(
            join, env={**os.environ, "RAY_AUTH_TOKEN": token}, capture_output=True, text=True, timeout=120
        )
        assert (result.returncode == 0) == joins, result.stderr
        assert ("joined" in result.stdout) == joins


def test_a_runner_needs_a_worker() -> None:
    with pytest.raises(ConfigError, match="Found: 0"):
        RayRunner(num_workers=0)
