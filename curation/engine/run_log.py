"""What a run writes about itself while it works: a line for each finished shard, and signs of life.

    <run>/log/
      shards-<when>-<process>.jsonl         one line for each stage begun, shard finished and stage done
      shards-<when>-<process>-0000.jsonl    the same on an object store, to which nothing can be appended: in pieces
      driver.json                           while a driver is at work: who, and when it last gave a sign of life
      workers/<machine>-<process>.json      which shard each worker is at, and since when

The log is no part of what a run makes: it holds times, which no two runs share, and no stage reads it. It lies outside
the stages' folders, whose bytes are the same for equal inputs. Nothing here is decided by a clock: a wrong one spoils
what a person reads, not the run. The table of stages (`times`) and pipelines/status.py are made of these files alone.
"""

import contextlib
import json
import os
import posixpath
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from curation.engine import progress
from curation.engine.manifest import PROGRESS_NAME, Plan, ShardRecord
from curation.errors import SeedbedError
from curation.files import paths
from curation.files.hashes import hash_json

FOLDER = "log"
DRIVER = "driver.json"
WORKERS = "workers"
# Between two signs of life of a driver, and how old the last may be before it counts as lost. Assumed: six in a row do
# not fail to reach a store that works; clocks of two machines differ by less.
SECONDS_BETWEEN_BEATS = 5.0
SECONDS_UNTIL_LOST = 30.0
# Between two pieces of the log on an object store. Assumed: a run of two days leaves 3,000, and a driver that dies
# loses a minute of lines, not of work.
SECONDS_BETWEEN_PIECES = 60.0


class RunLog:
    """The log that one driver writes about one run. It writes nothing before `start` or the first line."""

    def __init__(self, run: str) -> None:
        self.run = run.rstrip("/")
        self.folder = paths.join(run, FOLDER)
        self._name = f"shards-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{os.getpid()}"
        self._lock = threading.Lock()
        self._file: BinaryIO | None = None
        self._waiting: list[str] = []
        self._num_pieces = 0
        self._last_piece = time.monotonic()
        self._started = time.time()
        self._ended = threading.Event()
        self._heart: threading.Thread | None = None

    @property
    def started(self) -> bool:
        """Whether heartbeats have begun, that is, whether there was anything to do."""
        return self._heart is not None

    def start(self) -> None:
        """Begin the heartbeats, and delete what a killed driver left."""
        if self._heart is None:
            for name in paths.list_names(self.folder):
                if name == WORKERS or name.startswith(paths.TEMPORARY_PREFIX):
                    paths.delete(paths.join(self.folder, name))
            self._beat()
            self._heart = threading.Thread(target=self._keep_beating, name="heartbeat", daemon=True)
            self._heart.start()

    def write(self, event: str, **facts: Any) -> None:
        """Add one line."""
        self.start()
        line = json.dumps({"event": event, "time": round(time.time(), 3), **facts}, ensure_ascii=False)
        with self._lock:
            if paths.is_local(self.folder):
                if self._file is None:
                    path = posixpath.join(paths.filesystem(self.folder)[1], f"{self._name}.jsonl")
                    self._file = open(path, "ab", buffering=0)
                self._file.write(line.encode() + b"\n")
            else:
                self._waiting.append(line)
                if time.monotonic() - self._last_piece > SECONDS_BETWEEN_PIECES:
                    self._write_piece()

    def of_stage(self, output: str) -> "StageLog | None":
        """The log of the stage that writes to the folder `output`; None for a folder outside the run."""
        if not output.startswith(self.run + "/"):
            return None
        parts = output[len(self.run) :].split("/")
        return StageLog(self, "/".join(part for part in parts if part and part != PROGRESS_NAME))

    def close(self) -> None:
        """Write the remaining lines, and delete the heartbeat and the notes."""
        with self._lock:
            self._write_piece()
            if self._file is not None:
                self._file.close()
        if self._heart is not None:
            self._ended.set()
            self._heart.join()
            paths.delete(paths.join(self.folder, WORKERS))
            paths.delete(paths.join(self.folder, DRIVER))

    def _write_piece(self) -> None:
        if self._waiting:
            path = paths.join(self.folder, f"{self._name}-{self._num_pieces:04d}.jsonl")
            paths.write_bytes(path, "".join(line + "\n" for line in self._waiting).encode())
            self._waiting.clear()
            self._num_pieces += 1
        self._last_piece = time.monotonic()

    def _keep_beating(self) -> None:
        while not self._ended.wait(SECONDS_BETWEEN_BEATS):
            try:
                self._beat()
            except OSError as error:  # a full disk will stop a stage with its own error; a missed heartbeat need not
                progress.say(f"log: the heartbeat could not be written: {error}")

    def _beat(self) -> None:
        now = {"machine": os.uname().nodename, "process": os.getpid(), "started": self._started, "beat": time.time()}
        paths.write_bytes(paths.join(self.folder, DRIVER), json.dumps(now).encode(), durable=False)


