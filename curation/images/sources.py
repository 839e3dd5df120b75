"""Where the user's images lie: listing a source, and reading one image by its reference.

A source is a folder of image files, of WebDataset tars (img2dataset's too), or of Parquet files with image bytes.
Ingest lists it once and writes a reference (uri, offset, length) per image; every later stage reads by reference, so
original bytes are never copied before the corpus is packed.

Archives come from strangers too. Nothing of them is unpacked, no member's name leads anywhere, and what a header says
of its own size is not believed: a tar of links, devices and bombs costs a bounded time and memory, and its one row of
rejects.
"""

import json
import os
import posixpath
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, final

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import field_validator

from curation.config import Settings
from curation.errors import DamagedFileError, InputError
from curation.files import paths
from curation.files.hashes import hash_json
from curation.images.decode import RejectReason
from curation.images.hashing import image_id

Layout = Literal["folder", "webdataset", "parquet"]
Role = Literal["seed", "pool", "holdout"]

# Files that count as images in a folder or a tar, by the end of their name; the bytes decide what they really are.
IMAGE_EXTENSIONS = frozenset(
    {"bmp", "gif", "jfif", "jpeg", "jpg", "pbm", "pgm", "png", "pnm", "ppm", "tif", "tiff", "webp"}
)

# Bytes between two members of a tar: long names, extended attributes. Assumed: Linux bounds an attribute to 64 KiB.
MAX_HEADER_BYTES = 1 << 20
# Digits in a row in such a header, on which some versions of Python's reader spend the square of their number
# (CVE-2024-6232). Linux bounds a name to 255 characters.
MAX_DIGITS = 255
# Bytes of a `.json` or `.cls`. Assumed: with all metadata of a photograph some 100 kB. Larger ones give no label.
MAX_SIDECAR_BYTES = 1 << 20
# Characters of a label; what is longer is a text, and gives none. Assumed.
MAX_LABEL_CHARACTERS = 1_000
# Images of one sample in a tar, which are held until its label is known. Assumed; beyond, another sample begins.
MAX_IMAGES_IN_SAMPLE = 10_000
# Bytes of the image column in one row group, unpacked: it is held in memory. Assumed: 1,000 images are some 0.1 GB.
MAX_ROW_GROUP_BYTES = 4 << 30
# The same where values are kept once however often they occur, which Arrow does up to 2 GiB.
MAX_DICTIONARY_BYTES = 1 << 30
# Characters of a stranger's name in a message.
_MAX_SHOWN = 200
_MANY_DIGITS = re.compile(rb"\d{%d}" % (MAX_DIGITS + 1))

# The `uri` of an image in a Parquet file: the file, and the column of its images; the `offset` is then the row.
PARQUET_URI = re.compile(r"(?P<file>.+\.parquet)#(?P<column>.+)", re.IGNORECASE | re.DOTALL)


class SourceConfig(Settings):
    """One dataset to read."""

    name: str
    """Name of the dataset; unique in the config."""
    path: str
    """Folder (or single tar or Parquet file), local or any fsspec URL."""
    role: Role
    """`seed`: trusted, to be resembled. `pool`: to choose from. `holdout`: nothing like it may enter the corpus."""
    layout: Layout = "folder"
    """How the images are stored."""
    image_column: str = "image.bytes"
    """For Parquet: the column with the encoded image, dots leading into structs."""
    label_column: str | None = None
    """For Parquet: a text or integer column that becomes the label."""

    @field_validator("name")
    @classmethod
    def _name_can_be_shown(cls, value: str) -> str:
        if not value.isprintable():
            raise ValueError(f"a name of characters that can be printed is wanted. Found: {value!r}")
        return value


@dataclass(frozen=True)
class SourceFile:
    """A file of a source: its path relative to the source's folder, and its size in bytes."""

    path: str
    size: int


@dataclass(frozen=True)
class Found:
    """One image as found in a source, with its encoded bytes. `data` is None where `problem` says why."""

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
    fs, inner = paths.filesystem(source.path)
    if not fs.exists(inner):
        raise InputError(
            f"source '{source.name}': there is nothing at '{source.path}'. Correct its path in the config."
        )
    if fs.isfile(inner):
        if source.layout == "folder" or _extension(inner) not in extensions:
            wanted = "a folder" if source.layout == "folder" else f"a folder or a .{min(extensions)} file"
            raise InputError(
                f"source '{source.name}': '{source.path}' is a file; layout '{source.layout}' wants {wanted}."
            )
        return [SourceFile("", int(fs.size(inner)))]
    found = [
        SourceFile(path[len(inner.rstrip("/")) + 1 :], int(info["size"] or 0))
        for path, info in fs.find(inner, detail=True).items()
        if _extension(path) in extensions
    ]
    if not found:
        wanted = ", ".join(sorted(extensions))
        raise InputError(
            f"source '{source.name}': no images in '{source.path}' (looked for files ending in {wanted}). "
            f"Correct its path, or its layout, which is '{source.layout}'."
        )
    return sorted(found, key=lambda file: file.path)


