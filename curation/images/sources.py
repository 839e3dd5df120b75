"""The user's images: listing a source, and reading one image by its reference.

A source is a folder of image files, of WebDataset tars (img2dataset's too), or of Parquet files with image bytes.
Ingest lists it once and writes a reference (uri, offset, length) for each image. Every later stage reads by reference,
so original bytes are not copied before the corpus is packed.

Archives are untrusted input. They are not unpacked to disk, names of members are never used as paths, and sizes in
headers are checked. A tar of links, devices and bombs costs bounded time and memory and one reject. Everything in a
source is an image, a reject, or counted (listing.py for files, tar_members.py for members).
"""

import bisect
import functools
import itertools
import os
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, BinaryIO, Literal, cast

import pyarrow.parquet as pq
from pydantic import Field, field_validator

from curation.config import IsPath, Settings
from curation.errors import DamagedFileError, InputError
from curation.files import paths
from curation.files.hashes import hash_json
from curation.images import listing, sampling, tar_members
from curation.images.decode import RejectReason, begins_like_an_image
from curation.images.hashing import image_id
from curation.images.parquet_rows import (
    ImageRow,
    NullRows,
    ParquetRows,
    SkippedRows,
    column_of,
    open_images,
    read_group,
)

Layout = Literal["folder", "webdataset", "parquet"]
Role = Literal["seed", "pool", "holdout"]

# Kinds of files that the driver counts in one source; the others are summed. Assumed: more would fill the page.
MAX_KINDS = 20

# Counts the images that a sample leaves out: a kind of `read_source`, and a total of ingest's shards.
NOT_SAMPLED = "not sampled"

_ARCHIVE_EXTENSION: dict[Layout, str] = {"webdataset": "tar", "parquet": "parquet"}

# The `uri` of an image in a Parquet file: the file, and the column of its images; the `offset` is then the row.
_PARQUET_URI = re.compile(r"(?P<file>.+\.parquet)#(?P<column>.+)", re.IGNORECASE | re.DOTALL)


class SourceConfig(Settings):
    """One dataset to read."""

    name: str
    """Name of the dataset; unique in the config."""
    path: Annotated[str, IsPath] = Field(min_length=1)
    """Folder (or one tar or Parquet file), local or any fsspec URL."""
    role: Role
    """`seed`: trusted; the corpus should resemble it. `pool`: retrieval picks from it. `holdout`: evaluation images;
    neither they nor copies of them may enter the corpus."""
    layout: Layout = "folder"
    """How the images are stored."""
    image_column: str = "image.bytes"
    """For Parquet: the column with the encoded image; dots separate the fields of structs."""
    label_column: str | None = None
    """For Parquet: a text or integer column with the label."""

    @field_validator("name")
    @classmethod
    def _name_can_be_shown(cls, value: str) -> str:
        if not value.isprintable():
            raise ValueError(f"a name may contain printable characters only. Found: {value!r}")
        return value


@dataclass(frozen=True)
class SourceFile:
    """A file of a source: its path relative to the source's folder, and its size in bytes."""

    path: str
    size: int


@dataclass(frozen=True)
class SourceItem:
    """One image of a source, with its encoded bytes, or a problem: then `data` is None."""

    uri: str
    offset: int
    length: int
    data: bytes | None
    label: str | None
    problem: tuple[RejectReason, str] | None = None
    part: str = ""
    """Where the image lies in its file, for a message: the member of a tar, or the row of a Parquet file."""


def require_sources(sources: Sequence[SourceConfig]) -> None:
    """Raise InputError with a line for each source that has nothing at its path. No folder is listed."""
    problems = []
    for source in sources:
        try:
            fs, root = paths.filesystem(source.path)
            paths.retried(functools.partial(fs.info, root))
        except InputError:
            raise
        except (FileNotFoundError, NotADirectoryError):
            problems.append(
                f"source '{source.name}': there is nothing at '{source.path}'. Correct its path in the config."
            )
        except Exception as error:  # each driver of fsspec has errors of its own, for example for a refused connection
            problems.append(f"source '{source.name}': cannot read '{source.path}': {type(error).__name__}: {error}.")
    if problems:
        raise InputError("\n".join(problems))


@dataclass(frozen=True)
class Listing:
    """The files of a source that may hold images, sorted by path, and the number of the others by kind."""

    files: list[SourceFile]
    passed_over: dict[str, int]


