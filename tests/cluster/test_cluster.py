"""Faults of a pipeline on three hosts: the bytes stay the same, and few shards are done twice."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from curation.config import resolved_toml
from tests.cluster.fault_table import add
from tests.cluster.hosts import (
    NUM_HOSTS,
    PATIENCE,
    PORT,
    ROOT,
    S3_PORT,
    Hosts,
    address,
    child_of,
    command_line,
    wait_until,
)
from tests.pipelines.test_curate import CONFIG, drawing, save
from tests.training.builders import train_config
from training import checkpoint

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and ip"),
]

# The pictures are so large that a shard takes a while: a kill must be able to hit one.
INGEST = """
[ingest]
images_per_shard = 4
[ingest.limits]
decode_timeout_seconds = 1
[[ingest.sources]]
name = "web"
role = "pool"
path = "photos"
"""
NUM_PHOTOS = 120


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with Hosts() as hosts:
        yield hosts


@pytest.fixture(scope="module")
def home(hosts: Hosts) -> Path:
    """The folder that all hosts see, with images, configs, and the outputs of runs without faults."""
    home = hosts.home
    for number in range(10):
        save(drawing("discs", number), home / f"seeds/discs/{number}.png")
        save(drawing("stripes", number), home / f"seeds/stripes/{number}.png")
        for kind in ("discs", "stripes", "scribbles"):
            save(drawing(kind, 20 + number), home / f"pool/{kind}/{number}.png")
    for number in range(100, 104):
        save(drawing("scribbles", number), home / f"holdout/{number}.png")
    for number in range(NUM_PHOTOS):
        save(drawing("scribbles", 1000 + number).resize((2000, 1500)), home / f"photos/{number:03d}.jpg", quality=95)
    (home / "whole.toml").write_text(CONFIG)
    (home / "ingest.toml").write_text(INGEST)
    for config in ("whole", "ingest"):
        Run(hosts, home, config, f"{config}-inline").inline()
    return home


class Run:
    """One output folder, and the commands that fill it, by default on host 1."""

    def __init__(self, hosts: Hosts, home: Path, config: str, name: str) -> None:
        self._hosts, self._home, self._config, self.name = hosts, home, config, name
        self.output, self.diary = home / name, home / f"{name}-diary"

    def _command(self, *options: str) -> list[str]:
        only = ["--only-ingest"] if self._config == "ingest" else []
        paths = [f"{self._config}.toml", self.name, str(self.diary)]
        return [sys.executable, "-m", "tests.cluster.counted_curate", *paths, *only, *options]

    def start(self, host: int = 1) -> "subprocess.Popen[str]":
        environment = {**self._hosts.environment_of(host), "RAY_ADDRESS": f"{address(1)}:{PORT}"}
        return subprocess.Popen(
            self._hosts.on(host, self._command(), self._home),
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            # A background job of a shell ignores SIGINT, and its child processes would inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def inline(self) -> None:
        environment = self._hosts.environment_of(1)
        command = self._command("--runner", "inline")
        done = subprocess.run(command, cwd=self._home, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def resume(self, host: int = 1) -> None:
        """Run to the end."""
        finish(self.start(host), 0)

    def num_done(self) -> int:
        return len(list((self.diary / "done").glob("*")))

    def wait_for_shards(self, number: int, process: "subprocess.Popen[str]") -> None:
        """Wait until `number` shards are done, or the run is over."""
        wait_until(lambda: self.num_done() >= number or process.poll() is not None, f"{number} shards are done")

    def begun_again(self) -> int:
        """The number of times that a worker began a shard which another had begun."""
        names = Counter(path.name.rpartition(",")[0] for path in (self.diary / "begun").iterdir())
        return sum(count - 1 for count in names.values())

    def num_shards(self) -> int:
        return len({path.name.rpartition(",")[0] for path in (self.diary / "begun").iterdir()})

    def seconds_to_recover(self, moment: float) -> float | None:
        """From a moment until all shards that were begun again after it are done; None without any."""
        begun = Counter(path.name.rpartition(",")[0] for path in (self.diary / "begun").iterdir())
        seconds_after = [
            path.stat().st_mtime - moment
            for path in (self.diary / "done").iterdir()
            if begun[path.name.rpartition(",")[0]] > 1
        ]
        return max((seconds for seconds in seconds_after if seconds >= 0), default=None)

    def check(self, fault: str, moment: float, *, twice: int = NUM_HOSTS) -> None:
        """Check the output after a fault and a resume, and add the run to the fault table."""
        reference = self._home / f"{self._config}-inline"
        same = bytes_in(self.output) == bytes_in(reference)
        add(
            fault,
            survived=same,
            shards=self.num_shards(),
            twice=self.begun_again(),
            seconds=self.seconds_to_recover(moment),
        )
        assert same, "the bytes differ from those of a run without faults"
        hidden = list(self.output.rglob(".*"))
        assert hidden == [], "temporary files or progress files are left"
        assert self.begun_again() <= twice
        wait_until(lambda: not self._hosts.workers() and not self._hosts.decoders(), "the workers are gone")
        temporary = [path for host in range(1, NUM_HOSTS + 1) for path in (self._hosts.folder / f"tmp{host}").glob("*")]
        assert temporary == []


def kill_driver(process: "subprocess.Popen[str]") -> None:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it is over already
        os.kill(child_of(process.pid), signal.SIGKILL)


def finish(process: "subprocess.Popen[str]", status: int | None = None, patience: float = PATIENCE * 2) -> str:
    """Wait for a run to end; returns its error output."""
    try:
        stderr = process.communicate(timeout=patience)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"the run hangs: {process.communicate()[1]}") from None
    assert status is None or process.returncode == status, stderr
    return stderr


def bytes_in(folder: Path) -> dict[str, bytes]:
    """All files except the log, which holds times."""
    files = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): (folder / path).read_bytes() for path in files if path.parts[0] != "log"}


def test_curate_gives_the_same_bytes_on_three_hosts(hosts: Hosts, home: Path) -> None:
    command = ["-m", "pipelines.curate", "--config", "whole.toml", "--output", "by-hand", "--workers", "3"]
    environment = {**hosts.environment_of(2), "RAY_ADDRESS": f"{address(1)}:{PORT}"}
    on_host = hosts.on(2, [sys.executable, *command], home)
    done = subprocess.run(on_host, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert bytes_in(home / "by-hand") == bytes_in(home / "whole-inline")
    run = Run(hosts, home, "whole", "healthy")
    run.resume(host=2)
    run.check("none", time.time(), twice=0)


@pytest.mark.parametrize("seed", range(20))
def test_kill_at_a_random_moment(hosts: Hosts, home: Path, seed: int) -> None:
    """Every fifth run is the whole pipeline; the others are ingest."""
    generator = random.Random(seed)
    run = Run(hosts, home, "whole" if seed % 5 == 4 else "ingest", f"kill-{seed}")
    victim = ("worker", "node", "driver")[seed % 3]
    process = run.start(driver := generator.choice([1, 2]))
    run.wait_for_shards(generator.randrange(1, 20), process)
    time.sleep(generator.uniform(0, 0.5))
    moment = time.time()
    match victim:
        case "worker":
            if workers := sorted(hosts.workers()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(generator.choice(workers), signal.SIGKILL)
            finish(process, 0)
        case "node":
            lost = 3 if driver == 2 else generator.choice([2, 3])
            hosts.kill(lost)
            finish(process, 0)
            hosts.start(lost)
        case "driver":
            kill_driver(process)
            finish(process)
            run.resume(driver)
    run.check(f"kill -9 of a {victim}", moment, twice=NUM_HOSTS if victim == "driver" else 1)


def test_head_node_dies(hosts: Hosts, home: Path) -> None:
    """The remaining workers may finish the run; otherwise it ends, and the next cluster resumes it."""
    run = Run(hosts, home, "ingest", "head")
    process = run.start(host=2)
    run.wait_for_shards(5, process)
    hosts.kill(1)
    finish(process)
    for host in range(2, NUM_HOSTS + 1):
        hosts.kill(host)
    for host in range(1, NUM_HOSTS + 1):
        hosts.start(host)
    moment = time.time()
    run.resume()
    run.check("kill -9 of the head node; the cluster started anew, run again", moment)


@pytest.mark.parametrize(("seconds", "fault"), [(5, "link of a host cut for 5 s"), (None, "link of a host cut")])
def test_link_is_cut_and_restored(hosts: Hosts, home: Path, seconds: float | None, fault: str) -> None:
    run = Run(hosts, home, "ingest", f"link-{seconds}")
    process = run.start()
    run.wait_for_shards(4, process)
    hosts.set_link(3, "down")
    moment = time.time()
    if seconds is not None:
        time.sleep(seconds)
        hosts.set_link(3, "up")
        finish(process, 0)
    else:
        finish(process, 0)
        hosts.set_link(3, "up")
        hosts.kill(3)  # Ray has given the host up; its Ray must be restarted
        hosts.start(3)
    run.check(fault, moment)


def test_disk_is_full(hosts: Hosts, home: Path) -> None:
    run = Run(hosts, home, "ingest", "small/out")
    run.diary = home / "full-disk-diary"
    assert "No space left on device" in finish(run.start(), 1)
    written = [path for path in (home / "small").rglob("*.parquet") if not path.name.startswith(".")]
    reference = bytes_in(home / "ingest-inline")
    assert all(path.read_bytes() == reference[path.name] for path in written), "a half-written file has a final name"
    subprocess.run(["mount", "-o", "remount,size=64m", home / "small"], check=True)
    moment = time.time()
    run.resume()
    run.check("full disk; room made, run again", moment)


@pytest.mark.parametrize(
    ("kind", "fault"),
    [("memory", "a worker past its memory limit (MemoryError); run again"), ("kill", "a worker killed in a shard")],
)
def test_worker_fails_in_a_shard(hosts: Hosts, home: Path, kind: str, fault: str) -> None:
    run = Run(hosts, home, "ingest", f"worker-{kind}")
    (run.diary / "faults").mkdir(parents=True)
    (run.diary / "faults/ingest,00009").write_text(kind)
    process = run.start()
    wait_until(lambda: not (run.diary / "faults/ingest,00009").exists(), "the fault has struck")
    moment = time.time()
    if kind == "memory":
        assert "ingest, shard 00009: MemoryError" in finish(process, 1)
        run.resume()
    else:
        finish(process, 0)
    run.check(fault, moment)


def test_poison_shard_is_set_aside_and_tried_again(hosts: Hosts, home: Path) -> None:
    run = Run(hosts, home, "ingest", "poison")
    (run.diary / "faults").mkdir(parents=True)
    (run.diary / "faults/ingest,00011").write_text("poison")
    assert "ingest, shard 00011: its worker died 3 times" in finish(run.start(), 1)
    config = (home / "ingest.toml").read_text()
    (home / "ingest.toml").write_text(config.replace("[ingest]\n", "[ingest]\nmax_poison_shards = 1\n", 1))
    assert "shard 00011 killed its worker at every attempt and is set aside" in finish(run.start(), 0)
    assert '"set_aside": [\n   "00011"\n  ]' in (run.output / "manifest.json").read_text()
    (run.diary / "faults/ingest,00011").unlink()
    (home / "ingest.toml").write_text(config)
    moment = time.time()
    run.resume()
    run.check("poison shard; set aside, tried again once corrected", moment, twice=6 + 2 * NUM_HOSTS)


@pytest.mark.parametrize(
    ("number", "fault"), [(signal.SIGKILL, "a decoder crashes"), (signal.SIGSTOP, "a decoder hangs")]
)
def test_decoder_fails(hosts: Hosts, home: Path, number: int, fault: str) -> None:
    run = Run(hosts, home, "ingest", f"decoder-{number}")
    process = run.start()
    run.wait_for_shards(4, process)
    wait_until(lambda: bool(hosts.decoders()), "there is a decoder")
    moment = time.time()
    os.kill(hosts.decoders()[0], number)
    finish(process, 0)
    run.check(fault, moment, twice=0)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_stops_the_run_and_a_resume_finishes_it(hosts: Hosts, home: Path, number: int, status: int) -> None:
    run = Run(hosts, home, "ingest", f"signal-{number}")
    process = run.start()
    run.wait_for_shards(7, process)
    os.kill(child_of(process.pid), number)
    assert "Traceback" not in finish(process, status)
    wait_until(lambda: not hosts.workers() and not hosts.decoders(), "the workers are gone")
    assert not (run.output / "manifest.json").exists()
    moment = time.time()
    run.resume()
    run.check(f"{signal.Signals(number).name} to the driver; run again", moment)


LIBRARY = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")


@pytest.mark.skipif(not LIBRARY.exists(), reason="needs Debian's package faketime")
def test_clock_jumps(hosts: Hosts, home: Path) -> None:
    """A run is killed with its clock a year ahead and resumed a year behind; file times then lie in the future."""
    run = Run(hosts, home, "ingest", "clock")
    command = run._command("--runner", "inline")
    ahead, behind = ({**hosts.environment_of(1), "LD_PRELOAD": str(LIBRARY), "FAKETIME": f"{d}365d"} for d in "+-")
    process = subprocess.Popen(command, cwd=home, env=ahead, stderr=subprocess.PIPE, text=True)
    run.wait_for_shards(5, process)
    process.kill()
    finish(process)
    for path in run.output.rglob("*"):
        os.utime(path, (time.time() + 4e7, time.time() + 4e7))
    done = subprocess.run(command, cwd=home, env=behind, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run.check("clock a year ahead, then a year behind (inline)", time.time(), twice=1)


SERVE = "from moto.server import main; main()"
COPY = """
import sys, fsspec
fs = fsspec.filesystem("s3")
if sys.argv[1] == "make":
    fs.mkdir("bucket")