def listing_hash(files: list[SourceFile]) -> str:
    """A hash of the names and sizes of a source's files; changed bytes are noticed when an image is read again."""
    return hash_json([[file.path, file.size] for file in files])


def read_source(source: SourceConfig, files: tuple[str, ...], *, max_bytes: int) -> Iterator[Found]:
    """Yield the images in the files `paths` of a source, in a fixed order, one in memory at a time.

    An image of a folder or a tar with more than `max_bytes` is not read. A tar or Parquet file that cannot be read to
    its end gives what it has before that, and then one Found with the problem. Raises InputError for a column that is
    missing or holds no bytes.
    """
    for path in files:
        uri = paths.join(source.path, path) if path else source.path
        readable = os.fsencode(uri).decode(errors="backslashreplace")
        if readable != uri:
            problem = (RejectReason.UNREADABLE, "its name is not UTF-8; rename the file")
            yield Found(readable, 0, 0, None, None, problem)
            continue
        try:
            match source.layout:
                case "folder":
                    yield _read_file(source, uri, path, max_bytes)
                case "webdataset":
                    yield from _read_tar(uri, max_bytes)
                case "parquet":
                    yield from _read_parquet(uri, source.image_column, source.label_column)
        except DamagedFileError as error:
            yield Found(uri, 0, 0, None, None, (RejectReason.DAMAGED_ARCHIVE, str(error)))


def _read_file(source: SourceConfig, uri: str, path: str, max_bytes: int) -> Found:
    label = posixpath.dirname(path) or None
    if paths.is_local(uri):
        root, target = (os.path.realpath(paths.filesystem(place)[1]) for place in (source.path, uri))
        if os.path.commonpath([root, target]) != root:
            return Found(uri, 0, 0, None, label, (RejectReason.LINK_OUTSIDE_SOURCE, f"leads to {_shown(target)}"))
        if os.path.exists(target) and not os.path.isfile(target):  # a pipe would keep its reader waiting for ever
            return Found(uri, 0, 0, None, label, (RejectReason.UNREADABLE, "not a regular file"))
    try:
        with paths.open_read(uri) as file:
            size = file.seek(0, os.SEEK_END)
            if size > max_bytes:
                return Found(uri, 0, size, None, label, _too_many(size, max_bytes))
            file.seek(0)
            data = file.read(size)
    except OSError as error:
        return Found(uri, 0, 0, None, label, (RejectReason.UNREADABLE, f"{type(error).__name__}: {error}"))
    return Found(uri, 0, len(data), data, label)


def _too_many(size: int, max_bytes: int) -> tuple[RejectReason, str]:
    return RejectReason.TOO_MANY_BYTES, f"{size} bytes; max_bytes is {max_bytes}"


def _shown(name: str) -> str:
    """A stranger's name for a message: quoted, what is no plain character escaped, cut where it is long."""
    return repr(name[:_MAX_SHOWN]) + ("..." if len(name) > _MAX_SHOWN else "")


def _read_tar(uri: str, max_bytes: int) -> Iterator[Found]:
    """The images of a plain tar, with the label of the sample's `.cls` or `.json` (`label`, `cls` or `class`).

    Only regular files with an image's extension are looked at, nothing is unpacked to disk, and members are read by
    name only.
    """
    with paths.open_read(uri) as file:
        headers = _Headers(file)
        try:
            # "r:" refuses compressed tars, whose members have no offset to come back to.
            with tarfile.open(fileobj=headers, mode="r:") as archive:  # type: ignore[call-overload]  # read, seek, tell suffice
                yield from _read_samples(archive, headers, uri, max_bytes)
        # Python's reader promises TarError alone. The others are for numbers that are none, for a header that is cut
        # off within a list of holes, and for headers of headers of headers.
        except (tarfile.TarError, ValueError, IndexError, RecursionError) as error:
            reason = "headers of headers" if isinstance(error, RecursionError) else error
            remedy = "Write it again, uncompressed, or remove it from the source."
            raise DamagedFileError(f"{uri}: not a readable plain tar: {reason}. {remedy}") from None
        except OSError as error:
            raise InputError(f"{uri}: cannot be read ({error}). Mend its disk or server, and start again.") from None


