"""Only for Ray: a worker process that dies (runner contract, point 6), and authentication."""

import contextlib
import functools
import itertools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import ray

from curation.config import Settings
from curation.engine import ray_runner
from curation.engine.manifest import Manifest, ShardRecord, read_manifest
from curation.engine.ray_runner import RayRunner
from curation.engine.runner import InlineRunner, Reported, Runner, Shard, Worker, report
from curation.engine.stage import Stage, run_stage
from curation.errors import ConfigError, ShardError
from curation.files import paths
from tests.curation.builders import bytes_in


class StageConfig(Settings):
    pass


def make_worker(call_log: str) -> Worker:
    """The worker counts its calls in the folder `call_log`. Some shards kill it, once or at every attempt."""

    def process(shard: Shard) -> ShardRecord:
        Path(call_log, f"{shard.name}-{os.urandom(4).hex()}").touch()
        if shard.work == "dies" or (shard.work == "dies once" and calls(call_log, shard.name) == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if shard.work == "meets":
            wait_for_another_process(Path(call_log))
        return ShardRecord(name=shard.name, totals={"process": os.getpid()})

    return process


def wait_for_another_process(call_log: Path) -> None:
    (call_log / f"process-{os.getpid()}").touch()
    deadline = time.monotonic() + 60
    while len(list(call_log.glob("process-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)


def calls(call_log: str | Path, name: str) -> int:
    return len(list(Path(call_log).glob(f"{name}-*")))


def make_reporting_worker(call_log: str) -> Worker:
    """The worker reports 7 items and dies; the next one reports 2. Both wait until the driver has seen their items."""

    def process(shard: Shard) -> ShardRecord:
        Path(call_log, f"{shard.name}-{os.urandom(4).hex()}").touch()
        attempt = calls(call_log, shard.name)
        num_items = 7 if attempt == 1 else 2
        report(num_items, total=10)
        deadline = time.monotonic() + 30
        while not Path(call_log, f"seen-{num_items}").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        if attempt == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return ShardRecord(name=shard.name)

    return process


class SlowToLoad:
    """Makes a worker that reports as its shard says. A process needs two seconds to load it."""

    def __reduce__(self) -> tuple[Callable[[], "SlowToLoad"], tuple[()]]:
        return _load_slowly, ()

    def __call__(self) -> Worker:
        def process(shard: Shard) -> ShardRecord:
            report(int(shard.work), total=10)
            return ShardRecord(name=shard.name)

        return process


def _load_slowly() -> SlowToLoad:
    time.sleep(2.0)
    return SlowToLoad()


def shards_of(works: list[str]) -> list[Shard]:
    return [Shard(str(number), work) for number, work in enumerate(works)]


@pytest.fixture(scope="module")
def runner(no_shared_ray: None) -> Iterator[RayRunner]:
    ray_runner = RayRunner(num_workers=2)
    yield ray_runner
    ray_runner.close()


@pytest.fixture
def worker(tmp_path: Path) -> Callable[[], Worker]:
    return functools.partial(make_worker, str(tmp_path))


def test_shard_of_a_dead_worker_is_assigned_again(
    runner: RayRunner, worker: Callable[[], Worker], tmp_path: Path
) -> None:
    results = list(runner.map("stage", worker, shards_of(["succeeds", "dies once", "succeeds", "succeeds"])))
    assert [record.name for record in results] == ["0", "1", "2", "3"]
    assert [calls(tmp_path, name) for name in "0123"] == [1, 2, 1, 1]


def test_items_of_a_dead_worker_count_no_more(runner: RayRunner, tmp_path: Path) -> None:
    seen: list[int] = []

    def on_progress(reported: Mapping[str, Reported]) -> None:
        seen.append(reported["0"].num_items if "0" in reported else 0)
        (tmp_path / f"seen-{seen[-1]}").touch()

    make = functools.partial(make_reporting_worker, str(tmp_path))
    assert len(list(runner.map("stage", make, shards_of(["reports"]), on_progress=on_progress))) == 1
    counts = [count for count, _ in itertools.groupby(seen)]
    assert counts in ([0, 7, 0, 2], [7, 0, 2], [0, 7, 2], [7, 2])


def test_items_of_an_earlier_map_do_not_count(runner: RayRunner) -> None:
    seen: list[int] = []

    def on_progress(reported: Mapping[str, Reported]) -> None:
        seen.extend(each.num_items for each in reported.values())

    assert len(list(runner.map("first", SlowToLoad(), shards_of(["7"])))) == 1
    seen.clear()
    assert len(list(runner.map("second", SlowToLoad(), shards_of(["0"]), on_progress=on_progress))) == 1
    assert seen and set(seen) == {0}


def test_shard_that_always_kills_its_worker_is_named(runner: RayRunner, worker: Callable[[], Worker]) -> None:
    with pytest.raises(ShardError, match="stage, shard 1: its worker died 3 times"):
        list(runner.map("stage", worker, shards_of(["succeeds", "dies", "succeeds", "succeeds"])))


@pytest.mark.slow
def test_poison_shards_are_set_aside_up_to_a_maximum(runner: RayRunner, worker: Callable[[], Worker]) -> None:
    works = ["succeeds", "dies", "dies once", "dies", "succeeds"]
    results = list(runner.map("stage", worker, shards_of(works), max_poison_shards=2))
    assert [record and record.name for record in results] == ["0", None, "2", None, "4"]
    with pytest.raises(ShardError, match=r"shard [13]: its worker died 3 times .* So did the workers of [13] before"):
        list(runner.map("stage", worker, shards_of(works), max_poison_shards=1))


def run_writing_stage(folder: Path, runner: Runner, works: list[str], max_poison_shards: int) -> Manifest:
    output = str(folder / "out")
    (folder / "call_log").mkdir(parents=True, exist_ok=True)
    stage = Stage(
        name="stage",
        config=StageConfig(),
        inputs={},
        output=output,
        shards=shards_of(works),
        make_worker=functools.partial(make_writing_worker, str(folder / "call_log"), output),
        max_poison_shards=max_poison_shards,
    )
    return run_stage(stage, runner)


def make_writing_worker(call_log: str, output: str) -> Worker:
    worker = make_worker(call_log)

    def process(shard: Shard) -> ShardRecord:
        worker(shard)
        file = paths.write_bytes(paths.join(output, f"file-{shard.name}.txt"), shard.name.encode())
        return ShardRecord(name=shard.name, files=(file,))

    return process


@pytest.mark.slow
def test_a_stage_names_poison_shards_and_retries_them_when_fewer_are_allowed(runner: RayRunner, tmp_path: Path) -> None:
    works = ["succeeds", "dies", "succeeds"]
    with pytest.raises(ShardError, match="shard 1"):
        run_writing_stage(tmp_path, runner, works, 0)
    manifest = run_writing_stage(tmp_path, runner, works, 1)
    assert manifest.facts == {"set_aside": ["1"]}
    assert [record.name for record in manifest.shards] == ["0", "2"]
    assert calls(tmp_path / "call_log", "0") + calls(tmp_path / "call_log", "2") == 2, (
        "a finished shard was processed again"
    )
    assert run_writing_stage(tmp_path, runner, works, 1) == manifest
    assert calls(tmp_path / "call_log", "1") == 6, "a run that allows a poison shard must not retry it"
    with pytest.raises(ShardError, match="shard 1"):
        run_writing_stage(tmp_path, runner, works, 0)
    assert read_manifest(str(tmp_path / "out")) == manifest, "a failed retry must not change the finished work"
    repaired = run_writing_stage(tmp_path, runner, ["succeeds"] * 3, 0)
    assert repaired.facts == {}
    assert run_writing_stage(tmp_path / "fresh", InlineRunner(), ["succeeds"] * 3, 0) == repaired
    assert bytes_in(str(tmp_path / "fresh/out")) == bytes_in(str(tmp_path / "out"))


@pytest.mark.slow
def test_worker_that_cannot_be_started_is_an_error(runner: RayRunner, worker: Callable[[], Worker]) -> None:
    results = runner.map("stage", worker, shards_of(["succeeds"] * 100))
    next(results)
    for actor in runner._actors:
        ray.kill(actor)  # Ray does not restart it
    with pytest.raises(ShardError, match="stage: a worker could not be started"):
        list(results)
    assert len(list(runner.map("stage", worker, shards_of(["succeeds"] * 2)))) == 2, "the next map starts new actors"


class OtherJob:
    """Takes all processors of the cluster, as another job might."""

    def is_running(self) -> bool:
        return True


@pytest.mark.slow
def test_run_without_workers_reminds_and_then_fails(
    runner: RayRunner,
    worker: Callable[[], Worker],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(ray_runner, "SECONDS_BETWEEN_REMINDERS", 0.5)
    monkeypatch.setattr(ray_runner, "SECONDS_WITHOUT_WORKERS", 3.0)
    results = runner.map("stage", worker, shards_of(["succeeds"] * 100))
    next(results)
    results.close()  # stops the workers and frees the processors
    other_job = ray.remote(num_cpus=2)(OtherJob).remote()
    assert ray.get(other_job.is_running.remote())
    with pytest.raises(ShardError, match=r"stage: none of 2 workers was available for \d+ s"):
        list(runner.map("stage", worker, shards_of(["succeeds"] * 3)))
    assert "none of 2 workers is available, waiting for machines" in capsys.readouterr().err
    ray.kill(other_job)
    monkeypatch.undo()
    assert len(list(runner.map("stage", worker, shards_of(["succeeds"] * 3)))) == 3


def test_two_workers_are_two_processes(runner: RayRunner, worker: Callable[[], Worker]) -> None:
    results = list(runner.map("stage", worker, shards_of(["meets"] * 2)))
    assert len({record.totals["process"] for record in results} - {os.getpid()}) == 2


def test_process_without_the_token_is_refused(runner: RayRunner) -> None:
    address = ray.get_runtime_context().gcs_address
    health_check = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    token_path = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    for token, is_accepted in ((token_path.read_text(), True), ("0" * 64, False)):
        environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        result = subprocess.run(health_check, env=environment, capture_output=True, text=True, timeout=120)
        assert (result.returncode == 0) == is_accepted, result.stderr
        assert ("InvalidAuthToken" in result.stderr) != is_accepted


def test_only_the_owner_can_read_the_token(runner: RayRunner) -> None:
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert len(token.read_text()) == 64
    assert (token.stat().st_mode & 0o777, token.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert "RAY_AUTH_TOKEN" not in os.environ, "a token that the user set earlier must not be used"


RUN = """
import os, signal, sys
from pathlib import Path
from curation.engine.ray_runner import RayRunner
try:
    runner = RayRunner(num_workers=1)
except ValueError as error:
    sys.exit(f"refused: {error}")
print(os.environ.get("RAY_AUTH_TOKEN_PATH", "the user's token"))
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
runner.close()
"""


def run_once(end: str, temporary: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A run in a new process, with `temporary` as its folder for temporary files."""
    environment_without_ray = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-c", RUN, end],
        env={**environment_without_ray, "TMPDIR": str(temporary), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder for temporary files with a path short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        yield Path(folder)


@pytest.mark.slow
def test_a_long_folder_for_temporary_files_is_replaced_by_a_private_folder_in_tmp(temporary: Path) -> None:
    """Slow, because it starts a Ray. Its sockets would be longer than the system allows."""
    long = temporary / ("x" * (59 - len(str(temporary))))
    long.mkdir()
    assert len(str(long)) == 60
    closed = run_once("closed", long)
    assert closed.returncode == 0, closed.stderr
    folder = Path(closed.stdout.strip()).parent
    assert folder.parent == Path("/tmp") and not folder.exists() and list(long.iterdir()) == []


def test_a_folder_for_temporary_files_is_kept_while_it_is_short_enough() -> None:
    longest = "/" + 19 * "x"  # on Linux
    expected = Path("/tmp") if sys.platform == "darwin" else Path(longest)
    assert ray_runner._short_parent(longest) == expected
    assert ray_runner._short_parent(longest + "x") == ray_runner._short_parent("/" + "é" * 10) == Path("/tmp")


def test_missing_gpus_and_processors_name_the_setting_and_the_option() -> None:
    no_gpu = ray_runner._shortage("GPU", 8, 0, 8, "embed.embedder.device")
    assert (
        "8 workers (--workers) need 8 GPUs, because embed.embedder.device is 'cuda', but there is no GPU. Set" in no_gpu
    )
    assert "this Ray has 2. Give --workers 2, or" in ray_runner._shortage("GPU", 8, 2, 8, "device")
    assert "4 workers (--workers) need 8 CPUs; this Ray has 5. Give --workers 2" in ray_runner._shortage(
        "CPU", 8, 5, 4, "device"
    )


@pytest.mark.slow
def test_temporary_files_are_deleted_at_the_end_or_by_the_next_run_after_a_kill(temporary: Path) -> None:
    killed = run_once("killed", temporary)
    assert killed.returncode == -signal.SIGKILL
    leftover = Path(killed.stdout.strip())
    assert leftover.exists() and leftover.parent.parent == temporary
    again = run_once("closed", temporary)
    assert again.returncode == 0, again.stderr
    assert Path(again.stdout.strip()) != leftover
    assert list(temporary.iterdir()) == []


@pytest.fixture(params=["token", "disabled"])
def cluster(request: pytest.FixtureRequest, temporary: Path) -> Iterator[tuple[str, str]]:
    """The address and the authentication mode of a Ray on this machine with the token aa..."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
    options = [f"--port={port}", f"--temp-dir={temporary}", "--include-dashboard=false", "--num-cpus=1"]
    ports = ["--min-worker-port=0", "--max-worker-port=0", "--object-store-memory=100000000", "--disable-usage-stats"]
    environment_without_ray = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    ray_start = subprocess.Popen(
        [*start, *options, *ports],
        env={**environment_without_ray, "RAY_AUTH_MODE": request.param, "RAY_AUTH_TOKEN": "a" * 64},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            break
        time.sleep(0.2)
    yield f"127.0.0.1:{port}", request.param
    ray_start.terminate()
    ray_start.wait(60)


@pytest.mark.slow
def test_a_cluster_is_used_with_its_token_and_refused_without(cluster: tuple[str, str], temporary: Path) -> None:
    address, mode = cluster
    owner = run_once("closed", temporary, RAY_ADDRESS=address, RAY_AUTH_TOKEN="a" * 64)
    if mode == "disabled":
        assert owner.returncode == 1
        assert "refused" in owner.stderr and "was started without authentication" in owner.stderr
        return
    assert (owner.returncode, owner.stdout.strip()) == (0, "the user's token"), owner.stderr
    home = str(temporary)  # no ~/.ray/auth_token there
    for token in ({"RAY_AUTH_TOKEN": "b" * 64}, {"HOME": home}):
        refused = run_once("closed", temporary, RAY_ADDRESS=address, **token)
        assert refused.returncode == 1
        assert "refused" in refused.stderr and "refused this token, or no token is set" in refused.stderr


def test_authentication_cannot_be_turned_off(temporary: Path) -> None:
    refused = run_once("closed", temporary, RAY_AUTH_MODE="disabled")
    assert refused.returncode == 1
    assert "refused: RAY_AUTH_MODE is 'disabled'" in refused.stderr


def test_zero_workers_are_refused() -> None:
    with pytest.raises(ConfigError, match="Found: 0"):
        RayRunner(num_workers=0)
