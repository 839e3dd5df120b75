"""The manifest of a finished stage, and the progress files of an unfinished one. The files of a stage:

<output>/
  <kind>-00000.parquet  ...     files of the shards
  manifest.json                 written last; its presence means done. Inputs, config, files and totals of the stage
  .progress/                    only while the stage is unfinished
    plan.json                   stage, config, inputs and number of shards of the work in progress
    <shard>.json                marker of one finished shard: its files, their hashes, its totals
    done-00000.jsonl            a thousand markers, merged by the driver: their sums, then one marker per line
    <step>/                     output of one step for a later step of this stage; laid out like a stage
    ready/                      markers of shards whose files an earlier stage made in its pass; the stage takes them
"""

import functools
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar, overload

from pydantic import BaseModel, ConfigDict, Field

from curation.errors import InputError, OutputMismatchError
from curation.files.hashes import hash_json, sha256_of_file
from curation.files.paths import (
    TEMPORARY_PREFIX,
    FileRecord,
    RecordedPath,
    atomic_write,
    delete,
    exists,
    filesystem,
    is_folder,
    join,
    list_names,
    list_sizes,
    read_bytes,
    write_bytes,
)
from curation.files.prefetch import prefetch

MANIFEST_NAME = "manifest.json"
PROGRESS_NAME = ".progress"
READY_NAME = "ready"
# The version of all files that stages write. Outputs of another version are refused, not converted.
FORMAT_VERSION = 3
# Markers merged into one file, and files that a resume reads at once. Assumed: from an object store with a latency of
# 20 ms, a resume then reads 100,000 finished shards in two seconds.
MARKERS_PER_FILE = 1000
READERS = 16


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Execution(_Record):
    """The worker process of a shard, its start (seconds since 1970) and its duration in seconds."""

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
    """Measurements of the worker, such as seconds. Display only; excluded from files so that outputs stay
    byte-identical."""
    execution: Execution | None = Field(default=None, exclude=True)
    """For the log of the run only; excluded from files for the same reason."""


class Counts(_Record):
    """The names of some finished shards, and the sums of their counts."""

    names: tuple[str, ...]
    totals: dict[str, int]
    rejects: dict[str, int]


class Plan(_Record):
    """The definition of a stage's work. Equal plans give equal bytes."""

    stage: str
    format_version: int = FORMAT_VERSION
    config: dict[str, Any]
    inputs: dict[str, str]
    num_shards: int


class ShardRecords(Sequence[ShardRecord]):
    """Records of finished shards, held as lines of JSON. A line takes a tenth of the memory of the object."""

    def __init__(self, lines: Sequence[bytes], origin: str = "records") -> None:
        self.lines = lines
        self._origin = origin

    def __len__(self) -> int:
        return len(self.lines)

    @overload
    def __getitem__(self, index: int) -> ShardRecord: ...
    @overload
    def __getitem__(self, index: slice) -> "ShardRecords": ...
    def __getitem__(self, index: int | slice) -> "ShardRecord | ShardRecords":
        """Raises InputError for a line that is not a record; its message names the `origin` of the lines."""
        if isinstance(index, slice):
            return ShardRecords(self.lines[index], self._origin)
        return _parse(ShardRecord, self.lines[index], self._origin)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


class _Head(_Record):
    plan: Plan
    totals: dict[str, int]
    rejects: dict[str, int]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Manifest:
    """The plan, the files and the totals of a finished stage, as in `manifest.json`.

    After `read_manifest`, every access to an element of `shards` parses its record anew.
    """

    plan: Plan
    shards: Sequence[ShardRecord]
    totals: dict[str, int]
    rejects: dict[str, int]
    facts: dict[str, Any] = field(default_factory=dict)
    """Values of the whole stage for later stages and for readers, beyond sums over shards: sizes, recalls, tables."""

    @functools.cached_property
    def content_hash(self) -> str:
        """A hash of the names and hashes of all files of the stage, and of nothing else."""
        return hash_json([[file.name, file.sha256] for shard in self.shards for file in shard.files])

    def files(self, kind: str) -> list[str]:
        """The names of the files `<kind>-*`, in the order of the shards."""
        return [file.name for shard in self.shards for file in shard.files if file.name.startswith(kind + "-")]

    def paths(self, folder: str, kind: str) -> list[RecordedPath]:
        """The paths of the same files, where the stage lies in `folder`. Readers check the hash of each."""
        return [
            RecordedPath(join(folder, file.name), file.sha256)
            for shard in self.shards
            for file in shard.files
            if file.name.startswith(kind + "-")
        ]


