"""The runner contract: the same tests for both runners, and equal bytes."""

import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from curation.config import Settings
from curation.engine.manifest import Manifest, ShardRecord
from curation.engine.ray_runner import RayRunner
from curation.engine.runner import InlineRunner, Reported, Runner, Shard, Worker, report
from curation.engine.stage import PREPARED, Stage, run_stage
from curation.errors import InputError, ShardError
from curation.files import paths


class SquareConfig(Settings):
    offset: int = 0


def make_worker(output: str, call_log: str) -> Worker:
    """The worker writes a square to a file and counts its calls in the folder `call_log`; some shards raise."""
    os.makedirs(call_log, exist_ok=True)
    Path(call_log, f"worker-{os.getpid()}-{os.urandom(4).hex()}").touch()

    def process(shard: Shard) -> ShardRecord:
        Path(call_log, f"shard-{shard.name}-{os.urandom(4).hex()}").touch()
        match shard.work:
            case "wrong input":
                raise InputError("the file is empty")
            case "bug":
                raise ZeroDivisionError("oh")
            case "reports":  # until the driver has seen it, which writes the file
                for _ in range(3):
                    report(5, total=20)
                deadline = time.monotonic() + 30
                while not Path(call_log, "seen").exists() and time.monotonic() < deadline:
                    time.sleep(0.02)
                report(5)
        value = shard.work**2 if isinstance(shard.work, int) else 0
        file = paths.write_bytes(paths.join(output, f"square-{shard.name}.txt"), str(value).encode())
        return ShardRecord(name=shard.name, files=(file,), totals={"sum": value})

    return process


def shards_of(works: list[object]) -> list[Shard]:
    return [Shard(f"{number:05d}", work, 1) for number, work in enumerate(works)]


@pytest.fixture(scope="module", params=["inline", "ray, 1 worker", "ray, 2 workers"])
def runner(request: pytest.FixtureRequest, no_shared_ray: None) -> Iterator[Runner]:
    if request.param == "inline":
        yield InlineRunner()
        return
    ray_runner = RayRunner(num_workers=int(request.param.split()[1]))
    yield ray_runner
    ray_runner.close()


@pytest.fixture
def worker(tmp_path: Path) -> Callable[[], Worker]:
    return functools.partial(make_worker, str(tmp_path / "out"), str(tmp_path / "call_log"))


def run(runner: Runner, tmp_path: Path, works: list[object], config: SquareConfig | None = None) -> Manifest:
    output, call_log = str(tmp_path / "out"), str(tmp_path / "call_log")
    stage = Stage(
        name="square",
        config=config or SquareConfig(),
        inputs={"numbers": "1"},
        output=output,
        shards=shards_of(works),
        make_worker=functools.partial(make_worker, output, call_log),
        prepare=functools.partial(write_table_of_squares, output, call_log),
    )
    return run_stage(stage, runner)


def write_table_of_squares(output: str, call_log: str) -> ShardRecord:
    os.makedirs(call_log, exist_ok=True)
    Path(call_log, f"prepared-{os.urandom(4).hex()}").touch()
    return ShardRecord(name=PREPARED, files=(paths.write_bytes(paths.join(output, "table.txt"), b"squares"),))


def calls(tmp_path: Path, pattern: str = "shard-*") -> int:
    return len(list((tmp_path / "call_log").glob(pattern)))


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_results_come_in_order(runner: Runner, worker: Callable[[], Worker]) -> None:
    results = list(runner.map("square", worker, shards_of(list(range(40)))))
    assert [record.totals["sum"] for record in results] == [number**2 for number in range(40)]


def test_no_shards_give_no_results_and_no_worker(runner: Runner, worker: Callable[[], Worker], tmp_path: Path) -> None:
    assert list(runner.map("square", worker, [])) == []
    assert calls(tmp_path, "*") == 0


def test_worker_is_created_once_per_process(runner: Runner, worker: Callable[[], Worker], tmp_path: Path) -> None:
    list(runner.map("square", worker, shards_of(list(range(12)))))
    made = [path.name.split("-")[1] for path in (tmp_path / "call_log").glob("worker-*")]
    assert 1 <= len(made) == len(set(made)) <= 2


@pytest.mark.parametrize(("work", "kind"), [("wrong input", InputError), ("bug", ShardError)])
def test_error_names_the_stage_and_the_shard(
    runner: Runner, worker: Callable[[], Worker], work: str, kind: type[Exception]
) -> None:
    with pytest.raises(kind, match=r"square, shard 00003: .*(empty|ZeroDivisionError: oh)"):
        list(runner.map("square", worker, shards_of([0, 1, 2, work, 4])))


def test_error_in_make_worker_names_a_shard(runner: Runner) -> None:
    with pytest.raises(InputError, match=r"square, shard 0000[01]: no model at '/nowhere'"):
        list(runner.map("square", make_no_worker, shards_of([1, 2])))


def test_items_inside_a_shard_reach_the_driver_while_it_runs(
    runner: Runner, worker: Callable[[], Worker], tmp_path: Path
) -> None:
    seen: list[dict[str, Reported]] = []

    def on_progress(reported: Mapping[str, Reported]) -> None:
        seen.append(dict(reported))
        if reported.get("00001") == Reported(15, 20):
            (tmp_path / "call_log/seen").touch()

    records = runner.map("square", worker, shards_of([1, "reports", 3]), on_progress=on_progress)
    assert [record.totals["sum"] for record in records if record] == [1, 0, 9]
    assert (tmp_path / "call_log/seen").exists()
    assert all(reported.num_items <= 20 for shards in seen for reported in shards.values())


def test_a_report_outside_a_map_is_ignored() -> None:
    report(1, total=2)


def make_no_worker() -> Worker:
    raise InputError("no model at '/nowhere'")


def test_stage_gives_the_same_bytes_with_every_runner(runner: Runner, tmp_path: Path) -> None:
    run(runner, tmp_path, list(range(20)))
    run(InlineRunner(), tmp_path / "reference", list(range(20)))
    assert bytes_in(tmp_path / "out") == bytes_in(tmp_path / "reference" / "out")


def test_second_run_does_no_work(runner: Runner, tmp_path: Path) -> None:
    first = run(runner, tmp_path, [1, 2, 3])
    before = calls(tmp_path, "*")
    assert run(runner, tmp_path, [1, 2, 3]) == first
    assert calls(tmp_path, "*") == before
    assert first.totals == {"sum": 14}


def test_stopped_run_continues_and_gives_the_same_bytes(runner: Runner, tmp_path: Path) -> None:
    with pytest.raises(ShardError):
        run(runner, tmp_path, [0, 1, 2, 3, "bug", 5])
    finished = calls(tmp_path)
    assert not (tmp_path / "out" / "manifest.json").exists()
    run(runner, tmp_path, [0, 1, 2, 3, 4, 5])
    assert calls(tmp_path) <= finished + 3  # the failed shard, and shards that had not started or not finished
    assert calls(tmp_path, "prepared-*") == 1
    run(InlineRunner(), tmp_path / "reference", [0, 1, 2, 3, 4, 5])
    assert bytes_in(tmp_path / "out") == bytes_in(tmp_path / "reference" / "out")


def test_closing_early_stops_the_workers(runner: Runner, worker: Callable[[], Worker], tmp_path: Path) -> None:
    results = runner.map("square", worker, shards_of(list(range(1000))))
    assert next(results).totals == {"sum": 0}
    results.close()
    assert calls(tmp_path) < 1000
