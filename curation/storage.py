"""Where bytes live: fsspec paths, atomic writes, content hashes, and the manifest that says a stage is done.

A path is local or any fsspec URL (`s3://`, `gs://`, `memory://`). A file appears under its final name whole or not at
all. What a stage leaves behind:

    <output>/
      <kind>-00000.parquet  ...     the shards' files
      manifest.json                 written last: the stage is done, and these are its inputs, config, files and totals
      .progress/                    only while the stage is unfinished
        plan.json                   what is being made: stage, config, inputs, number of shards
        <shard>.json                one per finished shard: its files, their hashes, its totals
        done-00000.jsonl            a thousand of these, gathered by the driver: their counts, then one a line
        <step>/                     what an earlier step of this stage left for a later one; a stage of its own
"""

import contextlib
import errno
import fcntl
import functools
import glob
import hashlib
import io
import json
import os
import posixpath
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, BinaryIO, TypeVar, overload

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from pydantic import BaseModel, ConfigDict, Field

from curation.errors import InputError, OutputMismatchError

MANIFEST_NAME = "manifest.json"
PROGRESS_NAME = ".progress"
TEMPORARY_PREFIX = ".tmp-"
# The version of everything that stages write. Outputs of another version are refused, not converted.
FORMAT_VERSION = 1
# Markers that are gathered into one file, and how many files a resume reads at once. Assumed: of an object store that
# answers in 20 ms, 100,000 finished shards are then read in two seconds.
MARKERS_PER_FILE = 1000
READERS = 16
# Bytes that wait for the thread which hashes them, and as many that it has. Assumed: hashing them takes milliseconds,
# handing them over a hundredth of that.
HASHED_AT_ONCE = 1 << 20


def filesystem(path: str) -> tuple[AbstractFileSystem, str]:
    """The fsspec filesystem of `path` and the path inside it. Raises InputError for an unknown protocol."""
    protocol, mark, rest = path.partition("://")
    if not mark:  # a crawl's file names may hold '::', which fsspec would take for a chain of protocols
        return LocalFileSystem(), os.path.abspath(path)
    if mark not in rest:  # the same in a URL
        rest = rest.replace("::", "\0")
    try:
        fs, inner = fsspec.core.url_to_fs(protocol + mark + rest)
        return fs, inner.replace("\0", "::")
    except (ImportError, ValueError) as error:
        raise InputError(f"Cannot open '{path}': {error}. Install the fsspec driver of its protocol.") from None


def is_local(path: str) -> bool:
    """Whether `path` lies on a filesystem of this machine (mounted network drives count)."""
    return isinstance(filesystem(path)[0], LocalFileSystem)


def join(folder: str, *names: str) -> str:
    """`folder` and `names` with single slashes between them, keeping a protocol."""
    return posixpath.join(folder.rstrip("/") or "/", *names)


def exists(path: str) -> bool:
    """Whether a file or folder is at `path`."""
    fs, inner = filesystem(path)
    return bool(fs.exists(inner))


def is_folder(path: str) -> bool:
    """Whether `path` is a folder."""
    fs, inner = filesystem(path)
    return bool(fs.isdir(inner))


def open_read(path: str) -> BinaryIO:
    """The file at `path`, opened for reading bytes. Raises FileNotFoundError."""
    fs, inner = filesystem(path)
    return fs.open(inner, "rb")  # type: ignore[no-any-return]  # fsspec is untyped


def read_bytes(path: str) -> bytes:
    """All bytes of the file at `path`. Raises FileNotFoundError."""
    with open_read(path) as file:
        return file.read()


def list_names(folder: str) -> list[str]:
    """The sorted base names in `folder`; empty when there is no such folder."""
    fs, inner = filesystem(folder)
    fs.invalidate_cache()
    if not fs.isdir(inner):
        return []
    return sorted(posixpath.basename(str(entry).rstrip("/")) for entry in fs.ls(inner, detail=False))


def delete(path: str) -> None:
    """Remove the file or folder at `path` if there is one."""
    fs, inner = filesystem(path)
    if fs.exists(inner):
        # Other filesystems than the local one would take '*' or '[' in a name for a pattern.
        fs.rm(inner if isinstance(fs, LocalFileSystem) else glob.escape(inner), recursive=True)


