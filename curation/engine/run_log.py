"""The log of a run: a line for each finished shard, the heartbeat of the driver, and notes of the workers.

    <run>/log/
      shards-<time>-<process>.jsonl         one line for each stage begun, shard finished and stage done
      shards-<time>-<process>-0000.jsonl    the same in pieces, for an object store, where files cannot be appended to
      driver.json                           while a driver runs: its machine and process, and its last heartbeat
      workers/<machine>-<process>.json      the current shard of each worker, and its start

The log is not an output of the run: it holds times, which differ between runs, and no stage reads it. It lies outside
the folders of the stages, whose bytes are equal for equal inputs. No decision of the run depends on a clock: a wrong
clock makes only the log wrong. The table of stages (`times`) and pipelines/status.py read these files alone.
"""

import contextlib
import json
import os
import posixpath
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import Discriminator, Field, TypeAdapter, ValidationError

from curation.engine import progress
from curation.engine.manifest import PROGRESS_NAME, Plan, ShardRecord
from curation.errors import SeedbedError, UserError
from curation.files import paths
from curation.files.hashes import hash_json

FOLDER = "log"
DRIVER = "driver.json"
WORKERS = "workers"
# Time between two heartbeats of a driver, and the age of the last one at which the driver counts as lost. Assumed: a
# working store does not lose six in a row, and the clocks of two machines differ by less.
SECONDS_BETWEEN_BEATS = 5.0
SECONDS_UNTIL_LOST = 30.0
# Time between two pieces of the log on an object store. Assumed acceptable: 3,000 pieces in a run of two days; a driver
# that dies loses a minute of lines, but no work.
SECONDS_BETWEEN_PIECES = 60.0


class RunLog:
    """The log of one run by one driver. It writes nothing before `start` or the first line."""

    def __init__(self, run: str) -> None:
        self.run = run.rstrip("/")
        self.folder = paths.join(run, FOLDER)
        self._name = f"shards-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{os.getpid()}"
        self._lock = threading.Lock()
        self._file: BinaryIO | None = None
        self._unwritten: list[str] = []
        self._num_pieces = 0
        self._last_piece = time.monotonic()
        self._started = time.time()
        self._ended = threading.Event()
        self._heartbeat: threading.Thread | None = None
        self._failed = False

    @property
    def started(self) -> bool:
        """Whether heartbeats have begun, which means that the run had work to do."""
        return self._heartbeat is not None

    def start(self) -> None:
        """Begin the heartbeats, and delete the files that a killed driver left."""
        if self._heartbeat is None:
            with self._may_fail():
                for name in paths.list_names(self.folder):
                    if name == WORKERS or name.startswith(paths.TEMPORARY_PREFIX):
                        paths.delete(paths.join(self.folder, name))
                self._beat()
            self._heartbeat = threading.Thread(target=self._keep_beating, name="heartbeat", daemon=True)
            self._heartbeat.start()

    def write(self, event: str, **facts: Any) -> None:
        """Add one line."""
        self.start()
        line = json.dumps({"event": event, "time": round(time.time(), 3), **facts}, ensure_ascii=False)
        with self._lock, self._may_fail():
            if paths.is_local(self.folder):
                if self._file is None:
                    path = posixpath.join(paths.filesystem(self.folder)[1], f"{self._name}.jsonl")
                    self._file = open(path, "ab", buffering=0)
                self._file.write(line.encode() + b"\n")
            else:
                self._unwritten.append(line)
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
        with self._lock, self._may_fail():
            self._write_piece()
            if self._file is not None:
                self._file.close()
        if self._heartbeat is not None:
            self._ended.set()
            self._heartbeat.join()
            with self._may_fail():
                paths.delete(paths.join(self.folder, WORKERS))
                paths.delete(paths.join(self.folder, DRIVER))

    def _write_piece(self) -> None:
        if self._unwritten:
            path = paths.join(self.folder, f"{self._name}-{self._num_pieces:04d}.jsonl")
            paths.write_bytes(path, "".join(line + "\n" for line in self._unwritten).encode())
            self._unwritten.clear()
            self._num_pieces += 1
        self._last_piece = time.monotonic()

    def _keep_beating(self) -> None:
        while not self._ended.wait(SECONDS_BETWEEN_BEATS):
            with self._may_fail():
                self._beat()

    @contextlib.contextmanager
    def _may_fail(self) -> Iterator[None]:
        """Print the first error of the disk: the log stops no run. On a full disk a stage raises its own error."""
        try:
            yield
        except OSError as error:
            if not self._failed:
                progress.say(f"log: '{self.folder}' cannot be written, so `status` may be wrong: {error}")
            self._failed = True

    def _beat(self) -> None:
        now = {"machine": os.uname().nodename, "process": os.getpid(), "started": self._started, "beat": time.time()}
        paths.write_bytes(paths.join(self.folder, DRIVER), json.dumps(now).encode(), durable=False)


# The log argument of a stage: None outside a run, where nothing is logged.
Log = RunLog | None