def list_source(source: SourceConfig) -> Listing:
    """The files of a source. Links to folders are not followed.

    A file of a folder whose name ends like neither an image nor another known file is listed: its first bytes decide.
    Raises InputError when the path is missing, holds no such file, or has a folder that cannot be listed.
    """
    fs, root = paths.filesystem(source.path)
    named = f"source '{source.name}'"
    files, passed_over = [], Counter[str]()
    try:
        try:
            info = paths.retried(lambda: fs.info(root))
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{named}: there is nothing at '{source.path}'. Correct its path in the config.") from None
        if info["type"] == "file":
            return Listing([_single_file(source, root, int(info["size"] or 0))], {})
        if info["type"] != "directory":
            raise InputError(
                f"{named}: '{source.path}' is neither a file nor a folder. Correct its path in the config."
            )
        for entry in listing.walk(source.path):
            if (kind := _kind_passed_over(source.layout, entry)) is None:
                files.append(SourceFile(entry.path, entry.size))
            else:
                passed_over[kind] += 1
    except OSError as error:
        raise InputError(
            f"{named}: '{source.path}' cannot be listed ({error}), so images in it would be missing. Make every folder "
            "in it readable, or remove it from the source."
        ) from None
    counts = listing.bounded(passed_over, MAX_KINDS)
    if not files:
        endings = _ARCHIVE_EXTENSION.get(source.layout) or ", ".join(sorted(listing.IMAGE_EXTENSIONS))
        others = f" It holds {listing.in_words(counts)}." if counts else ""
        raise InputError(
            f"{named}: no images in '{source.path}' (looked for files ending in {endings}).{others} Correct its path, "
            f"or its layout, which is '{source.layout}'."
        )
    return Listing(sorted(files, key=lambda file: file.path), counts)


def list_files(source: SourceConfig) -> list[SourceFile]:
    """The files of `list_source` without those of a folder whose name ends like no image."""
    files = list_source(source).files
    if source.layout != "folder":
        return files
    return [file for file in files if listing.has_image_name(file.path)]


def _single_file(source: SourceConfig, root: str, size: int) -> SourceFile:
    if listing.extension(root) != _ARCHIVE_EXTENSION.get(source.layout):
        ending = _ARCHIVE_EXTENSION.get(source.layout)
        expected = f"a folder or a .{ending} file" if ending else "a folder"
        raise InputError(
            f"source '{source.name}': '{source.path}' is a file; layout '{source.layout}' needs {expected}."
        )
    return SourceFile("", size)


def _kind_passed_over(layout: Layout, entry: listing.Entry) -> str | None:
    """The kind of a file that is passed over without a look at its content; None for the others."""
    if listing.is_system_file(entry.path):
        return listing.SYSTEM_FILE
    ending = listing.extension(entry.path)
    if ending == _ARCHIVE_EXTENSION.get(layout) or (layout == "folder" and ending in listing.IMAGE_EXTENSIONS):
        return None
    if entry.kind != "file":
        return listing.LINK if entry.kind == "folder_link" else listing.SPECIAL_FILE
    if layout == "folder" and ending not in listing.OTHER_EXTENSIONS:
        return None
    return listing.kind_of(entry.path)


def listing_hash(files: list[SourceFile]) -> str:
    """A hash of the names and sizes of a source's files. Changed bytes are detected when an image is read again."""
    return hash_json([[file.path, file.size] for file in files])


def sampled_files(source: SourceConfig, files: Sequence[SourceFile], share: float) -> list[SourceFile]:
    """The files of a source that a sample reads: of a folder those that are chosen (sampling.py), else all."""
    if source.layout != "folder":
        return list(files)
    return [file for file in files if sampling.is_chosen(share, source.name, file.path)]


