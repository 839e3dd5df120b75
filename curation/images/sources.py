"""The user's images: listing a source, and reading one image by its reference.

A source is a folder of image files, of WebDataset tars (img2dataset's too), or of Parquet files with image bytes.
Ingest lists it once and writes a reference (uri, offset, length) for each image. Every later stage reads by reference,
so original bytes are not copied before the corpus is packed.

Archives are untrusted input. They are not unpacked to disk, names of members are never used as paths, and sizes in
headers are checked. A tar of links, devices and bombs costs bounded time and memory and one reject.
"""

import json
import os
import posixpath
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, final

import pyarrow.parquet as pq
from pydantic import field_validator

from curation.config import Settings
from curation.errors import DamagedFileError, InputError
from curation.files import paths
from curation.files.hashes import hash_json
from curation.images.decode import RejectReason
from curation.images.hashing import image_id
from curation.images.parquet_rows import (
    MAX_LABEL_CHARACTERS,
    ImageRow,
    NullRows,
    ParquetRows,
    column_of,
    open_images,
    read_group,
)

Layout = Literal["folder", "webdataset", "parquet"]
Role = Literal["seed", "pool", "holdout"]

# Endings of the names of images in a folder or a tar; the format is then determined by the bytes.
IMAGE_EXTENSIONS = frozenset(
    {"bmp", "gif", "jfif", "jpeg", "jpg", "pbm", "pgm", "png", "pnm", "ppm", "tif", "tiff", "webp"}
)

# Bytes between two members of a tar: long names, extended attributes. Assumed: Linux bounds an attribute to 64 KiB.
MAX_HEADER_BYTES = 1 << 20
# Consecutive digits in such a header; some versions of Python's reader take time that grows with the square of their
# number (CVE-2024-6232). Linux bounds a name to 255 characters.
MAX_DIGITS = 255
# Bytes of a `.json` or `.cls`. Assumed: all metadata of a photograph is some 100 kB. Larger ones give no label.
MAX_SIDECAR_BYTES = 1 << 20
# Images of one sample in a tar, kept in memory until its label is known. Assumed; further images start a new sample.
MAX_IMAGES_IN_SAMPLE = 10_000
# Characters of an untrusted name in a message.
_MAX_SHOWN = 200
_MANY_DIGITS = re.compile(rb"\d{%d}" % (MAX_DIGITS + 1))

# The `uri` of an image in a Parquet file: the file, and the column of its images; the `offset` is then the row.
_PARQUET_URI = re.compile(r"(?P<file>.+\.parquet)#(?P<column>.+)", re.IGNORECASE | re.DOTALL)


class SourceConfig(Settings):
    """One dataset to read."""

    name: str
    """Name of the dataset; unique in the config."""
    path: str
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


def list_files(source: SourceConfig) -> list[SourceFile]:
    """The files of a source that hold images, sorted by path. Links to folders are not followed.

    Raises InputError when the path is missing or holds no such file.
    """
    extensions = {"folder": IMAGE_EXTENSIONS, "webdataset": {"tar"}, "parquet": {"parquet"}}[source.layout]
    fs, root = paths.filesystem(source.path)
    if not fs.exists(root):
        raise InputError(
            f"source '{source.name}': there is nothing at '{source.path}'. Correct its path in the config."
        )
    if fs.isfile(root):
        if source.layout == "folder" or _extension(root) not in extensions:
            expected = "a folder" if source.layout == "folder" else f"a folder or a .{min(extensions)} file"
            raise InputError(
                f"source '{source.name}': '{source.path}' is a file; layout '{source.layout}' needs {expected}."
            )
        return [SourceFile("", int(fs.size(root)))]
    files = [
        SourceFile(path[len(root.rstrip("/")) + 1 :], int(info["size"] or 0))
        for path, info in fs.find(root, detail=True).items()
        if _extension(path) in extensions
    ]
    if not files:
        raise InputError(
            f"source '{source.name}': no images in '{source.path}' (looked for files ending in "
            f"{', '.join(sorted(extensions))}). Correct its path, or its layout, which is '{source.layout}'."
        )
    return sorted(files, key=lambda file: file.path)


def listing_hash(files: list[SourceFile]) -> str:
    """A hash of the names and sizes of a source's files. Changed bytes are detected when an image is read again."""
    return hash_json([[file.path, file.size] for file in files])


def read_source(source: SourceConfig, files: tuple[str, ...], *, max_bytes: int) -> Iterator[SourceItem]:
    """Yields the images in `files` of a source, in a fixed order, one in memory at a time.

    An image of more than `max_bytes` is not read. A tar or Parquet file that cannot be read to its end gives the images
    before the damage, and then one item with the problem. Rows of a Parquet file without an image are one item. Raises
    InputError for a column that is missing or holds no bytes.
    """
    for path in files:
        uri = paths.join(source.path, path) if path else source.path
        readable = os.fsencode(uri).decode(errors="backslashreplace")
        if readable != uri:
            problem = (RejectReason.UNREADABLE, "its name is not UTF-8; rename the file")
            yield SourceItem(readable, 0, 0, None, None, problem)
            continue
        try:
            match source.layout:
                case "folder":
                    yield _read_file(source, uri, path, max_bytes)
                case "webdataset":
                    yield from _read_tar(uri, max_bytes)
                case "parquet":
                    yield from _read_parquet(source, uri, max_bytes)
        except DamagedFileError as error:
            yield SourceItem(uri, 0, 0, None, None, (RejectReason.DAMAGED_ARCHIVE, str(error)))


