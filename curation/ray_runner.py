"""The Ray runner: the contract of runner.py on one machine or many. The only file that imports ray.

A local Ray is started where `RAY_ADDRESS` names none, and stopped again by `close`. Ray listens on all addresses of the
machine, so token authentication stays on: a local Ray gets a random token that only this process and its children know;
a cluster is joined with the user's own (`RAY_AUTH_TOKEN` or `RAY_AUTH_TOKEN_PATH`).
"""

import logging
import math
import os
import secrets
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Any

from curation.errors import ConfigError, InputError, ShardError, UserError
from curation.runner import MAX_ATTEMPTS, Runner, Shard, Worker, name_shard
from curation.storage import ShardRecord

# Results are small and pixels never travel, so the object store stays near Ray's minimum (75 MiB). Assumed ample.
OBJECT_STORE_BYTES = 100 * 1024**2


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
        self._ray, self._dashboard = _connect(num_cpus=max(num_workers * cpus_per_worker, 1))
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
        self._ray.shutdown()

    def map(
        self, stage: str, make_worker: Callable[[], Worker], shards: Sequence[Shard]
    ) -> Generator[ShardRecord, None, None]:
        if not shards:
            return
        ray = self._ray
        worker_class = ray.remote(**self._options)(_WorkerActor)
        num_workers = min(self.num_workers, len(shards))
        while len(self._actors) < num_workers:
            self._actors.append(worker_class.remote())
        actors = self._actors[:num_workers]
        self._num_maps += 1
        job = self._num_maps, ray.put((make_worker, os.getcwd()))
        attempts = [0] * len(shards)
        waiting = deque(range(len(shards)))
        running: dict[Any, tuple[int, Any]] = {}  # reference -> shard index, actor
        finished: dict[int, ShardRecord] = {}
        # What may be finished ahead of the oldest unfinished shard; bounds `finished` when one shard is slow.
        window = 32 * len(actors)
        # One shard per worker: it takes seconds, a result returns in a millisecond, and a death has one suspect.
        free = deque(actors)
        next_index = 0
        try:
            while next_index < len(shards):
                while waiting and free and waiting[0] < next_index + window:
                    index, actor = waiting.popleft(), free.popleft()
                    attempts[index] += 1
                    running[actor.process.remote(*job, shards[index])] = (index, actor)
                done, _ = ray.wait(list(running), num_returns=1)
                index, actor = running.pop(done[0])
                free.append(actor)
                try:
                    finished[index] = ray.get(done[0])
                except ray.exceptions.RayTaskError as error:
                    raise name_shard(stage, shards[index], error.cause) from error
                except ray.exceptions.RayError as error:  # the worker process or its machine died
                    if attempts[index] >= MAX_ATTEMPTS:
                        raise ShardError(
                            f"{stage}, shard {shards[index].name}: its worker died {attempts[index]} times "
                            f"({type(error).__name__}: {str(error).splitlines()[0]}). Look for memory that ran out."
                        ) from error
                    waiting.appendleft(index)
                while next_index in finished:
                    yield finished.pop(next_index)
                    next_index += 1
        finally:
            if next_index < len(shards):
                for actor in self._actors:
                    ray.kill(actor)
                self._actors = []


class _WorkerActor:
    """One worker process: makes the worker of a map once, then takes one shard after another."""

    def __init__(self) -> None:
        self._map_number = 0
        self._worker: Worker | None = None

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


def _connect(num_cpus: float) -> tuple[Any, str]:
    """The module ray, connected, and the address of the dashboard; empty where there is none."""
    address = os.environ.get("RAY_ADDRESS")
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        raise UserError(
            "RAY_AUTH_MODE is 'disabled': Ray listens on all addresses of a machine, and anyone who reaches it could "
            "run code on it. Unset it; for a cluster (RAY_ADDRESS), start Ray and this command with one RAY_AUTH_TOKEN."
        )
    if address is None:
        # Since 2.59 a local Ray asks for a token unless told otherwise. Without this one it would keep one in the home.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would else hide all GPUs from actors that ask for none by clearing CUDA_VISIBLE_DEVICES, with a warning.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray  # reads the environment when it is imported

    if address is not None:
        joined = ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        return ray, joined.dashboard_url or ""
    ray.init(
        num_cpus=math.ceil(num_cpus),
        include_dashboard=False,  # ten processes and a gigabyte, for one run
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    return ray, ""