def read_source(
    source: SourceConfig,
    files: tuple[str, ...],
    *,
    max_bytes: int,
    passed_over: Counter[str] | None = None,
    share: float = 1.0,
) -> Iterator[SourceItem]:
    """Yields the images in `files` of a source, in a fixed order, one in memory at a time.

    share: of the members of tars and rows of Parquet files that are read; the others are counted as NOT_SAMPLED.
    `sampled_files` has chosen among the files of a folder.

    An image of more than `max_bytes` is not read. A tar or Parquet file that cannot be read to its end gives the images
    before the damage, and then one item with the problem. Rows of a Parquet file without an image are one item. The
    other files and members are counted in `passed_over` by kind. Raises InputError for a column that is missing or
    holds no bytes, and for a disk or server that fails repeatedly.
    """
    passed_over = Counter() if passed_over is None else passed_over
    for path in files:
        uri = paths.join(source.path, path) if path else source.path
        readable = os.fsencode(uri).decode(errors="backslashreplace")
        if readable != uri:
            problem = (RejectReason.UNREADABLE, "its name is not UTF-8; rename the file")
            yield SourceItem(readable, 0, 0, None, None, problem)
            continue
        if (trouble := location_problem(source, uri)) is not None:
            yield SourceItem(uri, 0, 0, None, _folder_label(source, path), trouble)
            continue
        try:
            match source.layout:
                case "folder":
                    yield from _read_file(uri, path, max_bytes, passed_over)
                case "webdataset":
                    yield from _read_tar(source, uri, path, max_bytes, passed_over, share)
                case "parquet":
                    yield from _read_parquet(source, uri, path, max_bytes, passed_over, share)
        except DamagedFileError as error:
            yield SourceItem(uri, 0, 0, None, None, (RejectReason.DAMAGED_ARCHIVE, str(error)))
        except OSError as error:
            detail = f"{type(error).__name__}: {error}"
            if not paths.is_permanent(error):
                raise InputError(
                    f"{uri}: cannot be read ({detail}). Repair its disk or server, and start again: finished shards "
                    "are kept."
                ) from None
            if source.layout == "folder":
                yield SourceItem(uri, 0, 0, None, _folder_label(source, path), (RejectReason.UNREADABLE, detail))
            else:
                problem = (RejectReason.DAMAGED_ARCHIVE, f"{uri}: cannot be read: {detail}.")
                yield SourceItem(uri, 0, 0, None, None, problem)


def _folder_label(source: SourceConfig, path: str) -> str | None:
    return (posixpath.dirname(path) or None) if source.layout == "folder" else None


def location_problem(source: SourceConfig, uri: str) -> tuple[RejectReason, str] | None:
    """Why a local file must not be opened: a link out of the source, a folder, a pipe or a device."""
    if not paths.is_local(uri):
        return None
    root, target = (os.path.realpath(paths.filesystem(location)[1]) for location in (source.path, uri))
    if os.path.commonpath([root, target]) != root:
        return RejectReason.LINK_OUTSIDE_SOURCE, f"leads to {tar_members.shown(target)}"
    if os.path.exists(target) and not os.path.isfile(target):  # reading a pipe would block forever
        if source.layout == "folder":
            return RejectReason.UNREADABLE, "not a regular file"
        return RejectReason.DAMAGED_ARCHIVE, f"{uri}: not a regular file"
    return None


def _read_file(uri: str, path: str, max_bytes: int, passed_over: Counter[str]) -> Iterator[SourceItem]:
    label = posixpath.dirname(path) or None
    with paths.RetryingFile(uri) as file:
        if not listing.has_image_name(path):
            if not begins_like_an_image(file.read(tar_members.START_BYTES)):
                passed_over[listing.kind_of(path)] += 1
                return
        size = file.seek(0, os.SEEK_END)
        if size > max_bytes:
            yield SourceItem(uri, 0, size, None, label, _too_many_bytes(size, max_bytes))
            return
        file.seek(0)
        data = file.read(size)
    yield SourceItem(uri, 0, len(data), data, label)


def _too_many_bytes(size: int, max_bytes: int) -> tuple[RejectReason, str]:
    return RejectReason.TOO_MANY_BYTES, f"{size} bytes; max_bytes is {max_bytes}"


def _read_tar(
    source: SourceConfig, uri: str, path: str, max_bytes: int, passed_over: Counter[str], share: float
) -> Iterator[SourceItem]:
    """The images of a plain tar; see tar_members.py."""
    is_chosen = functools.partial(sampling.is_chosen, share, source.name, path)
    with paths.RetryingFile(uri) as file:
        try:
            for image in tar_members.read_images(
                cast(BinaryIO, file), passed_over, max_bytes=max_bytes, is_chosen=is_chosen
            ):
                if not image.is_chosen:
                    passed_over[NOT_SAMPLED] += 1
                    continue
                problem = None
                if image.is_sparse:
                    problem = (RejectReason.UNREADABLE, "stored sparse, so its bytes are not in one piece")
                elif image.data is None:
                    problem = _too_many_bytes(image.length, max_bytes)
                part = f"member {tar_members.shown(image.name)}"
                yield SourceItem(uri, image.offset, image.length, image.data, image.label, problem, part)
        except tarfile.TarError as error:
            remedy = "Write it again, uncompressed, or remove it from the source."
            raise DamagedFileError(f"{uri}: not a readable plain tar: {error}. {remedy}") from None


