"""Kills at random moments of a whole small pipeline on a local Ray: the bytes stay the same, and nothing is left.

Five runs of the test with eight kills each. A kill hits a random worker, and the pipeline goes on; or it hits the whole
process group of the driver, or an agent of Ray, and the same command is started again. A pipeline that finishes is
compared with a run without faults and without Ray, and the next pipeline begins. Needs neither root nor namespaces.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import ROOT, command_line, wait_until
from tests.pipelines.test_curate import CONFIG, drawing, save

pytestmark = pytest.mark.cluster

NUM_KILLS = 8
# Share of the kills that do not wait until Ray has started. Assumed: less happens before.
SHARE_AT_START = 0.2
# Seconds that processes may take to end after the kill of their driver, and a whole run without a kill. Assumed; an
# idle machine needs 5 and 30.
PATIENCE_FOR_END, PATIENCE_FOR_RUN = 120.0, 600.0
# The environment variable that marks all processes of a pipeline, those of Ray too.
MARK = "SEEDBED_RANDOM_KILLS"


class Pipelines:
    """Pipelines on one set of images, each in a folder of its own, and the bytes of a run without faults."""

    def __init__(self, home: Path, temporary: Path) -> None:
        self._home, self._temporary, self._errors = home, temporary, home / "errors"
        self._mark = f"{MARK}={os.getpid()}-{home.name}"
        for number in range(10):
            save(drawing("discs", number), home / f"seeds/discs/{number}.png")
            save(drawing("stripes", number), home / f"seeds/stripes/{number}.png")
            for kind in ("discs", "stripes", "scribbles"):
                save(drawing(kind, 20 + number), home / f"pool/{kind}/{number}.png")
        for number in range(100, 104):
            save(drawing("scribbles", number), home / f"holdout/{number}.png")
        (home / "config.toml").write_text(CONFIG)
        self._end_of(self.start("whole", "inline"), status=0)
        self.expected = self.bytes_of("whole")
        started = time.monotonic()
        process = self.start("healthy")
        self._wait_for_work("healthy", process)
        self.seconds_to_start, working = time.monotonic() - started, time.monotonic()
        self._end_of(process, status=0)
        self.seconds_of_work = time.monotonic() - working
        self.check("healthy")

    def start(self, output: str, runner: str = "ray") -> "subprocess.Popen[bytes]":
        """Start the command, as the head of a process group."""
        name, _, value = self._mark.partition("=")
        inherited = {key: text for key, text in os.environ.items() if not key.startswith("RAY_")}
        environment = {**inherited, "PYTHONPATH": str(ROOT), "TMPDIR": str(self._temporary), name: value}
        command = [sys.executable, "-m", "pipelines.curate", "--config", "config.toml", "--output", output]
        workers = [] if runner == "inline" else ["--workers", "2"]
        with self._errors.open("wb") as errors:  # a pipe could fill up, since nobody reads it
            return subprocess.Popen(
                [*command, "--runner", runner, *workers],
                cwd=self._home,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )

    def kill_at_random(self, generator: random.Random, num_kills: int) -> int:
        """Run pipelines until `num_kills` kills have hit and the last pipeline is done; returns their number."""
        kills = pipelines = 0
        while kills < num_kills:
            output, pipelines, is_done = f"out-{pipelines}", pipelines + 1, False
            shutil.rmtree(self._home / output, ignore_errors=True)
            while not is_done:
                process = self.start(output)
                agent_killed = False
                while kills < num_kills and self._sleep(output, process, generator):
                    victim = generator.choice(("driver", "worker", "worker", "agent"))
                    hits = self._kill_driver(process) if victim == "driver" else self._kill_of_ray(victim, generator)
                    kills += hits
                    agent_killed |= hits and victim == "agent"
                    print(f"{output}: {victim} {'killed' if hits else 'not there'} ({kills} kills)", flush=True)
                    if victim == "driver":
                        break
                status, message = self._end_of(process)
                # Without one of its agents, Ray ends, and the driver with it.
                assert status in (0, -signal.SIGKILL) or agent_killed or "killed its worker" in message, message
                is_done = status == 0
            self.check(output)
        return pipelines

    def _sleep(self, output: str, process: "subprocess.Popen[bytes]", generator: random.Random) -> bool:
        """Sleep until a random moment, while Ray starts or while the pipeline works; False when it is over."""
        if generator.random() < SHARE_AT_START:
            seconds = generator.uniform(0, self.seconds_to_start)
        else:
            self._wait_for_work(output, process)
            seconds = generator.uniform(0, self.seconds_of_work / 2)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        return process.poll() is None

    def _wait_for_work(self, output: str, process: "subprocess.Popen[bytes]") -> None:
        """Wait until the driver has its Ray, and writes its log, or has ended."""
        driver = self._home / output / "log/driver.json"
        wait_until(lambda: str(process.pid) in _text(driver) or process.poll() is not None, "the pipeline works")

    def _kill_driver(self, process: "subprocess.Popen[bytes]") -> bool:
        """Kill the driver and its process group."""
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        return process.wait() == -signal.SIGKILL

    def _kill_of_ray(self, victim: str, generator: random.Random) -> bool:
        """Kill a random worker of the pipeline, or a random agent of Ray, if there is one."""
        lines = {process: command_line(process) for process in self._processes()}
        victims = [
            process
            for process, line in lines.items()
            if line.startswith("ray::") and line.startswith("ray::_WorkerActor") == (victim == "worker")
        ]
        with contextlib.suppress(IndexError, ProcessLookupError):
            os.kill(generator.choice(sorted(victims)), signal.SIGKILL)
            return True
        return False

    def _processes(self) -> list[int]:
        """All processes of the pipelines, Ray's too."""
        mark = self._mark.encode()
        numbers = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
        return [number for number in numbers if mark in _environment(number).split(b"\0")]

    def _end_of(self, process: "subprocess.Popen[bytes]", status: int | None = None) -> tuple[int, str]:
        """Wait until the command and all of its processes have ended; gives its status and its error output."""
        try:
            process.wait(PATIENCE_FOR_RUN)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise AssertionError(f"the pipeline hangs: {_text(self._errors)}") from None
        message = _text(self._errors)
        assert status is None or process.returncode == status, message
        wait_until(lambda: not self._processes(), "no process of the pipeline is left", PATIENCE_FOR_END)
        return process.returncode, message

    def bytes_of(self, output: str) -> dict[str, bytes]:
        """All files except the log, which holds times."""
        folder = self._home / output
        names = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
        return {str(name): (folder / name).read_bytes() for name in names if name.parts[0] != "log"}

    def check(self, output: str) -> None:
        """Check the files of a finished pipeline."""
        written = self.bytes_of(output)
        assert written.keys() == self.expected.keys()
        assert [name for name in written if written[name] != self.expected[name]] == []
        assert [path for path in (self._home / output).rglob(".*")] == [], "temporary or progress files are left"
        assert list(self._temporary.iterdir()) == [], "temporary files are left"


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def _environment(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/environ").read_bytes()
    except (FileNotFoundError, PermissionError, ProcessLookupError):  # it has ended, or another user owns it
        return b""


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipelines]:
    temporary = Path(tempfile.mkdtemp(prefix="sbk", dir="/tmp"))  # short: Ray's sockets lie in it
    yield Pipelines(tmp_path_factory.mktemp("kills"), temporary)
    shutil.rmtree(temporary)


@pytest.mark.parametrize("seed", range(5))
def test_kills_at_random_moments_change_no_byte(pipelines: Pipelines, seed: int) -> None:
    assert pipelines.kill_at_random(random.Random(seed), NUM_KILLS) >= 1
