"""The manifest that says a stage is done, and the progress files of one that is not. What a stage leaves behind:

<output>/
  <kind>-00000.parquet  ...     the shards' files
  manifest.json                 written last: the stage is done, and these are its inputs, config, files and totals
  .progress/                    only while the stage is unfinished
    plan.json                   what is being made: stage, config, inputs, number of shards
    <shard>.json                one per finished shard: its files, their hashes, its totals
    done-00000.jsonl            a thousand of these, gathered by the driver: their counts, then one a line
    <step>/                     what an earlier step of this stage left for a later one; a stage of its own
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar, overload

from pydantic import BaseModel, ConfigDict, Field

from curation.errors import InputError, OutputMismatchError
from curation.files.hashes import hash_json
from curation.files.paths import (
    TEMPORARY_PREFIX,
    FileRecord,
    atomic_write,
    delete,
    exists,
    filesystem,
    is_folder,
    join,
    list_names,
    read_bytes,
    write_bytes,
)

MANIFEST_NAME = "manifest.json"
PROGRESS_NAME = ".progress"
# The version of everything that stages write. Outputs of another version are refused, not converted.
FORMAT_VERSION = 2
# Markers that are gathered into one file, and how many files a resume reads at once. Assumed: of an object store that
# answers in 20 ms, 100,000 finished shards are then read in two seconds.
MARKERS_PER_FILE = 1000
READERS = 16


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


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