class HashingFile(io.RawIOBase):
    """A write-only file that hashes and counts what passes through it. `sha256` and `size` are valid at any time.

    While a large file is written, a thread hashes what was written before: a processor without instructions for SHA-256
    takes longer over that than over everything else in packing.
    """

    def __init__(self, target: BinaryIO) -> None:
        self._target = target
        self._hash = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1)  # starts with its first work
        self._hashing: Future[None] | None = None
        self._unhashed: list[bytes] = []
        self._unhashed_size = 0
        self.size = 0

    @property
    def sha256(self) -> str:
        self._wait_for_hash()
        self._hash.update(b"".join(self._unhashed))
        self._unhashed, self._unhashed_size = [], 0
        return self._hash.hexdigest()

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.size

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._unhashed.append(data if isinstance(data, bytes) else bytes(view))
        self._unhashed_size += len(view)
        if self._unhashed_size >= HASHED_AT_ONCE:
            self._wait_for_hash()
            # In one piece: after each, the thread waits for this one to let go of Python.
            self._hashing = self._thread.submit(self._hash.update, b"".join(self._unhashed))
            self._unhashed, self._unhashed_size = [], 0
        self._target.write(view)
        self.size += len(view)
        return len(view)

    def _wait_for_hash(self) -> None:
        if self._hashing is not None:
            self._hashing.result()
            self._hashing = None


@contextlib.contextmanager
def atomic_write(path: str, *, durable: bool = True) -> Iterator[HashingFile]:
    """A file to write that takes the name `path` only when the block ends without an error.

    Local files are synced (unless `durable` is false: a machine that loses its power may then lose them) and renamed;
    elsewhere the finished file is uploaded in one piece. After an error, or a kill, nothing is at `path` that was not
    there before.
    """
    fs, inner = filesystem(path)
    folder, name = posixpath.split(inner)
    fs.makedirs(folder, exist_ok=True)
    if not isinstance(fs, LocalFileSystem):
        with tempfile.TemporaryFile() as file:  # it has no name, so a kill leaves nothing on this machine
            yield (writer := HashingFile(file))
            writer.flush()
            file.flush()
            file.seek(0)  # where /dev/fd is a duplicate, it begins where this one stands
            fs.put_file(f"/dev/fd/{file.fileno()}", inner)
        return
    temporary = f"{folder}/{TEMPORARY_PREFIX}{secrets.token_hex(8)}-{name}"
    try:
        with open(temporary, "xb") as file:
            yield (writer := HashingFile(file))
            writer.flush()
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, inner)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def write_bytes(path: str, data: bytes, *, durable: bool = True) -> "FileRecord":
    """Write `data` to `path` atomically and return what was written."""
    with atomic_write(path, durable=durable) as file:
        file.write(data)
    return FileRecord(name=posixpath.basename(path), sha256=file.sha256, bytes=file.size, rows=0)


def write_table(path: str, table: pa.Table) -> "FileRecord":
    """Write an Arrow table as Parquet to `path` atomically and return what was written."""
    with atomic_write(path) as file:
        pq.write_table(table, pa.PythonFile(file, mode="w"), **_encoding(table.schema))
    return FileRecord(name=posixpath.basename(path), sha256=file.sha256, bytes=file.size, rows=table.num_rows)


def write_row_groups(path: str, column: str, tables: Iterable[tuple[int, pa.Table]], empty: pa.Table) -> "FileRecord":
    """Write tables of one schema as row groups of one Parquet file, marked by a number in an added `column`.

    Only one table is held at a time; those without rows leave nothing, and `empty` gives the schema of a file without
    any. `read_row_groups` reads the groups of one number without the others.
    """
    schema = empty.schema.append(pa.field(column, pa.int32()))
    num_rows = 0
    with atomic_write(path) as file:
        # Of the other columns the least and greatest value would stand in every group's footer: of vectors, kilobytes.
        options = _encoding(schema) | {"write_statistics": [column]}
        with pq.ParquetWriter(pa.PythonFile(file, mode="w"), schema, **options) as writer:
            for number, table in tables:
                if table.num_rows:
                    marks = pa.array(np.full(table.num_rows, number, np.int32))
                    marked = table.append_column(pa.field(column, pa.int32()), marks)
                    writer.write_table(marked, row_group_size=table.num_rows)
                    num_rows += table.num_rows
    return FileRecord(name=posixpath.basename(path), sha256=file.sha256, bytes=file.size, rows=num_rows)