@contextlib.contextmanager
def open_log(run: str) -> Iterator[RunLog]:
    """The log of the run in the folder `run`, closed at the end. An error that ends the block is logged first."""
    log = RunLog(run)
    if driver_is_noted(run):  # an earlier driver was killed: its files are deleted when this log closes
        log.start()
    try:
        yield log
    except BaseException as error:
        if log.started:
            log.write("stopped", why=_reason(error), exit_status=2 if isinstance(error, UserError) else 1)
        raise
    finally:
        log.close()


def _reason(error: BaseException) -> str:
    match error:
        case SeedbedError():
            return str(error)
        case KeyboardInterrupt():
            return "interrupted (Ctrl-C)"
        case SystemExit(code=int(code)) if code > 128:
            return f"stopped by {signal.Signals(code - 128).name}"
        case _:
            return f"{type(error).__name__}: {error}"


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

    def shard(self, record: ShardRecord, num_items: int, *, ready: bool = False) -> None:
        """Log a finished shard. ready: whether the pass of an earlier stage made it."""
        execution = record.execution
        assert execution is not None, record.name
        facts: dict[str, Any] = {
            "worker": execution.worker,
            "started": round(execution.started, 3),
            "seconds": round(execution.seconds, 3),
        }
        size = sum(file.bytes for file in record.files)
        counts = {"items": num_items, "bytes": size, "totals": record.totals, "rejects": record.rejects}
        if ready:
            facts["ready"] = True
        self._log.write("shard", stage=self.name, shard=record.name, **facts, **counts)

    def end(self, seconds: float) -> None:
        """Log that the stage is done, and the seconds that this driver took for it."""
        self._log.write("end", stage=self.name, seconds=round(seconds, 3))


def worker_name() -> str:
    """This process: machine and process number."""
    return f"{os.uname().nodename}-{os.getpid()}"


def write_note(folder: str, stage: str, shard: str) -> None:
    """Write the note that this worker process begins with a shard."""
    text = json.dumps({"stage": stage, "shard": shard, "worker": worker_name(), "started": time.time()})
    # Not synced: nothing depends on a note, and syncing would dominate the time of tiny shards. Nor does an error stop
    # the shard; the driver, which writes to the same folder, prints its own.
    with contextlib.suppress(OSError):
        paths.write_bytes(paths.join(folder, f"{worker_name()}.json"), text.encode(), durable=False)


# Reading

# Damage may leave any number in a line. Numbers beyond these bounds make a line that cannot be read: sums and quotients
# of the others are finite. Assumed: 3,000 years, and more bytes than any store holds.
Seconds = Annotated[float, Field(ge=0, le=1e11, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=2**63)]


@dataclass(frozen=True)
class Driver:
    """The process that drives the run. Times are seconds since 1970."""

    machine: str
    process: int
    started: Seconds
    beat: Seconds


@dataclass(frozen=True)
class Note:
    """A worker's note of its current shard. `started` is in seconds since 1970."""

    stage: str
    shard: str
    worker: str
    started: Seconds


@dataclass(frozen=True)
class BeginLine:
    """A driver begins a stage, or a step of one. `time` in these lines is in seconds since 1970."""

    event: Literal["begin"]
    time: Seconds
    stage: str
    plan: str
    shards: Count
    done_before: Count
    workers: Count


@dataclass(frozen=True)
class ShardLine:
    """A shard is finished, after `seconds` of a worker, which began it at `started`."""

    event: Literal["shard"]
    time: Seconds
    stage: str
    shard: str
    seconds: Seconds
    items: Count
    bytes: Count
    started: Seconds | None = None
    worker: str = ""
    ready: bool = False
    """Whether the pass of an earlier stage made the shard; `seconds` is then 0."""


@dataclass(frozen=True)
class EndLine:
    """A stage is done, after `seconds` of this driver."""

    event: Literal["end"]
    time: Seconds
    stage: str
    seconds: Seconds


@dataclass(frozen=True)
class StoppedLine:
    """An error ended the run."""

    event: Literal["stopped"]
    time: Seconds
    why: str
    exit_status: int = 1
    """2 where the input or the config is wrong, so that the same command would stop again."""


Line = BeginLine | ShardLine | EndLine | StoppedLine
# Readers check all files of the log: a power cut may leave them empty or torn, and the log may stop no run.
_LINE: TypeAdapter[Line] = TypeAdapter(Annotated[Line, Discriminator("event")])
_DRIVER, _NOTE = TypeAdapter(Driver), TypeAdapter(Note)


@dataclass
class StageTimes:
    """The times and counts of one stage in the log, over all its drivers. A step of a stage has a separate entry.

    Times are in seconds; `begun` and `last` (the time of the last line) count from 1970.
    """

    plan: str = ""
    """Hash of the stage's plan."""
    num_shards: int = 0
    seconds: float = 0.0
    """From the beginning of the stage to its end; for a killed driver, to its last line."""
    capacity: float = 0.0
    """Worker seconds available: `seconds` times the number of workers."""
    busy: float = 0.0
    """Worker seconds spent on shards, including those of steps."""
    shards: int = 0
    """Shards with a line. A shard is missing if its driver died before it wrote the line."""
    items: int = 0
    bytes: int = 0
    """Bytes written."""
    begun: float = 0.0
    """The time at which the last driver began."""
    last: float = 0.0
    shards_since: int = 0
    """Shards with a line since `begun`."""
    ready: int = 0
    """Shards that the pass of an earlier stage made; their time is that of the earlier stage."""
    done: bool = False
    of_shard: dict[str, tuple[float, int, int]] = field(default_factory=dict, repr=False)
    """Seconds, items and bytes of each shard."""

    @property
    def idle(self) -> float:
        """The fraction of `capacity` that was spent on no shard."""
        return max(0.0, 1 - self.busy / self.capacity) if self.capacity else 0.0


