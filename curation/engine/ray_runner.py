"""The Ray runner: the contract of runner.py on one machine or many. The only file that imports ray.

A local Ray is started where `RAY_ADDRESS` names none, and stopped again by `close`. Ray listens on all addresses of the
machine, so token authentication is always on. A local Ray gets a token made for the run:

    <folder for temporary files>/seedbed-ray-<random>/  readable by its owner alone
      token        what every process of this Ray knows
      r/           Ray's own sockets and logs, which it would let everyone change

The folder is gone with the run; where the run was killed, with the start of the next. A cluster is joined with the
user's token (`RAY_AUTH_TOKEN`, `RAY_AUTH_TOKEN_PATH` or `~/.ray/auth_token`), and refused when it lets strangers in.
"""

import contextlib
import functools
import logging
import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from curation.engine import progress
from curation.engine.manifest import ShardRecord
from curation.engine.runner import MAX_ATTEMPTS, Runner, Shard, Worker, name_shard
from curation.errors import ConfigError, InputError, ShardError, UserError
from curation.files.folder_lock import locked

# Results are small and pixels never travel, so the object store stays near Ray's minimum (75 MiB). Assumed ample.
OBJECT_STORE_BYTES = 100 * 1024**2
# Between two lines that say that no worker is there, and until the run gives up. Assumed: a machine that is replaced
# comes up within minutes.
SECONDS_BETWEEN_REMINDERS = 30.0
SECONDS_WITHOUT_WORKERS = 900.0
# Short: Ray's sockets lie 67 characters below, and Linux takes no more than 107 in all.
FOLDER_PREFIX = "seedbed-ray-"


