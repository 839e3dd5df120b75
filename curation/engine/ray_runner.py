"""The Ray runner: the contract of runner.py on one machine or many. In Ray's terms, a worker process is an actor and a
machine is a node.

Without `RAY_ADDRESS`, a local Ray is started; `close` stops it. Ray listens on all addresses of the machine, so token
authentication is always on. A local Ray gets a token made for the run:

    <folder for temporary files>/seedbed-ray-<random>/  only its owner can read it
      token        the secret that all processes of this Ray share
      r/           Ray's sockets and logs, which Ray creates writable by everyone

Systems limit the length of a socket's path. Where TMPDIR is too long for it, as on SLURM and macOS, the folder lies in
/tmp. The folder is deleted at the end of the run; after a kill, at the start of the next run. The connection to a
cluster uses the user's token (`RAY_AUTH_TOKEN`, `RAY_AUTH_TOKEN_PATH` or `~/.ray/auth_token`). A cluster without
authentication is refused.
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
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from curation.engine import entry, progress
from curation.engine.manifest import ShardRecord
from curation.engine.runner import (
    MAX_ATTEMPTS,
    OnProgress,
    Reported,
    Runner,
    Shard,
    Worker,
    listening,
    num_items_of,
    shard_error,
)
from curation.errors import ConfigError, InputError, ShardError, UserError
from curation.files.folder_lock import locked

# Results are small and pixels never travel, so the object store stays near Ray's minimum (75 MiB). Assumed ample.
OBJECT_STORE_BYTES = 100 * 1024**2
# Without any worker: the time between two reminders, and the time until the run stops. Assumed: a replaced machine
# starts within minutes.
SECONDS_BETWEEN_REMINDERS = 30.0
SECONDS_WITHOUT_WORKERS = 900.0
# Between two questions to a worker for its progress. Assumed: a person sees it as continuous.
SECONDS_BETWEEN_REPORTS = 1.0
# Questions a second to all workers together. One takes the driver 0.9 ms of processor time and the worker 1.1 ms
# (measured 2026-11 on two cores, ray 2.60), so this many take a tenth of one of the driver's cores.
MAX_REPORTS_PER_SECOND = 100
# The name of the thread of a worker that answers while another one works.
PROGRESS_GROUP = "progress"
# Short, because systems limit a socket's path. Cited: sys/un.h, 108 bytes with the final zero; on macOS 104.
FOLDER_PREFIX = "seedbed-ray-"
MAX_SOCKET_PATH = 103 if sys.platform == "darwin" else 107
# Length of "/session_2026-11-28_21-13-08_123456_1234567/sockets/plasma_store", the longest that Ray appends, and of
# the random part of the folder and "/r". Measured: ray 2.60.
SOCKET_NAME = 64
RANDOM_PART = 8 + 2


class RayRunner(Runner):
    """Runs workers as Ray actors, `num_workers` at a time, each with `cpus_per_worker` and `gpus_per_worker`.

    The processes are reused by the next stage, because starting Python and torch takes seconds. The worker of a stage
    is deleted before the worker of the next stage is created. A map that fails or is cancelled stops the processes.
    """

    def __init__(
        self,
        *,
        num_workers: int,
        cpus_per_worker: float = 1,
        gpus_per_worker: float = 0,
        gpu_setting: str = "device",
    ) -> None:
        """gpu_setting: the name of the setting that needs the GPUs, for the message where they are missing."""
        if num_workers < 1:
            raise ConfigError(f"num_workers must be at least 1. Found: {num_workers}")
        self.num_workers = num_workers
        self._actor_options = {
            "num_cpus": cpus_per_worker,
            "num_gpus": gpus_per_worker,
            "max_restarts": -1,
            "concurrency_groups": {PROGRESS_GROUP: 1},
        }
        self._connection = contextlib.ExitStack()
        num_cpus = max(math.ceil(num_workers * cpus_per_worker), 1)
        address, started = os.environ.get("RAY_ADDRESS"), time.monotonic()
        on_cores = f"on {num_cpus} core{'s' if num_cpus > 1 else ''} of this machine"
        progress.say(f"Connecting to the Ray cluster {address} ..." if address else f"Starting Ray {on_cores} ...")
        self._ray, self._dashboard = self._connection.enter_context(_connect(num_cpus))
        progress.say(f"{'Connected' if address else 'Ray runs'} after {time.monotonic() - started:.1f} s")
        self._actors: list[Any] = []
        self._num_maps = 0
        total = self._ray.cluster_resources()
        for resource, required in (("CPU", cpus_per_worker * num_workers), ("GPU", gpus_per_worker * num_workers)):
            if required > total.get(resource, 0):
                self.close()
                raise ConfigError(_shortage(resource, required, total.get(resource, 0), num_workers, gpu_setting))

    def monitoring_addresses(self) -> list[str]:
        """A line with the address of Ray's dashboard, and one with that of its Prometheus metrics, where they exist."""
        ports = [(node["NodeManagerAddress"], node["MetricsExportPort"]) for node in self._ray.nodes() if node["Alive"]]
        pages = [f"http://{address}:{port}/metrics" for address, port in ports if port > 0]
        more = f" and on {len(pages) - 1} more machines" if len(pages) > 1 else ""
        lines = [f"Ray's dashboard: http://{self._dashboard}"] if self._dashboard else []
        return lines + ([f"Ray's metrics: {pages[0]}{more}"] if pages else [])

    def close(self) -> None:
        """Disconnect from Ray; stop it if this runner started it."""
        self._connection.close()

    def map(
        self,
        stage: str,
        make_worker: Callable[[], Worker],
        shards: Sequence[Shard],
        *,
        max_poison_shards: int = 0,
        on_progress: OnProgress = lambda reported: None,
    ) -> Generator[ShardRecord | None, None, None]:
        if not shards:
            return
        ray = self._ray
        worker_class = ray.remote(**self._actor_options)(_WorkerActor)
        while len(self._actors) < min(self.num_workers, len(shards)):
            self._actors.append(worker_class.remote())
        self._num_maps += 1
        map_arguments = self._num_maps, ray.put((make_worker, os.getcwd()))
        attempts = [0] * len(shards)
        pending = deque(range(len(shards)))
        running: dict[Any, tuple[int, Any]] = {}  # reference -> shard index, actor
        # Ray restarts a dead actor when resources are free, which may never happen if its machine is gone. So an actor
        # gets a shard only after it has answered a ping.
        starting = {actor.ping.remote(): actor for actor in self._actors}
        finished: dict[int, ShardRecord | None] = {}
        poison: list[str] = []
        # Shards may finish this far ahead of the oldest unfinished shard; bounds `finished` when one shard is slow.
        window = 32 * len(self._actors)
        # One shard per actor at a time: it takes seconds, its result returns in a millisecond, and when the actor dies
        # the shard is known.
        idle: deque[Any] = deque()
        next_index = 0
        reports = _Reports(ray, self._num_maps)
        waiting: dict[str, Reported] = {}  # of shards that are finished before an earlier one
        seconds_between_reports = max(SECONDS_BETWEEN_REPORTS, len(self._actors) / MAX_REPORTS_PER_SECOND)
        last_seen_worker = last_reminder = last_report = time.monotonic()
        try:
            while next_index < len(shards):
                while pending and idle and pending[0] < next_index + window:
                    index, actor = pending.popleft(), idle.popleft()
                    attempts[index] += 1
                    running[actor.process.remote(*map_arguments, shards[index])] = (index, actor)
                done, _ = ray.wait([*running, *starting], num_returns=1, timeout=seconds_between_reports)
                now = time.monotonic()
                if now - last_report >= seconds_between_reports:
                    last_report = now
                    reported = reports.gather({shards[index].name: actor for index, actor in running.values()})
                    on_progress(waiting | reported)
                if running or idle:
                    last_seen_worker = last_reminder = now
                elif now - last_reminder >= SECONDS_BETWEEN_REMINDERS:
                    last_reminder = now
                    _wait_for_machines(stage, len(self._actors), now - last_seen_worker)
                for reference in done:
                    if (actor := starting.pop(reference, None)) is not None:
                        try:
                            ray.get(reference)
                            idle.append(actor)
                        except ray.exceptions.ActorDiedError as error:  # Ray does not restart it
                            raise ShardError(f"{stage}: a worker could not be started: {error}") from error
                        except ray.exceptions.RayError:  # it died again, or its machine is gone
                            starting[actor.ping.remote()] = actor
                        continue
                    index, actor = running.pop(reference)
                    reports.forget(shards[index].name)
                    try:
                        finished[index] = record = ray.get(reference)
                        idle.append(actor)
                        num_items = num_items_of(shards[index], record)
                        waiting[shards[index].name] = Reported(num_items, num_items)
                    except ray.exceptions.RayTaskError as error:
                        raise shard_error(stage, shards[index], error.cause) from error
                    except ray.exceptions.RayError as error:  # the worker process or its machine died
                        starting[actor.ping.remote()] = actor
                        if attempts[index] < MAX_ATTEMPTS:
                            pending.appendleft(index)
                            continue
                        poison.append(shards[index].name)
                        if len(poison) > max_poison_shards:
                            earlier = f" So did the workers of {', '.join(poison[:-1])} before." if poison[:-1] else ""
                            raise ShardError(
                                f"{stage}, shard {shards[index].name}: its worker died {attempts[index]} times "
                                f"({type(error).__name__}: {str(error).splitlines()[0]}).{earlier} "
                                "Check whether the machine ran out of memory."
                            ) from error
                        finished[index] = None
                while next_index in finished:
                    waiting.pop(shards[next_index].name, None)
                    yield finished.pop(next_index)
                    next_index += 1
        except SystemExit:  # ray.wait ends with status 1 where a signal handler ended with another
            entry.exit_by_signal()
            raise
        finally:
            if next_index < len(shards):
                for actor in self._actors:
                    ray.kill(actor)
                self._actors = []