def read_row_groups(path: str, column: str, number: int, schema: pa.Schema) -> pa.Table:
    """What `write_row_groups` wrote under `number`, with the columns of `schema`; no rows where there is nothing."""
    with open_read(path) as file:
        parquet = pq.ParquetFile(file)
        place = parquet.schema_arrow.names.index(column)
        place += len(parquet.metadata.schema) - len(parquet.schema_arrow.names)
        chosen = [
            group
            for group in range(parquet.num_row_groups)
            if parquet.metadata.row_group(group).column(place).statistics.min == number
        ]
        return parquet.read_row_groups(chosen, columns=schema.names).select(schema.names).cast(schema)


def read_table(path: str, schema: pa.Schema, columns: list[str] | None = None) -> pa.Table:
    """Read a Parquet file and check that it has the columns of `schema`, or the chosen `columns` of it.

    Raises InputError when there is no such file, when it is no Parquet, or when columns are missing or mistyped.
    """
    wanted = schema if columns is None else pa.schema([schema.field(name) for name in columns])
    table = read_table_columns(path, wanted.names)
    try:
        return table.cast(wanted)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:  # ValueError: null where none may be
        raise InputError(f"{path}: columns of the wrong type: {error}.") from None


def read_table_columns(path: str, columns: list[str]) -> pa.Table:
    """The named columns of a Parquet file, in that order, whatever their types. Raises InputError as `read_table`."""
    try:
        with open_read(path) as file:
            parquet = pq.ParquetFile(file)
            names = parquet.schema_arrow.names
            missing = [name for name in columns if name not in names]
            if missing:
                raise InputError(f"{path}: no column {', '.join(missing)}. Found: {', '.join(names) or 'none'}.")
            return parquet.read(columns=columns).select(columns)
    except FileNotFoundError:
        raise InputError(f"No file at '{path}'.") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file: {error}.") from None


def _encoding(schema: pa.Schema) -> dict[str, Any]:
    """Zstandard and dictionaries, but not for vectors: these get hardly smaller, and several times slower to read."""
    leaves = []
    for column in schema:
        is_list = pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type)
        is_vector = is_list and pa.types.is_float16(column.type.value_type)
        if not is_vector and not pa.types.is_fixed_size_binary(column.type):
            leaves.append(f"{column.name}.list.element" if is_list else column.name)
    return {"compression": dict.fromkeys(leaves, "zstd"), "use_dictionary": leaves}


def num_rows(path: str) -> int:
    """The number of rows of a Parquet file, from its footer. Raises InputError as `read_table`."""
    try:
        with open_read(path) as file:
            return int(pq.ParquetFile(file).metadata.num_rows)
    except FileNotFoundError:
        raise InputError(f"No file at '{path}'.") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file: {error}.") from None