class RayRunner(Runner):
    """Runs workers as Ray actors, `num_workers` at a time, each with `cpus_per_worker` and `gpus_per_worker`.

    The processes stay from one stage to the next, since starting Python and torch anew takes seconds; what a worker
    holds is dropped when the next stage's is made. A map that fails or is left early stops them.
    """

    def __init__(self, *, num_workers: int, cpus_per_worker: float = 1, gpus_per_worker: float = 0) -> None:
        if num_workers < 1:
            raise ConfigError(f"num_workers must be at least 1. Found: {num_workers}")
        self.num_workers = num_workers
        self._options = {"num_cpus": cpus_per_worker, "num_gpus": gpus_per_worker, "max_restarts": -1}
        self._connection = contextlib.ExitStack()
        self._ray, self._dashboard = self._connection.enter_context(
            _connected(num_cpus=max(num_workers * cpus_per_worker, 1))
        )
        self._actors: list[Any] = []
        self._num_maps = 0
        total = self._ray.cluster_resources()
        for resource, wanted in (("CPU", cpus_per_worker * num_workers), ("GPU", gpus_per_worker * num_workers)):
            if wanted > total.get(resource, 0):
                self.close()
                raise ConfigError(
                    f"{num_workers} workers need {wanted:g} {resource}; this Ray has {total.get(resource, 0):g}. "
                    "Ask for fewer workers (runner.num_workers), or join a larger cluster (RAY_ADDRESS)."
                )

    def where_to_look(self) -> list[str]:
        """Where this Ray's dashboard is and where Prometheus finds its metrics, or that there are none; two lines."""
        ports = [(node["NodeManagerAddress"], node["MetricsExportPort"]) for node in self._ray.nodes() if node["Alive"]]
        pages = [f"http://{address}:{port}/metrics" for address, port in ports if port > 0]
        more = f" and on {len(pages) - 1} more machines" if len(pages) > 1 else ""
        return [
            "Ray's dashboard: " + (f"http://{self._dashboard}" if self._dashboard else "none (docs/operations.md)"),
            "Ray's metrics: " + (pages[0] + more if pages else "none (docs/operations.md)"),
        ]

    def close(self) -> None:
        """Leave Ray, and stop it if this runner started it."""
        self._connection.close()

    def map(
        self, stage: str, make_worker: Callable[[], Worker], shards: Sequence[Shard], *, max_poison_shards: int = 0
    ) -> Generator[ShardRecord | None, None, None]:
        if not shards:
            return
        ray = self._ray
        worker_class = ray.remote(**self._options)(_WorkerActor)
        while len(self._actors) < min(self.num_workers, len(shards)):
            self._actors.append(worker_class.remote())
        self._num_maps += 1
        job = self._num_maps, ray.put((make_worker, os.getcwd()))
        attempts = [0] * len(shards)
        waiting = deque(range(len(shards)))
        running: dict[Any, tuple[int, Any]] = {}  # reference -> shard index, actor
        # Ray starts a dead actor again when there is room, which is never where its machine stays away: an actor gets
        # work only once it has answered.
        absent = {actor.wake.remote(): actor for actor in self._actors}
        finished: dict[int, ShardRecord | None] = {}
        poison: list[str] = []
        # What may be finished ahead of the oldest unfinished shard; bounds `finished` when one shard is slow.
        window = 32 * len(self._actors)
        # One shard per worker: it takes seconds, a result returns in a millisecond, and a death has one suspect.
        free: deque[Any] = deque()
        next_index = 0
        alone_since = told = time.monotonic()
        try:
            while next_index < len(shards):
                while waiting and free and waiting[0] < next_index + window:
                    index, actor = waiting.popleft(), free.popleft()
                    attempts[index] += 1
                    running[actor.process.remote(*job, shards[index])] = (index, actor)
                done, _ = ray.wait([*running, *absent], num_returns=1, timeout=SECONDS_BETWEEN_REMINDERS)
                now = time.monotonic()
                if running or free:
                    alone_since = told = now
                elif now - told >= SECONDS_BETWEEN_REMINDERS:
                    told = now
                    _wait_for_machines(stage, len(self._actors), now - alone_since)
                for reference in done:
                    if (actor := absent.pop(reference, None)) is not None:
                        try:
                            ray.get(reference)
                            free.append(actor)
                        except ray.exceptions.ActorDiedError as error:  # for good: Ray does not start it again
                            raise ShardError(f"{stage}: a worker could not be started: {error}") from error
                        except ray.exceptions.RayError:  # it died once more, or its machine is not there
                            absent[actor.wake.remote()] = actor
                        continue
                    index, actor = running.pop(reference)
                    try:
                        finished[index] = ray.get(reference)
                        free.append(actor)
                    except ray.exceptions.RayTaskError as error:
                        raise name_shard(stage, shards[index], error.cause) from error
                    except ray.exceptions.RayError as error:  # the worker process or its machine died
                        absent[actor.wake.remote()] = actor
                        if attempts[index] < MAX_ATTEMPTS:
                            waiting.appendleft(index)
                            continue
                        poison.append(shards[index].name)
                        if len(poison) > max_poison_shards:
                            others = f" So did {', '.join(poison[:-1])} before it." if poison[:-1] else ""
                            raise ShardError(
                                f"{stage}, shard {shards[index].name}: its worker died {attempts[index]} times "
                                f"({type(error).__name__}: {str(error).splitlines()[0]}).{others} "
                                "Look for memory that ran out."
                            ) from error
                        finished[index] = None
                while next_index in finished:
                    yield finished.pop(next_index)
                    next_index += 1
        finally:
            if next_index < len(shards):
                for actor in self._actors:
                    ray.kill(actor)
                self._actors = []


def _wait_for_machines(stage: str, num_workers: int, seconds: float) -> None:
    """Tell that no worker is there. Raises ShardError after SECONDS_WITHOUT_WORKERS."""
    if seconds > SECONDS_WITHOUT_WORKERS:
        raise ShardError(
            f"{stage}: none of {num_workers} workers was there for {seconds:,.0f} s. Look whether machines of the "
            "cluster are gone or taken by another job (`ray status`); the same command goes on from here."
        )
    progress.say(f"{stage}: none of {num_workers} workers is there, waiting for machines")


class _WorkerActor:
    """One worker process: makes the worker of a map once, then takes one shard after another."""

    def __init__(self) -> None:
        self._map_number = 0
        self._worker: Worker | None = None

    def wake(self) -> None:
        """Answer: the process is there."""

    def process(self, map_number: int, job: tuple[Callable[[], Worker], str], shard: Shard) -> ShardRecord:
        if self._worker is None or map_number != self._map_number:
            self._worker = None  # before the next one takes its memory
            make_worker, folder = job
            # Relative paths in a config mean the same on every worker.
            if not os.path.isdir(folder):
                raise InputError(
                    f"The folder '{folder}' that the run was started in is not on machine {os.uname().nodename}. "
                    "Start in a folder that every machine sees."
                )
            os.chdir(folder)
            self._worker, self._map_number = make_worker(), map_number
        return self._worker(shard)


