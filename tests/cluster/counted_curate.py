"""Runs `pipelines.curate` with a diary of every shard begun and done, and with workers that fail on command.

DIARY/begun/<stage>,<shard>,<random>     one file for each time that a worker began the shard
DIARY/done/<stage>,<shard>,<random>      one file for each time that a worker finished the shard
DIARY/faults/<stage>,<shard>             written by a test: the kind of fault; `poison` strikes every time, others once
"""

import functools
import os
import resource
import signal
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

from curation import ingest
from curation.config import load
from curation.engine import command
from curation.engine.manifest import ShardRecord
from curation.engine.runner import OnProgress, Runner, Shard, Worker
from curation.ingest import IngestConfig


class CountingRunner(Runner):
    """Wraps a runner: every shard is entered in the diary."""

    def __init__(self, runner: Runner, diary: Path) -> None:
        self._runner, self._diary = runner, diary
        self.num_workers = runner.num_workers

    def map(
        self,
        stage: str,
        make_worker: Callable[[], Worker],
        shards: Sequence[Shard],
        *,
        max_poison_shards: int = 0,
        on_progress: OnProgress = lambda reported: None,
    ) -> Generator[ShardRecord | None, None, None]:
        work = functools.partial(make_counting_worker, make_worker, self._diary, stage)
        yield from self._runner.map(stage, work, shards, max_poison_shards=max_poison_shards, on_progress=on_progress)


def make_counting_worker(make_worker: Callable[[], Worker], diary: Path, stage: str) -> Worker:
    worker = make_worker()

    def process(shard: Shard) -> ShardRecord:
        name = f"{stage},{shard.name}"
        (diary / "begun" / f"{name},{os.urandom(4).hex()}").touch()
        fault = diary / "faults" / name
        if fault.exists():
            strike(fault)
        record = worker(shard)
        (diary / "done" / f"{name},{os.urandom(4).hex()}").touch()
        return record

    return process


def strike(fault: Path) -> None:
    """Make this process fail in the way that the file `fault` says."""
    kind = fault.read_text()
    if kind != "poison":
        fault.unlink()
    if kind == "memory":
        present = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (present + 2**26, present + 2**26))
        bytearray(2**28)
    os.kill(os.getpid(), signal.SIGKILL)


def command_line(
    config: str, output: str, diary: str, runner: command.RunnerName = "ray", only_ingest: bool = False
) -> None:
    """Run the pipeline, or its first stage, with three workers."""
    for folder in ("begun", "done", "faults"):
        Path(diary, folder).mkdir(parents=True, exist_ok=True)
    with command.open_runner(runner, 3) as chosen:
        counting = CountingRunner(chosen, Path(diary).resolve())
        if only_ingest:
            ingest.run(load(IngestConfig, config, section="ingest"), output, counting)
        else:
            from pipelines import main_path

            main_path.run(load(main_path.CurateConfig, config), output, counting)


if __name__ == "__main__":
    from tests.cluster import counted_curate

    command.main(counted_curate.command_line)