def _shortage(resource: str, required: float, available: float, num_workers: int, gpu_setting: str) -> str:
    """The message on a Ray with too few CPUs or GPUs for the workers."""
    reason = f", because {gpu_setting} is 'cuda'" if resource == "GPU" else ""
    need = f"{num_workers} workers (--workers) need {required:g} {resource}s{reason}"
    if not available:
        return f"{need}, but there is no {resource}. Set it to 'cpu', or connect to a cluster with GPUs (RAY_ADDRESS)."
    fewer = max(1, int(available * num_workers / required))
    return f"{need}; this Ray has {available:g}. Give --workers {fewer}, or connect to a larger cluster (RAY_ADDRESS)."


def _wait_for_machines(stage: str, num_workers: int, seconds: float) -> None:
    """Print that no worker is available. Raises ShardError after SECONDS_WITHOUT_WORKERS."""
    if seconds > SECONDS_WITHOUT_WORKERS:
        raise ShardError(
            f"{stage}: none of {num_workers} workers was available for {seconds:,.0f} s. Check whether machines of the "
            "cluster are gone or used by another job (`ray status`). The same command continues this run."
        )
    progress.say(f"{stage}: none of {num_workers} workers is available, waiting for machines")


class _Reports:
    """Asks workers for the items that they have done of their shards. The driver never waits for an answer."""

    def __init__(self, ray: Any, map_number: int) -> None:
        self._ray, self._map_number = ray, map_number
        self._asked: dict[str, Any] = {}  # by shard: the reference of the answer
        self._reported: dict[str, Reported] = {}

    def gather(self, workers: Mapping[str, Any]) -> dict[str, Reported]:
        """The last answer of the worker of each shard. Asks each again whose answer has come."""
        asked = {reference: name for name, reference in self._asked.items()}
        answered = self._ray.wait(list(asked), num_returns=len(asked), timeout=0)[0] if asked else []
        for reference in answered:
            del self._asked[asked[reference]]
            with contextlib.suppress(self._ray.exceptions.RayError):  # the process has died; `map` sees that too
                map_number, name, reported = self._ray.get(reference)
                if (map_number, name) == (self._map_number, asked[reference]):
                    self._reported[name] = reported
        for name, worker in workers.items():
            if name not in self._asked:
                self._asked[name] = worker.reported.options(concurrency_group=PROGRESS_GROUP).remote()
        return {name: self._reported.get(name, Reported()) for name in workers}

    def forget(self, name: str) -> None:
        """Drop what was reported for a shard, because it is done or its worker died: a new attempt begins at 0."""
        self._asked.pop(name, None)
        self._reported.pop(name, None)