def _read_file(source: SourceConfig, uri: str, path: str, max_bytes: int) -> SourceItem:
    label = posixpath.dirname(path) or None
    if paths.is_local(uri):
        root, target = (os.path.realpath(paths.filesystem(location)[1]) for location in (source.path, uri))
        if os.path.commonpath([root, target]) != root:
            problem = (RejectReason.LINK_OUTSIDE_SOURCE, f"leads to {_shown(target)}")
            return SourceItem(uri, 0, 0, None, label, problem)
        if os.path.exists(target) and not os.path.isfile(target):  # reading a pipe would block forever
            return SourceItem(uri, 0, 0, None, label, (RejectReason.UNREADABLE, "not a regular file"))
    try:
        with paths.open_read(uri) as file:
            size = file.seek(0, os.SEEK_END)
            if size > max_bytes:
                return SourceItem(uri, 0, size, None, label, _too_many_bytes(size, max_bytes))
            file.seek(0)
            data = file.read(size)
    except OSError as error:
        return SourceItem(uri, 0, 0, None, label, (RejectReason.UNREADABLE, f"{type(error).__name__}: {error}"))
    return SourceItem(uri, 0, len(data), data, label)


def _too_many_bytes(size: int, max_bytes: int) -> tuple[RejectReason, str]:
    return RejectReason.TOO_MANY_BYTES, f"{size} bytes; max_bytes is {max_bytes}"


def _shown(name: str) -> str:
    """An untrusted name for a message: quoted, special characters escaped, cut where it is long."""
    return repr(name[:_MAX_SHOWN]) + ("..." if len(name) > _MAX_SHOWN else "")


def _read_tar(uri: str, max_bytes: int) -> Iterator[SourceItem]:
    """The images of a plain tar, with the label of the sample's `.cls` or `.json` (`label`, `cls` or `class`).

    Only regular files are read: images and sidecars, by the extension of their name. Nothing is unpacked to disk.
    """
    with paths.open_read(uri) as file:
        headers = _HeaderReader(file)
        try:
            # "r:" refuses compressed tars, whose members cannot be read by offset later.
            with tarfile.open(fileobj=headers, mode="r:") as archive:  # type: ignore[call-overload]  # read, seek, tell suffice
                yield from _read_samples(archive, headers, uri, max_bytes)
        # Python's reader documents TarError only. The other errors arise from invalid numbers, from a header that ends
        # within its list of holes, and from deeply nested headers.
        except (tarfile.TarError, ValueError, IndexError, RecursionError) as error:
            reason = "headers of headers" if isinstance(error, RecursionError) else error
            remedy = "Write it again, uncompressed, or remove it from the source."
            raise DamagedFileError(f"{uri}: not a readable plain tar: {reason}. {remedy}") from None
        except OSError as error:
            raise InputError(f"{uri}: cannot be read ({error}). Repair its disk or server, and start again.") from None