def _read_parquet(
    source: SourceConfig, uri: str, path: str, max_bytes: int, passed_over: Counter[str], share: float
) -> Iterator[SourceItem]:
    """The images of a Parquet file by row, then its rows without one as a single problem."""
    in_column = f"{uri}#{source.image_column}"
    sample = None if share >= 1 else (share, source.name, path)
    with paths.RetryingFile(uri) as file, ParquetRows() as rows:
        for item in rows.read(
            cast(BinaryIO, file),
            uri,
            source.image_column,
            source.label_column,
            max_bytes=max_bytes,
            sample=sample,
        ):
            match item:
                case SkippedRows():
                    passed_over[NOT_SAMPLED] += item.num_rows
                case NullRows():
                    detail = f"the image column is null in {item.num_nulls:,} of {item.num_rows:,} rows"
                    problem = (RejectReason.EMPTY, f"{detail}; the first is row {item.first}")
                    yield SourceItem(in_column, item.first, 0, None, None, problem)
                case ImageRow(data=None):
                    problem = _too_many_bytes(item.length, max_bytes)
                    yield SourceItem(in_column, item.row, item.length, None, item.label, problem, f"row {item.row}")
                case ImageRow():
                    yield SourceItem(in_column, item.row, item.length, item.data, item.label, part=f"row {item.row}")


class ReferenceReader:
    """Reads images by reference and checks that their bytes are those that ingest read.

    Keeps the last file open, because most references of one shard point into one tar or Parquet file.
    """

    def __init__(self) -> None:
        self._uri: str | None = None
        self._file: BinaryIO | None = None
        self._parquet: pq.ParquetFile | None = None
        self._column = ""
        self._ends: list[int] = []  # of the row groups, in rows
        self._group: tuple[int, int, Any] | None = None  # first row, end row, column of the row group in memory

    def read(self, uri: str, offset: int, length: int, expected_id: str, layout: Layout) -> bytes:
        """The bytes of the image. Raises InputError when the file is missing or its bytes have changed."""
        try:
            if self._uri != uri:
                self.close()
                if layout == "parquet":
                    path, self._column = split_parquet_uri(uri)
                    self._file, self._uri = paths.open_read(path), uri
                    self._parquet = open_images(self._file, path, [self._column])
                    groups = map(self._parquet.metadata.row_group, range(self._parquet.num_row_groups))
                    self._ends = list(itertools.accumulate(group.num_rows for group in groups))
                else:
                    self._file, self._uri = paths.open_read(uri), uri
            data = self._row(offset) if self._parquet else self._slice(offset, length)
        except OSError as error:
            raise InputError(f"{uri}: cannot be read any more ({error}). Ingest again with --replace.") from None
        if image_id(data) != expected_id:
            raise InputError(
                f"{uri}: the bytes at {offset} are no longer those of image {expected_id}. "
                "The source has changed since it was ingested: ingest again with --replace."
            )
        return data

    def close(self) -> None:
        """Closes the open file."""
        if self._file is not None:
            self._file.close()
        self._uri = self._file = self._parquet = self._group = None

    def _slice(self, offset: int, length: int) -> bytes:
        assert self._file is not None
        self._file.seek(offset)
        return self._file.read(length)

    def _row(self, row: int) -> bytes:
        assert self._parquet is not None and self._uri is not None
        if self._group is None or not self._group[0] <= row < self._group[1]:
            group = bisect.bisect_right(self._ends, row)
            if group == len(self._ends):
                return b""
            table = read_group(self._parquet, group, [self._column], self._uri)
            self._group = (self._ends[group] - table.num_rows, self._ends[group], column_of(table, self._column))
        assert self._group is not None
        return self._group[2][row - self._group[0]].as_py() or b""


def split_parquet_uri(uri: str) -> tuple[str, str]:
    """The Parquet file and the column in the `uri` of an image whose layout is `parquet`."""
    parts = _PARQUET_URI.fullmatch(uri)
    if parts is None:
        raise InputError(f"'{uri}' names no column of a Parquet file: expected 'FILE.parquet#COLUMN'. Ingest it again.")
    return parts["file"], parts["column"]