# The log argument of a stage: None outside a run, where nothing is logged.
Log = RunLog | None


@contextlib.contextmanager
def open_log(run: str) -> Iterator[RunLog]:
    """The log of the run in the folder `run`, closed at the end. An error that ends the block is logged first."""
    log = RunLog(run)
    if read_driver(run) is not None:  # an earlier driver was killed: its files are deleted when this log closes
        log.start()
    try:
        yield log
    except BaseException as error:
        if log.started:
            message = str(error) if isinstance(error, SeedbedError) else f"{type(error).__name__}: {error}"
            log.write("stopped", why=message)
        raise
    finally:
        log.close()


class StageLog:
    """The lines of one stage in the log of the run."""

    def __init__(self, log: RunLog, name: str) -> None:
        self._log = log
        self.name = name
        self.notes = paths.join(log.folder, WORKERS)
        """Folder for the notes of workers."""

    def begin(self, plan: Plan, *, num_done: int, num_workers: int) -> None:
        """Log that the stage begins with its unfinished shards."""
        facts = {"plan": hash_json(plan.model_dump(mode="json"))[:16], "shards": plan.num_shards}
        self._log.write("begin", stage=self.name, **facts, done_before=num_done, workers=num_workers)

    def shard(self, record: ShardRecord, num_items: int) -> None:
        """Log a finished shard."""
        effort = record.effort
        assert effort is not None, record.name
        facts = {"worker": effort.worker, "started": round(effort.started, 3), "seconds": round(effort.seconds, 3)}
        size = sum(file.bytes for file in record.files)
        counts = {"items": num_items, "bytes": size, "totals": record.totals, "rejects": record.rejects}
        self._log.write("shard", stage=self.name, shard=record.name, **facts, **counts)

    def end(self, seconds: float) -> None:
        """Log that the stage is done, and the seconds that this driver took for it."""
        self._log.write("end", stage=self.name, seconds=round(seconds, 3))


def worker_name() -> str:
    """This process: machine and process number."""
    return f"{os.uname().nodename}-{os.getpid()}"


def note_start(folder: str, stage: str, shard: str) -> None:
    """Leave word, by the worker itself, that it begins with a shard."""
    text = json.dumps({"stage": stage, "shard": shard, "worker": worker_name(), "started": time.time()})
    # Not synced: nothing depends on it, and of tiny shards it would take most of the time.
    paths.write_bytes(paths.join(folder, f"{worker_name()}.json"), text.encode(), durable=False)


# Reading


@dataclass(frozen=True)
class Driver:
    """Who drives the run. Times are seconds since 1970."""

    machine: str
    process: int
    started: float
    beat: float


@dataclass(frozen=True)
class Note:
    """What a worker said when it began with a shard."""

    stage: str
    shard: str
    worker: str
    started: float


@dataclass
class StageTimes:
    """What the log says of one stage, over all drivers that worked on it. Steps of a stage have entries of their own.

    Times are in seconds; `begun` and `last` (of the last line) since 1970.
    """

    plan: str = ""
    """Stands for what the stage was asked to make."""
    num_shards: int = 0
    seconds: float = 0.0
    """Of the stage, from its beginning to its end; of a driver that was killed, to its last line."""
    capacity: float = 0.0
    """Of all workers together: the seconds above by their number."""
    busy: float = 0.0
    """What workers spent on shards; of steps too."""
    shards: int = 0
    """Shards with a line; those whose driver died before it wrote one are missing."""
    items: int = 0
    bytes: int = 0
    """Written."""
    begun: float = 0.0
    """When the last driver began."""
    last: float = 0.0
    shards_since: int = 0
    """Shards with a line since then."""
    done: bool = False
    of_shard: dict[str, tuple[float, int, int]] = field(default_factory=dict, repr=False)
    """Seconds, items and bytes of each."""

    @property
    def idle(self) -> float:
        """The share of its time that a worker spent on no shard."""
        return max(0.0, 1 - self.busy / self.capacity) if self.capacity else 0.0