else:
    fs.get("bucket/run/", sys.argv[1] + "/", recursive=True)
"""


def test_outputs_on_s3(hosts: Hosts, home: Path) -> None:
    """A server on host 1 stores the outputs of a run that is killed midway."""
    server_command = hosts.on(1, [sys.executable, "-c", SERVE, "-H", address(1), "-p", str(S3_PORT)])
    server = subprocess.Popen(server_command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def copy(target: str) -> bool:
        command = hosts.on(1, [sys.executable, "-c", COPY, target])
        return subprocess.run(command, env=hosts.environment_of(1), capture_output=True).returncode == 0

    wait_until(lambda: copy("make"), "the S3 server answers")
    run = Run(hosts, home, "whole", "s3://bucket/run")
    run.diary, run.output = home / "s3-diary", home / "s3-copied"
    process = run.start(host=2)
    run.wait_for_shards(12, process)
    kill_driver(process)
    finish(process)
    moment = time.time()
    run.resume(host=2)
    assert copy(str(run.output))
    run.check("kill -9 of the driver, outputs on S3", moment)
    server.kill()
    server.wait()


# The trainer

NUM_STEPS, STEPS_TO_CHECKPOINT = 40, 5


class Training:
    """One training run with a rank on each host, on the corpus of the whole pipeline."""

    def __init__(self, hosts: Hosts, home: Path, name: str) -> None:
        self._hosts, self._home = hosts, home
        self.output = home / name

    def start(self) -> "subprocess.Popen[str]":
        options = ["--output", self.output.name, "--workers", str(NUM_HOSTS), "--cpu", "--max-failures", "3"]
        command = [sys.executable, "-m", "pipelines.train_on_ray", "--config", "train.toml", *options]
        return subprocess.Popen(
            self._hosts.on(1, command, self._home),
            env={**self._hosts.environment_of(1), "RAY_ADDRESS": f"{address(1)}:{PORT}"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def metrics(self) -> list[dict[str, float]]:
        """The steps and losses of each line; other fields depend on the machine."""
        path = self.output / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [{name: line[name] for name in line if name.startswith(("step", "loss"))} for line in lines]

    def wait_for_step(self, step: int, process: "subprocess.Popen[str]") -> None:
        def is_there() -> bool:
            assert process.poll() is None, process.communicate()[1]
            return len(self.metrics()) >= step

        wait_until(is_there, f"step {step} is done")

    def ranks(self) -> list[int]:
        """The processes that train."""
        return [
            process
            for host in range(1, NUM_HOSTS + 1)
            for process in self._hosts.processes(host)
            if "RayTrainWorker" in command_line(process)
        ]


@pytest.fixture(scope="module")
def trained(hosts: Hosts, home: Path) -> Training:
    """A training run without faults."""
    steps = {"num_steps": NUM_STEPS, "batch_size": 4 * NUM_HOSTS, "checkpoint__every": STEPS_TO_CHECKPOINT}
    (home / "train.toml").write_text(resolved_toml(train_config("whole-inline/corpus", data__layout="corpus", **steps)))
    run = Training(hosts, home, "trained")
    finish(run.start(), 0)
    assert len(run.metrics()) == NUM_STEPS
    return run


@pytest.mark.parametrize(("seed", "victim"), list(enumerate(["rank", "node", "driver"])))
def test_training_resumes_from_its_checkpoint(
    hosts: Hosts, home: Path, trained: Training, seed: int, victim: str
) -> None:
    run = Training(hosts, home, f"trained-{victim}")
    process = run.start()
    run.wait_for_step(random.Random(seed).randrange(STEPS_TO_CHECKPOINT + 1, NUM_STEPS // 2), process)
    match victim:
        case "rank":
            os.kill(run.ranks()[-1], signal.SIGKILL)
        case "node":
            hosts.kill(3)
        case "driver":
            kill_driver(process)
    moment, reached = time.time(), len(run.metrics())
    saved = checkpoint.steps(str(run.output / "checkpoints"))[-1]
    if victim == "node":
        hosts.start(3)  # the same number of ranks is needed
    if victim == "driver":
        finish(process)
        wait_until(lambda: not run.ranks(), "the ranks of the old driver are gone")
        process = run.start()
    finish(process, 0)
    last = f"checkpoints/step-{NUM_STEPS:07d}"
    tensors, expected = (checkpoint.load_tensors(str(each.output / last), "") for each in (run, trained))
    same = run.metrics() == trained.metrics() and all(
        (tensors[name] == expected[name]).all() for name in tensors.keys() | expected.keys()
    )
    add(
        f"training: kill -9 of a {victim}",
        survived=same,
        shards=NUM_STEPS,
        twice=reached - saved,
        seconds=time.time() - moment,
    )
    assert same, "the weights or the losses differ from those of a run without faults"
    assert reached < NUM_STEPS, "the run was over before it lost anything"
    assert reached - saved <= STEPS_TO_CHECKPOINT


def test_demo_survives_the_loss_of_a_node(hosts: Hosts, home: Path) -> None:
    """The reference without faults is the run of `make curate` on this machine alone."""
    assert (ROOT / "runs/demo/corpus/manifest.json").exists(), "run `make curate` first, as `make test-cluster` does"
    (home / "data").symlink_to(ROOT / "data")
    (home / "pipelines").mkdir()
    (home / "pipelines/configs").symlink_to(ROOT / "pipelines/configs")
    (home / "demo-inline").symlink_to(ROOT / "runs/demo")
    shutil.copy(ROOT / "pipelines/configs/demo.toml", home)
    run = Run(hosts, home, "demo", "demo")
    process = run.start(host=2)
    wait_until(lambda: (run.output / "embed").exists() or process.poll() is not None, "images are embedded", 600)
    time.sleep(random.Random(0).uniform(0, 30))
    assert process.poll() is None, process.communicate()[1]
    hosts.kill(3)
    moment = time.time()
    time.sleep(20)
    hosts.start(3)
    finish(process, 0, patience=3600)
    run.check("the demo: kill -9 of a node", moment, twice=1)