@final
class _Headers:
    """A tar as Python's reader may see it: headers alone, and no more of them than one member needs.

    That reader asks for as many bytes as a header says that it has, and comes back to no place it has not been told.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.end = file.seek(0, os.SEEK_END)
        file.seek(0)
        self._left = MAX_HEADER_BYTES

    def next_member(self) -> None:
        """Forget what the last member's headers took."""
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


def _read_samples(archive: tarfile.TarFile, headers: _Headers, uri: str, max_bytes: int) -> Iterator[Found]:
    file, end = headers.file, headers.end
    images: list[tarfile.TarInfo] = []
    label: str | None = None
    key: str | None = None
    while (member := archive.next()) is not None:
        # Else every member, and every header that is meant for all of them, would stay in memory.
        archive.members.clear()  # type: ignore[attr-defined]  # as webdataset does
        archive.pax_headers.clear()  # type: ignore[attr-defined]  # typeshed leaves it out
        headers.next_member()
        if not 0 <= member.size <= end and not member.issparse():  # below zero, it would lead the reader round for ever
            raise tarfile.ReadError(f"member {_shown(member.name)} has {member.size} bytes, the tar {end}")
        if not member.isfile():
            continue
        folder, _, name = member.name.rpartition("/")
        stem, _, extension = name.partition(".")
        if (sample := f"{folder}/{stem}") != key or len(images) >= MAX_IMAGES_IN_SAMPLE:
            yield from _found_in_tar(images, file, uri, label, max_bytes)
            images, label, key = [], None, sample
        extension = extension.lower()
        if extension.rpartition(".")[2] in IMAGE_EXTENSIONS:
            images.append(member)
        elif extension in ("cls", "json") and member.size <= MAX_SIDECAR_BYTES and not member.issparse():
            data = _read_member(member, file)
            text = data.decode(errors="replace").strip() if extension == "cls" else _label_in_json(data)
            label = label if text is None or len(text) > MAX_LABEL_CHARACTERS else text
    # A tar ends in two zero blocks; Python's reader takes the first header that is cut or damaged for the end.
    file.seek(archive.offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"neither a header nor the end mark at byte {archive.offset}; members are missing")
    yield from _found_in_tar(images, file, uri, label, max_bytes)


def _found_in_tar(
    members: list[tarfile.TarInfo], file: BinaryIO, uri: str, label: str | None, max_bytes: int
) -> Iterator[Found]:
    for member in members:
        if member.issparse():
            shown = _shown(member.name)
            problem = (RejectReason.UNREADABLE, f"{shown} is stored sparse, so its bytes are not in one piece")
            yield Found(uri, member.offset_data, 0, None, label, problem)
        elif member.size > max_bytes:
            problem = _too_many(member.size, max_bytes)
            yield Found(uri, member.offset_data, member.size, None, label, problem)
        else:
            yield Found(uri, member.offset_data, member.size, _read_member(member, file), label)


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
        return None  # a sidecar that is no JSON has no label; the image stands
    if isinstance(values, dict):
        for name in ("label", "cls", "class"):
            if isinstance(values.get(name), str | int):
                return str(values[name]).encode(errors="replace").decode()  # JSON may hold halves of characters
    return None


def _read_parquet(uri: str, image_column: str, label_column: str | None) -> Iterator[Found]:
    columns = [image_column] + ([label_column] if label_column else [])
    with paths.open_read(uri) as file:
        parquet = _open_parquet(file, uri, columns)
        row = 0
        for group in range(parquet.num_row_groups):
            table = _read_group(parquet, group, columns, uri)
            labels = _labels(table, label_column, uri) if label_column else [None] * table.num_rows
            for value, label in zip(_leaf(table, image_column), labels, strict=True):
                data = value.as_py()
                problem = None if data is not None else (RejectReason.EMPTY, "the image column is null")
                yield Found(f"{uri}#{image_column}", row, len(data or b""), data, label, problem)
                row += 1


def _labels(table: pa.Table, column: str, uri: str) -> list[str | None]:
    array = _leaf(table, column)
    if pa.types.is_dictionary(array.type):
        texts = _texts(array.dictionary, column, uri)
        return [None if index is None else texts[index] for index in array.indices.to_pylist()]
    return _texts(array, column, uri)


def _texts(array: pa.Array, column: str, uri: str) -> list[str | None]:
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        # Nothing has checked yet that text is UTF-8.
        binary = pa.large_binary() if pa.types.is_large_string(array.type) else pa.binary()
        texts = [None if value is None else value.decode(errors="replace") for value in array.cast(binary).to_pylist()]
    else:
        try:
            texts = [None if value is None else str(value) for value in array.to_pylist()]
        except (ValueError, OverflowError) as error:  # such as a date that Python does not know
            raise DamagedFileError(f"{uri}: column '{column}' cannot be read: {error}.") from None
    return [None if text is None or len(text) > MAX_LABEL_CHARACTERS else text for text in texts]