def hash_json(value: Any) -> str:
    """The SHA-256 of `value` as canonical JSON (sorted keys, no spaces), as 64 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRecord(_Record):
    """One file that a shard wrote."""

    name: str
    sha256: str
    bytes: int
    rows: int


class Effort(_Record):
    """Who did a shard, when (seconds since 1970) and in how many seconds."""

    worker: str
    started: float
    seconds: float


class ShardRecord(_Record):
    """One finished shard: its files and its counts."""

    name: str
    files: tuple[FileRecord, ...] = ()
    totals: dict[str, int] = Field(default_factory=dict)
    rejects: dict[str, int] = Field(default_factory=dict)
    measured: dict[str, float] = Field(default_factory=dict, exclude=True)
    """What the worker measured, such as seconds, for who watches the run; never written down, for bytes to be equal."""
    effort: Effort | None = Field(default=None, exclude=True)
    """For the log of the run; never written down here, for the same reason."""


class Counts(_Record):
    """What some finished shards count together."""

    names: tuple[str, ...]
    totals: dict[str, int]
    rejects: dict[str, int]


class Plan(_Record):
    """What a stage is asked to make. Equal plans give equal bytes."""

    stage: str
    format_version: int = FORMAT_VERSION
    config: dict[str, Any]
    inputs: dict[str, str]
    num_shards: int


class ShardRecords(Sequence[ShardRecord]):
    """Records of finished shards, each held as its line of JSON: a tenth of the memory that it takes as an object."""

    def __init__(self, lines: Sequence[bytes], origin: str = "records") -> None:
        self.lines = lines
        self._origin = origin

    def __len__(self) -> int:
        return len(self.lines)

    @overload
    def __getitem__(self, place: int) -> ShardRecord: ...
    @overload
    def __getitem__(self, place: slice) -> "ShardRecords": ...
    def __getitem__(self, place: int | slice) -> "ShardRecord | ShardRecords":
        """Raises InputError for a line that is no record; `origin` says where it came from."""
        if isinstance(place, slice):
            return ShardRecords(self.lines[place], self._origin)
        return _parse(ShardRecord, self.lines[place], self._origin)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


class _Head(_Record):
    plan: Plan
    totals: dict[str, int]
    rejects: dict[str, int]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Manifest:
    """What a finished stage made, and from what. `manifest.json` is this, and its presence means done.

    Of a manifest that was read, `shards` parses a record each time that it is asked for one.
    """

    plan: Plan
    shards: Sequence[ShardRecord]
    totals: dict[str, int]
    rejects: dict[str, int]
    facts: dict[str, Any] = field(default_factory=dict)
    """What the stage found out as a whole, beyond sums over shards: sizes, recalls, rows of a table."""

    @functools.cached_property
    def content_hash(self) -> str:
        """Changes when any file that the stage wrote changes, and only then."""
        return hash_json([[file.name, file.sha256] for shard in self.shards for file in shard.files])

    def files(self, kind: str) -> list[str]:
        """The names of the files `<kind>-*`, in shard order."""
        return [file.name for shard in self.shards for file in shard.files if file.name.startswith(kind + "-")]


# manifest.json is one JSON object: first all but the shards, then these, one a line. No text in JSON has a line end.
_SHARDS_BEGIN, _SHARDS_END = b',\n "shards": [\n', b"\n ]\n}\n"


def read_manifest(folder: str) -> Manifest | None:
    """The manifest of a finished stage in `folder`, or None. Raises InputError when it is not one of ours."""
    path = join(folder, MANIFEST_NAME)
    try:
        data = read_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    before, _, behind = data.partition(_SHARDS_BEGIN)
    head = _parse(_Head, before + b"\n}", path)
    if not behind.endswith(_SHARDS_END):
        raise InputError(f"{path}: not a file that this version of Seedbed wrote (it has no shards, or no end).")
    lines = behind.removesuffix(_SHARDS_END).split(b",\n") if len(behind) > len(_SHARDS_END) else []
    return Manifest(head.plan, ShardRecords(lines, path), head.totals, head.rejects, head.facts)


def require_manifest(folder: str) -> Manifest:
    """The manifest of a finished stage in `folder`. Raises InputError when the stage is not done."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise InputError(f"'{folder}' holds no finished stage: no {MANIFEST_NAME}. Run the stage that writes it first.")
    return manifest


def write_manifest(folder: str, manifest: Manifest) -> None:
    """Mark the stage in `folder` done, then drop its progress files and what killed writers left."""
    head = _Head(plan=manifest.plan, totals=manifest.totals, rejects=manifest.rejects, facts=manifest.facts)
    shards = manifest.shards
    lines = shards.lines if isinstance(shards, ShardRecords) else map(line_of, shards)
    with atomic_write(join(folder, MANIFEST_NAME)) as file:
        file.write(head.model_dump_json(indent=1).encode().removesuffix(b"\n}") + _SHARDS_BEGIN)
        for number, line in enumerate(lines):
            file.write(b",\n" + line if number else line)
        file.write(_SHARDS_END)
    _tidy(folder)


def _tidy(folder: str) -> None:
    for name in list_names(folder):
        if name == PROGRESS_NAME or name.startswith(TEMPORARY_PREFIX):
            delete(join(folder, name))