@final
class _HeaderReader:
    """The view of a tar for Python's reader: headers only, and only as many bytes as one member needs.

    Python's reader requests as many bytes as a header states, so requests and positions are checked.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.end = file.seek(0, os.SEEK_END)
        file.seek(0)
        self._left = MAX_HEADER_BYTES

    def next_member(self) -> None:
        """Resets the count of header bytes for the next member."""
        self._left = MAX_HEADER_BYTES

    def read(self, size: int) -> bytes:
        self._left -= size
        if size < 0 or self._left < 0:
            raise tarfile.ReadError(f"headers of more than {MAX_HEADER_BYTES} bytes before byte {self.file.tell()}")
        data = self.file.read(size)
        if _MANY_DIGITS.search(data):
            raise tarfile.ReadError(f"a header with a number of more than {MAX_DIGITS} digits")
        return data

    def seek(self, position: int) -> int:
        if not 0 <= position <= self.end:
            raise tarfile.ReadError(f"the next header would be at byte {position}; the tar has {self.end}")
        return self.file.seek(position)

    def tell(self) -> int:
        return self.file.tell()


def _read_samples(archive: tarfile.TarFile, headers: _HeaderReader, uri: str, max_bytes: int) -> Iterator[SourceItem]:
    file, end = headers.file, headers.end
    images: list[tarfile.TarInfo] = []
    label: str | None = None
    key: str | None = None
    while (member := archive.next()) is not None:
        # Otherwise every member and every global header would stay in memory.
        archive.members.clear()  # type: ignore[attr-defined]  # as webdataset does
        archive.pax_headers.clear()  # type: ignore[attr-defined]  # typeshed leaves it out
        headers.next_member()
        if not 0 <= member.size <= end and not member.issparse():  # a negative size would make the reader loop forever
            raise tarfile.ReadError(f"member {_shown(member.name)} has {member.size} bytes, the tar {end}")
        if not member.isfile():
            continue
        folder, _, name = member.name.rpartition("/")
        stem, _, extension = name.partition(".")
        if (sample := f"{folder}/{stem}") != key or len(images) >= MAX_IMAGES_IN_SAMPLE:
            yield from _items_in_tar(images, file, uri, label, max_bytes)
            images, label, key = [], None, sample
        extension = extension.lower()
        if extension.rpartition(".")[2] in IMAGE_EXTENSIONS:
            images.append(member)
        elif extension in ("cls", "json") and member.size <= MAX_SIDECAR_BYTES and not member.issparse():
            data = _read_member(member, file)
            text = data.decode(errors="replace").strip() if extension == "cls" else _label_in_json(data)
            label = label if text is None or len(text) > MAX_LABEL_CHARACTERS else text
    # A tar ends in two zero blocks; Python's reader also ends at the first cut or damaged header.
    file.seek(archive.offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"neither a header nor the end mark at byte {archive.offset}; members are missing")
    yield from _items_in_tar(images, file, uri, label, max_bytes)


def _items_in_tar(
    members: list[tarfile.TarInfo], file: BinaryIO, uri: str, label: str | None, max_bytes: int
) -> Iterator[SourceItem]:
    for member in members:
        if member.issparse():
            shown = _shown(member.name)
            problem = (RejectReason.UNREADABLE, f"{shown} is stored sparse, so its bytes are not in one piece")
            yield SourceItem(uri, member.offset_data, 0, None, label, problem)
        elif member.size > max_bytes:
            problem = _too_many_bytes(member.size, max_bytes)
            yield SourceItem(uri, member.offset_data, member.size, None, label, problem)
        else:
            yield SourceItem(uri, member.offset_data, member.size, _read_member(member, file), label)


def _read_member(member: tarfile.TarInfo, file: BinaryIO) -> bytes:
    position = file.tell()
    file.seek(member.offset_data)
    data = file.read(member.size)
    file.seek(position)
    if len(data) != member.size:
        raise tarfile.ReadError(f"member {_shown(member.name)} has {len(data)} of {member.size} bytes")
    return data


def _label_in_json(data: bytes) -> str | None:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return None  # an invalid sidecar gives no label; the image is kept
    if isinstance(values, dict):
        for name in ("label", "cls", "class"):
            if isinstance(values.get(name), str | int):
                return str(values[name]).encode(errors="replace").decode()  # JSON may contain lone surrogates
    return None


def _read_parquet(source: SourceConfig, uri: str, max_bytes: int) -> Iterator[SourceItem]:
    """The images of a Parquet file by row, then its rows without one as a single problem."""
    in_column = f"{uri}#{source.image_column}"
    with paths.open_read(uri) as file, ParquetRows() as rows:
        for item in rows.read(file, uri, source.image_column, source.label_column, max_bytes=max_bytes):
            match item:
                case NullRows():
                    detail = f"the image column is null in {item.num_nulls:,} of {item.num_rows:,} rows"
                    problem = (RejectReason.EMPTY, f"{detail}; the first is row {item.first}")
                    yield SourceItem(in_column, item.first, 0, None, None, problem)
                case ImageRow(data=None):
                    problem = _too_many_bytes(item.length, max_bytes)
                    yield SourceItem(in_column, item.row, item.length, None, item.label, problem)
                case ImageRow():
                    yield SourceItem(in_column, item.row, item.length, item.data, item.label)


def _extension(path: str) -> str:
    _, dot, extension = path.rpartition("/")[2].rpartition(".")
    return extension.lower() if dot else ""


class ReferenceReader:
    """Reads images by reference and checks that their bytes are those that ingest read.

    Keeps the last file open, because most references of one shard point into one tar or Parquet file.
    """

    def __init__(self) -> None:
        self._uri: str | None = None
        self._file: BinaryIO | None = None
        self._parquet: pq.ParquetFile | None = None
        self._column = ""
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
            start = 0
            for group in range(self._parquet.num_row_groups):
                end = start + self._parquet.metadata.row_group(group).num_rows
                if start <= row < end:
                    table = read_group(self._parquet, group, [self._column], self._uri)
                    self._group = (start, end, column_of(table, self._column))
                    break
                start = end
            else:
                return b""
        assert self._group is not None
        return self._group[2][row - self._group[0]].as_py() or b""


def split_parquet_uri(uri: str) -> tuple[str, str]:
    """The Parquet file and the column in the `uri` of an image whose layout is `parquet`."""
    parts = _PARQUET_URI.fullmatch(uri)
    if parts is None:
        raise InputError(f"'{uri}' is no image in a Parquet file: expected 'FILE.parquet#COLUMN'. Ingest it again.")
    return parts["file"], parts["column"]
