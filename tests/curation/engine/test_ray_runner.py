"""What only Ray can do: lose a worker process and go on (runner contract, point 6), and keep strangers out."""

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from curation.config import Settings
from curation.engine import ray_runner
from curation.engine.manifest import Manifest, ShardRecord, read_manifest
from curation.engine.ray_runner import RayRunner
from curation.engine.runner import InlineRunner, Runner, Shard, Worker
from curation.engine.stage import Stage, run_stage
from curation.errors import ConfigError, ShardError
from curation.files import paths
from tests.curation.builders import bytes_in


class StageConfig(Settings):
    pass


def make_worker(diary: str) -> Worker:
    """Counts its calls in the folder `diary`; some shards kill their worker, once or always."""

    def process(shard: Shard) -> ShardRecord:
        Path(diary, f"{shard.name}-{os.urandom(4).hex()}").touch()
        if shard.work == "dies" or (shard.work == "dies once" and calls(diary, shard.name) == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if shard.work == "meets":
            wait_for_another_process(Path(diary))
        return ShardRecord(name=shard.name, totals={"process": os.getpid()})

    return process


def wait_for_another_process(diary: Path) -> None:
    (diary / f"process-{os.getpid()}").touch()
    deadline = time.monotonic() + 60
    while len(list(diary.glob("process-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)


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


@pytest.mark.slow
def test_poison_shards_are_set_aside_up_to_a_number(runner: RayRunner, worker: Callable[[], Worker]) -> None:
    works = ["lives", "dies", "dies once", "dies", "lives"]
    results = list(runner.map("stage", worker, shards_of(works), max_poison_shards=2))
    assert [record and record.name for record in results] == ["0", None, "2", None, "4"]
    with pytest.raises(ShardError, match=r"shard [13]: its worker died 3 times .* So did [13] before it"):
        list(runner.map("stage", worker, shards_of(works), max_poison_shards=1))


def write_lives(folder: Path, runner: Runner, works: list[str], max_poison_shards: int) -> Manifest:
    output = str(folder / "out")
    (folder / "diary").mkdir(parents=True, exist_ok=True)
    stage = Stage(
        name="stage",
        config=StageConfig(),
        inputs={},
        output=output,
        shards=shards_of(works),
        make_worker=functools.partial(make_writing_worker, str(folder / "diary"), output),
        max_poison_shards=max_poison_shards,
    )
    return run_stage(stage, runner)


def make_writing_worker(diary: str, output: str) -> Worker:
    worker = make_worker(diary)

    def process(shard: Shard) -> ShardRecord:
        worker(shard)
        file = paths.write_bytes(paths.join(output, f"file-{shard.name}.txt"), shard.name.encode())
        return ShardRecord(name=shard.name, files=(file,))

    return process


@pytest.mark.slow
def test_a_stage_names_what_it_set_aside_and_tries_it_again_when_asked(runner: RayRunner, tmp_path: Path) -> None:
    works = ["lives", "dies", "lives"]
    with pytest.raises(ShardError, match="shard 1"):
        write_lives(tmp_path, runner, works, 0)
    manifest = write_lives(tmp_path, runner, works, 1)
    assert manifest.facts == {"set_aside": ["1"]}
    assert [record.name for record in manifest.shards] == ["0", "2"]
    assert calls(tmp_path / "diary", "0") + calls(tmp_path / "diary", "2") == 2, "what was done was done again"
    assert write_lives(tmp_path, runner, works, 1) == manifest
    assert calls(tmp_path / "diary", "1") == 6, "a run that allows it must not try it again"
    with pytest.raises(ShardError, match="shard 1"):
        write_lives(tmp_path, runner, works, 0)
    assert read_manifest(str(tmp_path / "out")) == manifest, "a vain attempt must not undo what was done"
    mended = write_lives(tmp_path, runner, ["lives"] * 3, 0)
    assert mended.facts == {}
    assert write_lives(tmp_path / "fresh", InlineRunner(), ["lives"] * 3, 0) == mended
    assert bytes_in(str(tmp_path / "fresh/out")) == bytes_in(str(tmp_path / "out"))


@pytest.mark.slow
def test_worker_that_cannot_be_started_is_an_error(runner: RayRunner, worker: Callable[[], Worker]) -> None:
    results = runner.map("stage", worker, shards_of(["lives"] * 100))
    next(results)
    for actor in runner._actors:
        ray.kill(actor)  # and is not started again
    with pytest.raises(ShardError, match="stage: a worker could not be started"):
        list(results)
    assert len(list(runner.map("stage", worker, shards_of(["lives"] * 2)))) == 2, "the next map starts others"


class Squatter:
    """Takes all processors of the cluster, as another job might."""

    def is_there(self) -> bool:
        return True


@pytest.mark.slow
def test_run_that_gets_no_worker_says_so_and_gives_up(
    runner: RayRunner,
    worker: Callable[[], Worker],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(ray_runner, "SECONDS_BETWEEN_REMINDERS", 0.5)
    monkeypatch.setattr(ray_runner, "SECONDS_WITHOUT_WORKERS", 3.0)
    results = runner.map("stage", worker, shards_of(["lives"] * 100))
    next(results)
    results.close()  # stops the workers, which hold the processors
    squatter = ray.remote(num_cpus=2)(Squatter).remote()
    assert ray.get(squatter.is_there.remote())
    with pytest.raises(ShardError, match=r"stage: none of 2 workers was there for \d+ s"):
        list(runner.map("stage", worker, shards_of(["lives"] * 3)))
    assert "none of 2 workers is there, waiting for machines" in capsys.readouterr().err
    ray.kill(squatter)
    monkeypatch.undo()
    assert len(list(runner.map("stage", worker, shards_of(["lives"] * 3)))) == 3


def test_two_workers_are_two_processes(runner: RayRunner, worker: Callable[[], Worker]) -> None:
    results = list(runner.map("stage", worker, shards_of(["meets"] * 2)))
    assert len({record.totals["process"] for record in results} - {os.getpid()}) == 2


def test_stranger_without_the_token_is_refused(runner: RayRunner) -> None:
    address = ray.get_runtime_context().gcs_address
    ask = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    own = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    for token, answers in ((own.read_text(), True), ("0" * 64, False)):
        environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        result = subprocess.run(ask, env=environment, capture_output=True, text=True, timeout=120)
        assert (result.returncode == 0) == answers, result.stderr
        assert ("InvalidAuthToken" in result.stderr) != answers


def test_token_is_for_its_owner_alone(runner: RayRunner) -> None:
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert len(token.read_text()) == 64
    assert (token.stat().st_mode & 0o777, token.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert "RAY_AUTH_TOKEN" not in os.environ, "an older token of the user's must not be in use"


RUN = """
import os, signal, sys
from pathlib import Path
from curation.engine.ray_runner import RayRunner
try:
    runner = RayRunner(num_workers=1)
except ValueError as error:
    sys.exit(f"refused: {error}")
print(os.environ.get("RAY_AUTH_TOKEN_PATH", "the user's own"))
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
runner.close()
"""


def run_once(end: str, temporary: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A run of its own, with its folder for temporary files."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-c", RUN, end],
        env={**ours, "TMPDIR": str(temporary), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder for temporary files with a short path, as Ray's sockets need."""
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        yield Path(folder)


@pytest.mark.slow
def test_nothing_of_a_run_stays_and_what_a_killed_one_left_goes_with_the_next(temporary: Path) -> None:
    killed = run_once("killed", temporary)
    assert killed.returncode == -signal.SIGKILL
    left = Path(killed.stdout.strip())
    assert left.exists() and left.parent.parent == temporary
    again = run_once("closed", temporary)
    assert again.returncode == 0, again.stderr
    assert Path(again.stdout.strip()) != left
    assert list(temporary.iterdir()) == []


@pytest.fixture(params=["token", "disabled"])
def cluster(request: pytest.FixtureRequest, temporary: Path) -> Iterator[tuple[str, str]]:
    """The address of a Ray that someone started on this machine with the token aa..., and its mode."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
    options = [f"--port={port}", f"--temp-dir={temporary}", "--include-dashboard=false", "--num-cpus=1"]
    ports = ["--min-worker-port=0", "--max-worker-port=0", "--object-store-memory=100000000", "--disable-usage-stats"]
    ours = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    ray_start = subprocess.Popen(
        [*start, *options, *ports],
        env={**ours, "RAY_AUTH_MODE": request.param, "RAY_AUTH_TOKEN": "a" * 64},
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
def test_a_cluster_is_joined_with_its_token_and_refused_without(cluster: tuple[str, str], temporary: Path) -> None:
    address, mode = cluster
    owner = run_once("closed", temporary, RAY_ADDRESS=address, RAY_AUTH_TOKEN="a" * 64)
    if mode == "disabled":
        assert owner.returncode == 1
        assert "refused" in owner.stderr and "was started without authentication" in owner.stderr
        return
    assert (owner.returncode, owner.stdout.strip()) == (0, "the user's own"), owner.stderr
    home = str(temporary)  # no ~/.ray/auth_token there
    for token in ({"RAY_AUTH_TOKEN": "b" * 64}, {"HOME": home}):
        stranger = run_once("closed", temporary, RAY_ADDRESS=address, **token)
        assert stranger.returncode == 1
        assert "refused" in stranger.stderr and "does not take this token, or there is none" in stranger.stderr


def test_authentication_cannot_be_turned_off(temporary: Path) -> None:
    refused = run_once("closed", temporary, RAY_AUTH_MODE="disabled")
    assert refused.returncode == 1
    assert "refused: RAY_AUTH_MODE is 'disabled'" in refused.stderr


def test_a_runner_needs_a_worker() -> None:
    with pytest.raises(ConfigError, match="Found: 0"):
        RayRunner(num_workers=0)