@contextlib.contextmanager
def locked(folder: str) -> Iterator[None]:
    """Lock a local folder against other processes for as long as this one lives.

    Raises BlockingIOError while another one has it, and another OSError where folders have no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def sole_writer(folder: str) -> Iterator[None]:
    """Keep other runs out of `folder` during the block. Raises OutputMismatchError while another one is in it.

    Only on a disk of this machine: a network drive or an object store has no lock for a folder. A run that is killed
    leaves nothing locked.
    """
    fs, inner = filesystem(folder)
    with contextlib.ExitStack() as stack:
        if isinstance(fs, LocalFileSystem) and not os.path.isfile(inner):
            os.makedirs(inner, exist_ok=True)
            try:
                stack.enter_context(locked(inner))
            except BlockingIOError:
                raise OutputMismatchError(
                    f"Another run is writing '{folder}'. Wait until it is done, stop it, or give another --output."
                ) from None
            except OSError as error:
                if error.errno not in (errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP):  # a network drive's
                    raise
        yield


def claim(folder: str, plan: Plan, *, replace: bool) -> Manifest | None:
    """Claim `folder` for `plan`: the manifest if all is done; else `read_done` gives the shards that are.

    A folder that holds the work of another plan is refused with OutputMismatchError, or emptied when `replace` is set.
    A folder with files of someone else's and no plan is never emptied.
    """
    progress = join(folder, PROGRESS_NAME)
    if exists(folder) and not is_folder(folder):
        raise OutputMismatchError(f"'{folder}' is a file. Give an empty folder with --output.")
    manifest, found = read_manifest(folder), plan_in(folder)
    if found is not None and found != plan:
        # A plan without any work is nobody's: correcting a config that failed at once needs no --replace.
        begun = manifest or set(list_names(folder)) - {PROGRESS_NAME} or set(list_names(progress)) - {"plan.json"}
        if begun and not replace:
            raise OutputMismatchError(_mismatch(folder, found, plan))
        _empty(folder, found)
        manifest = found = None
    if manifest is not None:
        _tidy(folder)  # a kill may have come right behind the manifest
        return manifest
    if found is None:
        strangers = [
            name for name in list_names(folder) if name != PROGRESS_NAME and not name.startswith(TEMPORARY_PREFIX)
        ]
        if strangers:
            raise OutputMismatchError(
                f"'{folder}' holds files that no run of this stage wrote ({', '.join(strangers[:3])}"
                f"{', ...' if len(strangers) > 3 else ''}). Give an empty folder with --output."
            )
        write_bytes(join(progress, "plan.json"), _dump(plan))
    return None


def read_done(folder: str) -> Iterator[ShardRecord]:
    """The finished shards of an unfinished stage, in no order; one that was marked twice comes twice."""
    for path, data in _read_markers(folder):
        for line in data.splitlines()[1:] if path.endswith(".jsonl") else [data]:
            yield _parse(ShardRecord, line, path)


def read_counts(folder: str) -> Iterator[Counts]:
    """The names and counts of these shards, of many at once where their markers were gathered, and these first."""
    for path, data in _read_markers(folder):
        if path.endswith(".jsonl"):
            yield _parse(Counts, data.partition(b"\n")[0], path)
        else:
            yield _count([_parse(ShardRecord, data, path)])


def _read_markers(folder: str) -> Iterator[tuple[str, bytes]]:
    """Path and content of every file that marks shards done; those that mark many first."""
    names = list_names(progress := join(folder, PROGRESS_NAME))
    paths = [join(progress, name) for name in _gathered(names) + _markers(names)]
    with ThreadPoolExecutor(READERS) as readers:  # an object store takes its time for each
        for start in range(0, len(paths), READERS):
            few = paths[start : start + READERS]
            yield from zip(few, readers.map(read_bytes, few), strict=True)


def _count(records: Sequence[ShardRecord]) -> Counts:
    return Counts(
        names=tuple(record.name for record in records),
        totals=sum_counts(record.totals for record in records),
        rejects=sum_counts(record.rejects for record in records),
    )


def _empty(folder: str, found: Plan) -> None:
    """Delete what the plan `found` made, so that a kill at any point leaves an unfinished run of that plan."""
    progress = join(folder, PROGRESS_NAME)
    write_bytes(join(progress, "plan.json"), _dump(found))
    delete(join(folder, MANIFEST_NAME))
    for place, last in ((progress, "plan.json"), (folder, PROGRESS_NAME)):  # markers before the files they vouch for
        for name in list_names(place):
            if name == last:
                continue
            path = join(place, name)
            if is_folder(path) and (nested := plan_in(path)) is not None:
                _empty(path, nested)
            delete(path)


def mark_shard_done(folder: str, record: ShardRecord) -> None:
    """Write the marker of one finished shard; its files are already under their final names."""
    write_bytes(join(folder, PROGRESS_NAME, f"{record.name}.json"), _dump(record))


def gather_markers(folder: str, records: Sequence[ShardRecord]) -> None:
    """Put one file in the place of the markers of these finished shards, for a resume over many of them to be quick.

    A kill in between leaves shards marked twice and alike. Only the driver calls this.
    """
    progress = join(folder, PROGRESS_NAME)
    number = len(_gathered(list_names(progress)))
    lines = b"".join(line_of(record) + b"\n" for record in (_count(records), *records))
    write_bytes(join(progress, f"done-{number:05d}.jsonl"), lines)
    fs, _ = filesystem(progress)
    fs.rm([filesystem(join(progress, f"{record.name}.json"))[1] for record in records])


def done_shards(folder: str) -> set[str]:
    """The names of the shards that are marked done in an unfinished stage, which may be running."""
    progress = join(folder, PROGRESS_NAME)
    names = list_names(progress)
    done = {name.removesuffix(".json") for name in _markers(names)}
    for name in _gathered(names):
        path = join(progress, name)
        done.update(_parse(Counts, read_bytes(path).partition(b"\n")[0], path).names)
    return done


def _markers(names: Iterable[str]) -> list[str]:
    """Which of the names in a progress folder are markers of one shard."""
    return [
        name
        for name in names
        if name.endswith(".json") and name != "plan.json" and not name.startswith(TEMPORARY_PREFIX)
    ]


def _gathered(names: Iterable[str]) -> list[str]:
    """Which of them hold the markers of many."""
    return [name for name in names if name.startswith("done-") and name.endswith(".jsonl")]


def step_folder(folder: str, step: str) -> str:
    """Where a stage with several steps keeps what one of them leaves for the next; gone when the stage is done."""
    return join(folder, PROGRESS_NAME, step)


def sum_counts(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    """The key-wise sum, with sorted keys."""
    total: dict[str, int] = {}
    for count in counts:
        for key, value in count.items():
            total[key] = total.get(key, 0) + value
    return dict(sorted(total.items()))


def plan_in(folder: str) -> Plan | None:
    """The plan of the finished or unfinished stage in `folder`."""
    if (manifest := read_manifest(folder)) is not None:
        return manifest.plan
    path = join(folder, PROGRESS_NAME, "plan.json")
    try:
        return _parse(Plan, read_bytes(path), path)
    except FileNotFoundError:
        return None


def line_of(record: BaseModel) -> bytes:
    """The record as JSON in one line, without the line's end."""
    return record.model_dump_json().encode()