class _WorkerActor:
    """One worker process: creates the worker once per map, then processes one shard after another.

    Ray calls `reported` in a thread of its own, and all other methods in one other thread, one after another.
    """

    def __init__(self) -> None:
        self._map_number = 0
        self._worker: Worker | None = None
        self._in_progress = 0, "", Reported()

    def ping(self) -> None:
        """Return as soon as the process runs."""

    def reported(self) -> tuple[int, str, Reported]:
        """The map, the name of the shard in progress, and its items so far.

        Shards of several maps have the same names, and Ray may answer before it has called `process` for the next one.
        """
        return self._in_progress

    def process(
        self, map_number: int, worker_and_folder: tuple[Callable[[], Worker], str], shard: Shard
    ) -> ShardRecord:
        self._in_progress = map_number, shard.name, Reported()
        if self._worker is None or map_number != self._map_number:
            self._worker = None  # free its memory before the next worker is created
            make_worker, folder = worker_and_folder
            # Relative paths in a config must mean the same on every worker.
            if not os.path.isdir(folder):
                raise InputError(
                    f"The working folder of the run, '{folder}', does not exist on machine {os.uname().nodename}. "
                    "Start in a folder that every machine can read."
                )
            os.chdir(folder)
            self._worker, self._map_number = make_worker(), map_number

        def keep(reported: Reported) -> None:
            self._in_progress = map_number, shard.name, reported

        with listening(keep):
            return self._worker(shard)