# manifest.json is one JSON object: first the other keys, then the shards, one per line. JSON escapes line ends in text.
_SHARDS_BEGIN, _SHARDS_END = b',\n "shards": [\n', b"\n ]\n}\n"


def read_manifest(folder: str) -> Manifest | None:
    """The manifest of the finished stage in `folder`, or None. Raises InputError for a file of another format."""
    path = join(folder, MANIFEST_NAME)
    try:
        data = read_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    head_json, _, shards_json = data.partition(_SHARDS_BEGIN)
    head = _parse(_Head, head_json + b"\n}", path)
    if not shards_json.endswith(_SHARDS_END):
        raise _unreadable(path)
    lines = shards_json.removesuffix(_SHARDS_END).split(b",\n") if len(shards_json) > len(_SHARDS_END) else []
    return Manifest(head.plan, ShardRecords(lines, path), head.totals, head.rejects, head.facts)


def require_manifest(folder: str) -> Manifest:
    """The manifest of the finished stage in `folder`.

    Raises InputError when the stage is not done, or when another version of Seedbed wrote it in another format.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise InputError(f"'{folder}' holds no finished stage: no {MANIFEST_NAME}. Run the stage that writes it first.")
    if (version := manifest.plan.format_version) != FORMAT_VERSION:
        raise InputError(
            f"'{folder}' was written in format {version}; this version of Seedbed reads format {FORMAT_VERSION}. Run "
            "its stage again, with --replace or into another folder."
        )
    return manifest


def require_fact(folder: str, manifest: Manifest, name: str) -> Any:
    """A fact of the finished stage in `folder`. Raises InputError where the stage publishes no such fact."""
    if name not in manifest.facts:
        raise InputError(
            f"'{folder}' holds the stage '{manifest.plan.stage}', whose manifest has no fact '{name}'. Give the folder "
            "of the stage that publishes it."
        )
    return manifest.facts[name]


def checked(folder: str, records: Iterable[ShardRecord], *, hashes: bool) -> Iterator[tuple[ShardRecord, list[str]]]:
    """Each of `records` with the problems of its files: a file is missing, has another size, or other bytes.

    Sizes come from one listing of the folder. With `hashes`, threads also read every byte.
    """
    sizes = list_sizes(folder)

    def problem_of(file: FileRecord) -> str | None:
        path, size = join(folder, file.name), sizes.get(file.name)
        if size is None:
            return f"{path} is missing"
        if size != file.bytes:
            return f"{path} has {size:,} bytes, and {file.bytes:,} were written"
        try:
            sha256 = sha256_of_file(path) if hashes else file.sha256
        except OSError as error:
            return f"{path} cannot be read: {error.strerror or error}"
        if sha256 != file.sha256:
            return f"{path} holds other bytes than were written (SHA-256 {sha256}, written {file.sha256})"
        return None

    def check(record: ShardRecord) -> tuple[ShardRecord, list[str]]:
        return record, [problem for file in record.files if (problem := problem_of(file)) is not None]

    return prefetch(check, records, threads=READERS, ahead=READERS) if hashes else map(check, records)


def write_manifest(folder: str, manifest: Manifest) -> None:
    """Mark the stage in `folder` done, then delete its progress files and the temporary files of killed writers."""
    head = _Head(plan=manifest.plan, totals=manifest.totals, rejects=manifest.rejects, facts=manifest.facts)
    shards = manifest.shards
    lines = shards.lines if isinstance(shards, ShardRecords) else map(json_line, shards)
    with atomic_write(join(folder, MANIFEST_NAME)) as file:
        file.write(head.model_dump_json(indent=1).encode().removesuffix(b"\n}") + _SHARDS_BEGIN)
        for number, line in enumerate(lines):
            file.write(b",\n" + line if number else line)
        file.write(_SHARDS_END)
    _delete_leftovers(folder)


def _delete_leftovers(folder: str) -> None:
    for name in list_names(folder):
        if name == PROGRESS_NAME or name.startswith(TEMPORARY_PREFIX):
            delete(join(folder, name))


# The names in the folder of a stage; those of its files are broad, since killed workers leave files in no list. `claim`
# deletes no others.
_OF_A_STAGE = re.compile(
    rf"{re.escape(PROGRESS_NAME)}|{re.escape(TEMPORARY_PREFIX)}.*|[a-z]+-[\w-]+\.\w+"
    r"|[a-z]\w*\.(parquet|npy|json|arrow|safetensors)"
)


def claim(folder: str, plan: Plan, *, replace: bool) -> Manifest | None:
    """Claim `folder` for `plan`. Returns the manifest of a finished stage; None when shards may be left to do.

    `read_done` then gives the finished shards. Raises OutputMismatchError when the folder holds the work of another
    plan; with `replace`, that work is deleted instead. A folder with other files and no plan always raises it.
    """
    progress = join(folder, PROGRESS_NAME)
    if exists(folder) and not is_folder(folder):
        raise OutputMismatchError(f"'{folder}' is a file. Give an empty folder with --output.")
    manifest, plan_there = read_manifest(folder), plan_in(folder)
    if plan_there is not None and plan_there != plan:
        # A plan without any work may be replaced: a config that failed at once can be corrected without --replace.
        has_work = manifest or set(list_names(folder)) - {PROGRESS_NAME} or set(list_names(progress)) - {"plan.json"}
        if has_work and not replace:
            raise OutputMismatchError(_mismatch_message(folder, plan_there, plan))
        is_step = f"/{PROGRESS_NAME}/" in folder
        others = [] if is_step else [name for name in list_names(folder) if not _OF_A_STAGE.fullmatch(name)]
        if others:
            raise OutputMismatchError(
                f"'{folder}' also holds what no stage wrote ({', '.join(others[:3])}"
                f"{', ...' if len(others) > 3 else ''}). Nothing was deleted. Move it, or give another --output."
            )
        _delete_work(folder, plan_there)
        manifest = plan_there = None
    if manifest is not None:
        _delete_leftovers(folder)  # the run may have been killed after it wrote the manifest
        return manifest
    if plan_there is None:
        other_names = [
            name for name in list_names(folder) if name != PROGRESS_NAME and not name.startswith(TEMPORARY_PREFIX)
        ]
        if other_names:
            raise OutputMismatchError(
                f"'{folder}' holds files ({', '.join(other_names[:3])}{', ...' if len(other_names) > 3 else ''}), but "
                f"no {MANIFEST_NAME} says that this stage wrote them. Delete the folder if a run wrote it, or give "
                "another folder with --output."
            )
        write_bytes(join(progress, "plan.json"), _indented_json(plan))
    return None


def require_same_config(folder: str, config: Mapping[str, Any]) -> None:
    """Raise OutputMismatchError, as `claim` does, where a finished stage in `folder` has another config."""
    manifest = read_manifest(folder)
    if manifest is not None and manifest.plan.config != config:
        now = manifest.plan.model_copy(update={"config": dict(config)})
        raise OutputMismatchError(_mismatch_message(folder, manifest.plan, now))


def read_done(folder: str) -> Iterator[ShardRecord]:
    """The finished shards of an unfinished stage, in no order. A shard that is marked twice comes twice."""
    for path, data in _read_markers(folder):
        is_merged = path.endswith(".jsonl")
        for line in data.splitlines()[1:] if is_merged else [data]:
            record = _parse(ShardRecord, line, path)
            if not is_merged and path != join(folder, PROGRESS_NAME, f"{record.name}.json"):
                raise _unreadable(path)
            yield record


def _read_markers(folder: str) -> Iterator[tuple[str, bytes]]:
    """Path and content of every marker file, those of merged markers first."""
    names = list_names(progress := join(folder, PROGRESS_NAME))
    paths = [join(progress, name) for name in _merged_marker_names(names) + _single_marker_names(names)]
    with ThreadPoolExecutor(READERS) as readers:  # parallel, because of the latency of an object store
        for start in range(0, len(paths), READERS):
            batch = paths[start : start + READERS]
            yield from zip(batch, readers.map(read_bytes, batch), strict=True)


def _sum_records(records: Sequence[ShardRecord]) -> Counts:
    return Counts(
        names=tuple(record.name for record in records),
        totals=sum_counts(record.totals for record in records),
        rejects=sum_counts(record.rejects for record in records),
    )


def _delete_work(folder: str, plan: Plan) -> None:
    """Delete all output of `plan`. A kill at any point leaves an unfinished run of that plan."""
    progress = join(folder, PROGRESS_NAME)
    write_bytes(join(progress, "plan.json"), _indented_json(plan))
    delete(join(folder, MANIFEST_NAME))
    for parent, spared in ((progress, "plan.json"), (folder, PROGRESS_NAME)):  # markers before the files they list
        for name in list_names(parent):
            if name == spared:
                continue
            path = join(parent, name)
            if is_folder(path) and (step_plan := plan_in(path)) is not None:
                _delete_work(path, step_plan)
            delete(path)


def mark_shard_done(folder: str, record: ShardRecord) -> None:
    """Write the marker of one finished shard, whose files must already have their final names."""
    write_bytes(join(folder, PROGRESS_NAME, f"{record.name}.json"), _indented_json(record))


def mark_shards_done(folder: str, records: Sequence[ShardRecord]) -> None:
    """Write one file with the markers of these finished shards. Only the driver calls this."""
    progress = join(folder, PROGRESS_NAME)
    number = len(_merged_marker_names(list_names(progress)))
    lines = b"".join(json_line(record) + b"\n" for record in (_sum_records(records), *records))
    write_bytes(join(progress, f"done-{number:05d}.jsonl"), lines)


def merge_markers(folder: str, records: Sequence[ShardRecord]) -> None:
    """Replace the markers of these finished shards by one file, so that a later resume reads fewer files.

    A kill during the call leaves some shards with two equal markers. Only the driver calls this.
    """
    mark_shards_done(folder, records)
    progress = join(folder, PROGRESS_NAME)
    fs, _ = filesystem(progress)
    fs.rm([filesystem(join(progress, f"{record.name}.json"))[1] for record in records])


def done_shards(folder: str) -> set[str]:
    """The names of the finished shards of an unfinished stage. The stage may be running."""
    progress = join(folder, PROGRESS_NAME)
    names = list_names(progress)
    done = {name.removesuffix(".json") for name in _single_marker_names(names)}
    for name in _merged_marker_names(names):
        path = join(progress, name)
        done.update(_parse(Counts, read_bytes(path).partition(b"\n")[0], path).names)
    return done


def _single_marker_names(names: Iterable[str]) -> list[str]:
    """The names, among those in a progress folder, of markers of one shard."""
    return [
        name
        for name in names
        if name.endswith(".json") and name != "plan.json" and not name.startswith(TEMPORARY_PREFIX)
    ]


def _merged_marker_names(names: Iterable[str]) -> list[str]:
    """The names, among those in a progress folder, of files of merged markers."""
    return [name for name in names if name.startswith("done-") and name.endswith(".jsonl")]


def step_folder(folder: str, step: str) -> str:
    """The folder of one step's output inside an unfinished stage. It is deleted when the stage is done."""
    return join(folder, PROGRESS_NAME, step)