def read_driver(run: str) -> Driver | None:
    """Who drives the run, or drove it until it was killed; None where it ended in order, or never began."""
    try:
        return Driver(**json.loads(paths.read_bytes(paths.join(run, FOLDER, DRIVER))))
    except FileNotFoundError:
        return None


def read_notes(run: str) -> list[Note]:
    """What each worker is at; of a shard that several began, the last that did."""
    folder = paths.join(run, FOLDER, WORKERS)
    latest: dict[tuple[str, str], Note] = {}
    for name in paths.list_names(folder):
        if name.endswith(".json") and not name.startswith(paths.TEMPORARY_PREFIX):
            try:
                note = Note(**json.loads(paths.read_bytes(paths.join(folder, name))))
            except FileNotFoundError:  # the run ended just now
                continue
            before = latest.get((note.stage, note.shard))
            if before is None or note.started > before.started:
                latest[note.stage, note.shard] = note
    return sorted(latest.values(), key=lambda note: (note.stage, note.started))


def read_lines(run: str) -> Iterator[dict[str, Any]]:
    """The lines of all drivers' logs, oldest driver first. What a killed one left without an end is left out."""
    folder = paths.join(run, FOLDER)
    for name in paths.list_names(folder):
        if name.startswith("shards-") and name.endswith(".jsonl"):
            for line in paths.read_bytes(paths.join(folder, name)).splitlines(keepends=True):
                if line.endswith(b"\n"):
                    yield json.loads(line)


def times(run: str) -> dict[str, StageTimes]:
    """What the log says of each stage and of each step of one, in the order in which they began."""
    stages: dict[str, StageTimes] = {}
    workers: dict[str, int] = {}  # of the stages that are not closed

    def close(name: str, seconds: float) -> None:
        stages[name].seconds += seconds
        stages[name].capacity += seconds * workers.pop(name)

    for line in read_lines(run):
        if line["event"] == "stopped":
            continue
        name = line["stage"]
        before = stages.get(name)
        if line["event"] == "begin":
            if name in workers and before is not None:  # its driver was killed
                close(name, before.last - before.begun)
            anew = before is not None and (before.plan != line["plan"] or before.done)
            if anew or (before is not None and before.of_shard and not line["done_before"]):
                for own in [own for own in stages if own == name or own.startswith(name + "/")]:
                    del stages[own]
                    workers.pop(own, None)
            stage = stages.setdefault(name, StageTimes())
            stage.plan, stage.num_shards = line["plan"], line["shards"]
            stage.begun, stage.shards_since = line["time"], 0
            workers[name] = line["workers"]
        elif line["event"] == "shard":
            stages[name].of_shard[line["shard"]] = line["seconds"], line["items"], line["bytes"]
            stages[name].shards_since += 1
        else:
            close(name, line["seconds"])
            stages[name].done = True
        while name:  # a step's line is a sign of its stage too
            if name in stages:
                stages[name].last = line["time"]
            name = name.rpartition("/")[0]
    for name in list(workers):
        close(name, stages[name].last - stages[name].begun)
    for name, stage in stages.items():
        stage.shards = len(stage.of_shard)
        stage.items = sum(items for _, items, _ in stage.of_shard.values())
        stage.bytes = sum(size for _, _, size in stage.of_shard.values())
        inside = [other for own, other in stages.items() if own == name or own.startswith(name + "/")]
        stage.busy = sum(seconds for other in inside for seconds, _, _ in other.of_shard.values())
    return stages


def why_stopped(run: str) -> str | None:
    """What ended the last driver, where it was no kill and nothing was done since."""
    last = None
    for line in read_lines(run):
        last = str(line["why"]) if line["event"] == "stopped" else None
    return last