@contextlib.contextmanager
def _connected(num_cpus: float) -> Iterator[tuple[Any, str]]:
    """The module ray, connected to the cluster that RAY_ADDRESS names or to a local Ray that ends with the block.

    Beside it, the address of the dashboard; empty where there is none.
    """
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        raise UserError(
            "RAY_AUTH_MODE is 'disabled': Ray listens on all addresses of a machine, and anyone who reaches it could "
            "run code on it. Unset it; for a cluster (RAY_ADDRESS), start Ray and this command with one RAY_AUTH_TOKEN."
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would else hide all GPUs from actors that ask for none by clearing CUDA_VISIBLE_DEVICES, with a warning.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    on_sigterm = signal.getsignal(signal.SIGTERM)
    address = os.environ.get("RAY_ADDRESS")
    if address:
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # for a local Ray that is the default, here it would be none
    with contextlib.ExitStack() as stack:
        folder = None if address else stack.enter_context(_private_folder())
        import ray  # reads the environment when it is imported

        stack.callback(ray.shutdown)
        if address:
            dashboard = _join(ray, address)
        else:
            dashboard = ""
            ray.init(
                address="local",  # and not a Ray that someone else started on this machine
                num_cpus=math.ceil(num_cpus),
                include_dashboard=False,  # ten processes and a gigabyte, for one run
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=folder,
            )
        if callable(on_sigterm) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray has put its own there, which ends with status 15
        yield ray, dashboard


def _join(ray: Any, address: str) -> str:
    """Connect to a running cluster; gives the address of its dashboard.

    Raises UserError when it is not there, or asks for another token or for none.
    """
    if _lets_in(address, {"RAY_AUTH_TOKEN": secrets.token_hex(32)}):
        raise UserError(
            f"The Ray cluster at RAY_ADDRESS={address} let in a stranger with a token made up just now: it was started "
            "without authentication, and anyone who reaches it can run code on it. Start Ray on every machine with "
            "RAY_AUTH_MODE=token and one RAY_AUTH_TOKEN."
        )
    if not _lets_in(address, {}):
        raise UserError(
            f"The Ray cluster at RAY_ADDRESS={address} does not take this token, or there is none here. Give the "
            "cluster's own: RAY_AUTH_TOKEN, or a file of it in RAY_AUTH_TOKEN_PATH."
        )
    joined = ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    return joined.dashboard_url or ""


def _lets_in(address: str, environment: dict[str, str]) -> bool:
    """Whether a cluster answers a process with these changes of the environment. Raises UserError if there is none."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    answer = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    refused = "AuthenticationError" in answer.stderr or "couldn't find an authentication token" in answer.stderr
    if answer.returncode != 0 and not refused:
        last_line = (answer.stderr.strip() or "no message").splitlines()[-1]
        raise UserError(
            f"No Ray cluster answers at RAY_ADDRESS={address}: {last_line}. Start it, or unset RAY_ADDRESS."
        )
    return answer.returncode == 0


@contextlib.contextmanager
def _private_folder() -> Iterator[str]:
    """A folder for a local Ray, with its token; both are gone after the block, or when the next run starts."""
    place = Path(tempfile.gettempdir())
    for left in place.glob(FOLDER_PREFIX + "*/"):
        with (
            contextlib.suppress(OSError),
            locked(str(left)),
        ):  # OSError: locked, of someone else, or gone by now
            if (left / "token").exists():  # else it is not ours, or was made this moment and not locked yet
                shutil.rmtree(left)
    folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=place))  # mode 700
    before = {name: os.environ.pop(name, None) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")}
    try:
        with locked(str(folder)):
            token = folder / "token"
            token.touch(mode=0o600)
            token.write_text(_token())
            os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
            yield str(folder / "r")
    finally:
        os.environ.pop("RAY_AUTH_TOKEN_PATH", None)
        os.environ.update({name: value for name, value in before.items() if value is not None})
        shutil.rmtree(folder, ignore_errors=True)  # Ray's last processes may still write; the next run takes the rest


@functools.cache
def _token() -> str:
    """This process's own: Ray keeps the first token that it reads."""
    return secrets.token_hex(32)