def ready_folder(folder: str) -> str:
    """The folder of an unfinished stage for the markers of its ready shards: an earlier stage made their files.

    The files lie in `folder` under their final names. `mark_shard_done` and `read_done` work on the folder of markers.
    A ready shard is not done: the stage itself takes it when it runs, unless its files are damaged.
    """
    return step_folder(folder, READY_NAME)


def sum_counts(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    """The sum per key, with sorted keys."""
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


def json_line(record: BaseModel) -> bytes:
    """The record as one line of JSON, without a line end."""
    return record.model_dump_json().encode()


def _indented_json(record: BaseModel) -> bytes:
    return (record.model_dump_json(indent=1) + "\n").encode()


RecordType = TypeVar("RecordType", bound=_Record)


def _parse(model: type[RecordType], data: bytes, path: str) -> RecordType:
    try:
        return model.model_validate_json(data)
    except ValueError:
        raise _unreadable(path) from None


def _unreadable(path: str) -> InputError:
    folder = posixpath.dirname(path.partition(f"/{PROGRESS_NAME}/")[0] + "/" if f"/{PROGRESS_NAME}/" in path else path)
    return InputError(
        f"{path}: damaged, or not written by this version of Seedbed. If a run wrote '{folder}', delete that folder, "
        "and run the command again; otherwise give another one."
    )


def _mismatch_message(folder: str, plan_there: Plan, plan: Plan) -> str:
    if plan_there.format_version != plan.format_version:
        return (
            f"'{folder}' was written in format {plan_there.format_version}; this version of Seedbed writes format "
            f"{plan.format_version}. Nothing was changed. Delete this folder, give another --output, or give --replace "
            "to a command that has it: the work is then done again."
        )
    before, after = _flatten(plan_there.model_dump(mode="json")), _flatten(plan.model_dump(mode="json"))
    changed = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    there, now = ({key: repr(value) for key, value in side.items()} for side in (before, after))
    lines = [f"  {key}: {there.get(key, 'not set')} there, {now.get(key, 'not set')} now" for key in changed[:8]]
    more = f"\n  and {len(changed) - 8} more" if len(changed) > 8 else ""
    return (
        f"'{folder}' holds the work of another config or of other inputs:\n" + "\n".join(lines) + more + "\n"
        "Nothing was changed. Give another --output, or --replace to redo this stage and all stages that depend on it."
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