def driver_is_noted(run: str) -> bool:
    """Whether a driver works on the run, or was killed."""
    return paths.exists(paths.join(run, FOLDER, DRIVER))


def read_driver(run: str) -> Driver | None:
    """The driver of the run, running or killed; None if the last driver ended in order, or none has started.

    Also None for a file that names no driver: a power cut may leave it empty.
    """
    try:
        return _DRIVER.validate_json(paths.read_bytes(paths.join(run, FOLDER, DRIVER)))
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None


def read_notes(run: str) -> list[Note]:
    """The latest note of each shard in progress, by stage and start."""
    folder = paths.join(run, FOLDER, WORKERS)
    latest: dict[tuple[str, str], Note] = {}
    for name in paths.list_names(folder):
        if name.endswith(".json") and not name.startswith(paths.TEMPORARY_PREFIX):
            try:
                note = _NOTE.validate_json(paths.read_bytes(paths.join(folder, name)))
            except (FileNotFoundError, ValidationError):  # deleted because the run ended; or empty after a power cut
                continue
            previous = latest.get((note.stage, note.shard))
            if previous is None or note.started > previous.started:
                latest[note.stage, note.shard] = note
    return sorted(latest.values(), key=lambda note: (note.stage, note.started))


def read_lines(run: str) -> "Iterator[Line]":
    """The lines of all drivers' logs, oldest driver first. Lines that cannot be read are left out (see num_torn)."""
    yield from (line for line in _lines(run) if line is not None)


def num_torn(run: str) -> int:
    """The number of lines that cannot be read: the last line of a killed driver, and damage by a power cut."""
    return sum(line is None for line in _lines(run))


def _lines(run: str) -> "Iterator[Line | None]":
    """Each line of the log, or None for one that cannot be read."""
    folder = paths.join(run, FOLDER)
    for name in paths.list_names(folder):
        if name.startswith("shards-") and name.endswith(".jsonl"):
            for line in filter(None, paths.read_bytes(paths.join(folder, name)).split(b"\n")):
                try:
                    yield _LINE.validate_json(line)
                except ValidationError:
                    yield None


def times(run: str) -> dict[str, StageTimes]:
    """The times of each stage and each step, by name, in the order in which they began.

    Lines of a stage whose first line cannot be read are left out.
    """
    stages: dict[str, StageTimes] = {}
    workers: dict[str, int] = {}  # number of workers of each stage that is not closed

    def close(name: str, seconds: float) -> None:
        stages[name].seconds += seconds
        stages[name].capacity += seconds * workers.pop(name)

    for line in read_lines(run):
        if isinstance(line, StoppedLine):
            continue
        name = line.stage
        previous = stages.get(name)
        match line:
            case BeginLine():
                if name in workers and previous is not None:  # its driver was killed
                    close(name, previous.last - previous.begun)
                is_redone = previous is not None and (previous.plan != line.plan or previous.done)
                if is_redone or (previous is not None and previous.of_shard and not line.done_before):
                    for redone in [other for other in stages if other == name or other.startswith(name + "/")]:
                        del stages[redone]
                        workers.pop(redone, None)
                stage = stages.setdefault(name, StageTimes())
                stage.plan, stage.num_shards = line.plan, line.shards
                stage.begun, stage.shards_since = line.time, 0
                workers[name] = line.workers
            case ShardLine() if previous is not None:
                previous.of_shard[line.shard] = line.seconds, line.items, line.bytes
                previous.shards_since += 1
                previous.ready += line.ready
            case EndLine() if name in workers:
                close(name, line.seconds)
                stages[name].done = True
        while name:  # a line of a step also counts for its stage
            if name in stages:
                stages[name].last = line.time
            name = name.rpartition("/")[0]
    for name in list(workers):
        close(name, stages[name].last - stages[name].begun)
    for name, stage in stages.items():
        stage.shards = len(stage.of_shard)
        stage.items = sum(items for _, items, _ in stage.of_shard.values())
        stage.bytes = sum(size for _, _, size in stage.of_shard.values())
        with_steps = [other for key, other in stages.items() if key == name or key.startswith(name + "/")]
        stage.busy = sum(seconds for other in with_steps for seconds, _, _ in other.of_shard.values())
    return stages


def why_stopped(run: str) -> StoppedLine | None:
    """The error that stopped the last driver. None if it was killed, or if the log has later lines."""
    last: Line | None = None
    for line in read_lines(run):
        last = line
    return last if isinstance(last, StoppedLine) else None