@contextlib.contextmanager
def _connect(num_cpus: int) -> Iterator[tuple[Any, str]]:
    """The module `ray`, connected for the duration of the block, and the address of the dashboard, "" without one.

    With RAY_ADDRESS, the connection goes to that cluster; without, to a local Ray that stops at the end of the block.
    """
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        raise UserError(
            "RAY_AUTH_MODE is 'disabled': Ray listens on all addresses of a machine, and anyone who can connect could "
            "run code on it. Unset it. For a cluster (RAY_ADDRESS), use one RAY_AUTH_TOKEN for Ray and this command."
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Without this, Ray clears CUDA_VISIBLE_DEVICES for actors that request no GPU, and prints a warning.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    previous_handler = signal.getsignal(signal.SIGTERM)
    address = os.environ.get("RAY_ADDRESS")
    if address:
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray's default for a local Ray, but not for a cluster
    with contextlib.ExitStack() as stack:
        folder = None if address else stack.enter_context(_private_folder())
        import ray  # reads the environment at import

        stack.callback(ray.shutdown)
        if address:
            dashboard = _connect_to_cluster(ray, address)
        else:
            dashboard = ""
            try:
                ray.init(
                    address="local",  # not a Ray that another user started on this machine
                    num_cpus=num_cpus,
                    include_dashboard=False,  # it costs ten processes and a gigabyte
                    object_store_memory=OBJECT_STORE_BYTES,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    _temp_dir=folder,
                )
            except SystemExit as stop:
                if stop.code == signal.SIGTERM:  # of Ray's handler
                    raise SystemExit(128 + signal.SIGTERM) from None
                raise
        if callable(previous_handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, previous_handler)  # Ray's handler would exit with status 15
        yield ray, dashboard


def _connect_to_cluster(ray: Any, address: str) -> str:
    """Connect to a running cluster and return the address of its dashboard.

    Raises UserError when no cluster answers, it refuses the token, or it accepts any token.
    """
    if _accepts(address, {"RAY_AUTH_TOKEN": secrets.token_hex(32)}):
        raise UserError(
            f"The Ray cluster at RAY_ADDRESS={address} accepted a random token: it was started without authentication, "
            "and anyone who can connect can run code on it. Start Ray on every machine with RAY_AUTH_MODE=token and "
            "one RAY_AUTH_TOKEN."
        )
    if not _accepts(address, {}):
        raise UserError(
            f"The Ray cluster at RAY_ADDRESS={address} refused this token, or no token is set. Set RAY_AUTH_TOKEN to "
            "the token of the cluster, or RAY_AUTH_TOKEN_PATH to a file that holds it."
        )
    context = ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    return context.dashboard_url or ""


def _accepts(address: str, environment: dict[str, str]) -> bool:
    """Whether the cluster accepts a process with these additional variables. Raises UserError if none answers."""
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
    """A folder for a local Ray, with its token. Both are deleted after the block, or when the next run starts."""
    parent = _short_parent(tempfile.gettempdir())
    for leftover in parent.glob(FOLDER_PREFIX + "*/"):
        # OSError: another run holds the lock, another user owns the folder, or it was deleted just now.
        with contextlib.suppress(OSError), locked(str(leftover)):
            if (leftover / "token").exists():  # without a token it is not ours, or too new to be locked
                shutil.rmtree(leftover)
    folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=parent))  # mode 700
    user_variables = {name: os.environ.pop(name, None) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")}
    try:
        with locked(str(folder)):
            token = folder / "token"
            token.touch(mode=0o600)
            token.write_text(_token())
            os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
            yield str(folder / "r")
    finally:
        os.environ.pop("RAY_AUTH_TOKEN_PATH", None)
        os.environ.update({name: value for name, value in user_variables.items() if value is not None})
        shutil.rmtree(folder, ignore_errors=True)  # Ray may still be writing; the next run deletes the rest


def _short_parent(temporary: str) -> Path:
    """`temporary`, or /tmp where that path is too long for Ray's sockets. Raises UserError if /tmp is not writable."""
    longest = MAX_SOCKET_PATH - len("/" + FOLDER_PREFIX) - RANDOM_PART - SOCKET_NAME
    if len(os.fsencode(temporary)) <= longest:
        return Path(temporary)
    if not os.access("/tmp", os.W_OK | os.X_OK):
        raise UserError(
            f"TMPDIR is '{temporary}'; Ray's sockets need a path of at most {longest} bytes, and /tmp is not writable. "
            "Set TMPDIR to a shorter path, or give --runner inline."
        )
    return Path("/tmp")


@functools.cache
def _token() -> str:
    """The token of this process. It never changes, because Ray keeps the first token that it reads."""
    return secrets.token_hex(32)