def _open_parquet(file: BinaryIO, uri: str, columns: list[str]) -> pq.ParquetFile:
    with _damage(f"{uri}: not a readable Parquet file"):
        parquet = pq.ParquetFile(file)
    leaves = {leaf.path: leaf for leaf in map(parquet.schema.column, range(len(parquet.schema)))}
    missing = [column for column in columns if column not in leaves]
    if missing:
        raise InputError(
            f"{uri}: no column {', '.join(missing)}. It has: {', '.join(leaves)}. Set image_column (and label_column)."
        )
    image = leaves[columns[0]]
    if (image.physical_type, image.logical_type.type) != ("BYTE_ARRAY", "NONE"):
        raise InputError(f"{uri}: column '{image.path}' holds no bytes ({image.physical_type}). Set image_column.")
    for column in columns:
        if leaves[column].max_repetition_level:
            raise InputError(f"{uri}: column '{column}' lies inside a list; one image and one label a row are read.")
    # One value of a dictionary can stand for any number of rows: 412 bytes of file for 10 GB (measured). Read as a
    # dictionary, a column takes what its pages unpack to.
    texts = [column for column in columns if leaves[column].physical_type == "BYTE_ARRAY"]
    sizes = (_unpacked(parquet, group, columns) for group in range(parquet.num_row_groups))
    if max(sizes, default=0) <= MAX_DICTIONARY_BYTES:
        parquet = pq.ParquetFile(file, metadata=parquet.metadata, read_dictionary=texts)
    return parquet


def _unpacked(parquet: pq.ParquetFile, group: int, columns: list[str]) -> int:
    """Bytes of the columns' pages in a row group, unpacked, as the file states them."""
    parts = parquet.metadata.row_group(group)
    chunks = [parts.column(index) for index in range(parts.num_columns)]
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema in columns)


def _read_group(parquet: pq.ParquetFile, group: int, columns: list[str], uri: str) -> pa.Table:
    with _damage(f"{uri}: row group {group} is not readable"):
        if (unpacked := _unpacked(parquet, group, columns)) > MAX_ROW_GROUP_BYTES:
            raise pa.ArrowInvalid(f"{unpacked} bytes unpacked, and {MAX_ROW_GROUP_BYTES} at most are read")
        return parquet.read_row_group(group, columns=columns)


@contextmanager
def _damage(what: str) -> Iterator[None]:
    """Turn what Arrow raises on a stranger's file into DamagedFileError; a disk or server that fails stays OSError."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:  # Arrow's own, of bytes that do not unpack, have none
            raise
        raise DamagedFileError(f"{what}: {error}. Write it again, or remove it from the source.") from None
    except pa.ArrowException as error:
        raise DamagedFileError(f"{what}: {error}. Write it again, or remove it from the source.") from None


def _leaf(table: pa.Table, column: str) -> pa.ChunkedArray:
    # Flattening a struct leaves a column with a dot in its name.
    first, *rest = [column] if column in table.column_names else column.split(".")
    array = table.column(first).combine_chunks()
    for name in rest:
        array = array.field(name)
    return array


def _extension(path: str) -> str:
    _, dot, extension = path.rpartition("/")[2].rpartition(".")
    return extension.lower() if dot else ""


class ReferenceReader:
    """Reads images by reference and checks that they are still what ingest saw.

    Keeps the last file open, because references of one shard mostly point into one tar or Parquet file.
    """

    def __init__(self) -> None:
        self._uri: str | None = None
        self._file: BinaryIO | None = None
        self._parquet: pq.ParquetFile | None = None
        self._column = ""
        self._group: tuple[int, int, Any] | None = None  # first row, end row, column of the row group at hand

    def read(self, uri: str, offset: int, length: int, expected_id: str) -> bytes:
        """The bytes of the image. Raises InputError when the file is gone or its bytes have changed."""
        try:
            if self._uri != uri:
                self.close()
                place = PARQUET_URI.fullmatch(uri)
                self._file, self._uri = paths.open_read(place["file"] if place else uri), uri
                if place:
                    self._column = place["column"]
                    self._parquet = _open_parquet(self._file, place["file"], [self._column])
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
        """Close the file at hand."""
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
                    table = _read_group(self._parquet, group, [self._column], self._uri)
                    self._group = (start, end, _leaf(table, self._column))
                    break
                start = end
            else:
                return b""
        assert self._group is not None
        return self._group[2][row - self._group[0]].as_py() or b""