def _dump(record: BaseModel) -> bytes:
    return (record.model_dump_json(indent=1) + "\n").encode()


RecordType = TypeVar("RecordType", bound=_Record)


def _parse(model: type[RecordType], data: bytes, path: str) -> RecordType:
    try:
        return model.model_validate_json(data)
    except ValueError as error:
        first = str(error).splitlines()[0]
        raise InputError(f"{path}: not a file that this version of Seedbed wrote ({first}).") from None


def _mismatch(folder: str, found: Plan, wanted: Plan) -> str:
    before, after = _flatten(found.model_dump(mode="json")), _flatten(wanted.model_dump(mode="json"))
    changed = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    lines = [f"  {key}: {before.get(key)!r} there, {after.get(key)!r} now" for key in changed[:8]]
    more = f"\n  and {len(changed) - 8} more" if len(changed) > 8 else ""
    return (
        f"'{folder}' holds the work of another config or of other inputs:\n" + "\n".join(lines) + more + "\n"
        "Nothing was changed. Give another --output, or --replace to redo this stage and what depends on it."
    )


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, list):
        value = {str(index): item for index, item in enumerate(value)}
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        key: leaf
        for name, item in value.items()
        for key, leaf in _flatten(item, f"{prefix}.{name}" if prefix else name).items()
    }
