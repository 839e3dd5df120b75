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
from collections.abc import Iterator, Sequence
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
# Characters of a label; a longer text gives no label. Assumed.
MAX_LABEL_CHARACTERS = 1_000
# Images of one sample in a tar, kept in memory until its label is known. Assumed; further images start a new sample.
MAX_IMAGES_IN_SAMPLE = 10_000
# Unpacked bytes of the image column in one row group, all in memory at once. Assumed: 1,000 images are some 0.1 GB.
MAX_ROW_GROUP_BYTES = 4 << 30
# The same where repeated values are stored once (a dictionary), which Arrow does up to 2 GiB.
MAX_DICTIONARY_BYTES = 1 << 30
# Characters of an untrusted name in a message.
_MAX_SHOWN = 200
_MANY_DIGITS = re.compile(rb"\d{%d}" % (MAX_DIGITS + 1))

# The `uri` of an image in a Parquet file: the file, and the column of its images; the `offset` is then the row.
PARQUET_URI = re.compile(r"(?P<file>.+\.parquet)#(?P<column>.+)", re.IGNORECASE | re.DOTALL)


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


def require_sources(sources: Sequence[SourceConfig]) -> None:
    """Raise InputError with a line for each source that has nothing at its path. No folder is listed."""
    problems = []
    for source in sources:
        try:
            is_there = paths.exists(source.path)
        except InputError:
            raise
        except Exception as error:  # each driver of fsspec has errors of its own, for example for a refused connection
            problems.append(f"source '{source.name}': cannot read '{source.path}': {type(error).__name__}: {error}.")
            continue
        if not is_there:
            problems.append(
                f"source '{source.name}': there is nothing at '{source.path}'. Correct its path in the config."
            )
    if problems:
        raise InputError("\n".join(problems))


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

    An image of a folder or a tar with more than `max_bytes` is not read. A tar or Parquet file that cannot be read to
    its end gives the images before the damage, and then one item with the problem. Raises InputError for a column that
    is missing or holds no bytes.
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
                    yield from _read_parquet(uri, source.image_column, source.label_column)
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


def _read_parquet(uri: str, image_column: str, label_column: str | None) -> Iterator[SourceItem]:
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
                yield SourceItem(f"{uri}#{image_column}", row, len(data or b""), data, label, problem)
                row += 1


def _labels(table: pa.Table, column: str, uri: str) -> list[str | None]:
    array = _leaf(table, column)
    if pa.types.is_dictionary(array.type):
        texts = _texts(array.dictionary, column, uri)
        return [None if index is None else texts[index] for index in array.indices.to_pylist()]
    return _texts(array, column, uri)


def _texts(array: pa.Array, column: str, uri: str) -> list[str | None]:
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        # The text may be invalid UTF-8: Parquet readers do not check it.
        binary = pa.large_binary() if pa.types.is_large_string(array.type) else pa.binary()
        texts = [None if value is None else value.decode(errors="replace") for value in array.cast(binary).to_pylist()]
    else:
        try:
            texts = [None if value is None else str(value) for value in array.to_pylist()]
        except (ValueError, OverflowError) as error:  # such as a date beyond Python's range
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
    # One value of a dictionary can represent any number of rows: a file of 412 bytes for 10 GB (measured). A column
    # that is read as a dictionary takes only the memory of its unpacked pages.
    texts = [column for column in columns if leaves[column].physical_type == "BYTE_ARRAY"]
    sizes = (_unpacked(parquet, group, columns) for group in range(parquet.num_row_groups))
    if max(sizes, default=0) <= MAX_DICTIONARY_BYTES:
        parquet = pq.ParquetFile(file, metadata=parquet.metadata, read_dictionary=texts)
    return parquet


def _unpacked(parquet: pq.ParquetFile, group: int, columns: list[str]) -> int:
    """Unpacked bytes of the columns' pages in a row group, as the file states them."""
    parts = parquet.metadata.row_group(group)
    chunks = [parts.column(index) for index in range(parts.num_columns)]
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema in columns)


def _read_group(parquet: pq.ParquetFile, group: int, columns: list[str], uri: str) -> pa.Table:
    with _damage(f"{uri}: row group {group} is not readable"):
        if (unpacked := _unpacked(parquet, group, columns)) > MAX_ROW_GROUP_BYTES:
            raise pa.ArrowInvalid(f"{unpacked} bytes unpacked, and {MAX_ROW_GROUP_BYTES} at most are read")
        return parquet.read_row_group(group, columns=columns)


@contextmanager
def _damage(message: str) -> Iterator[None]:
    """Turns Arrow's errors about an untrusted file into DamagedFileError; a failing disk or server stays OSError."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:  # Arrow's errors about bytes that do not unpack have no number
            raise
        raise DamagedFileError(f"{message}: {error}. Write it again, or remove it from the source.") from None
    except pa.ArrowException as error:
        raise DamagedFileError(f"{message}: {error}. Write it again, or remove it from the source.") from None


def _leaf(table: pa.Table, column: str) -> pa.ChunkedArray:
    # A flattened struct has columns with a dot in their name.
    first, *rest = [column] if column in table.column_names else column.split(".")
    array = table.column(first).combine_chunks()
    for name in rest:
        array = array.field(name)
    return array


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

    def read(self, uri: str, offset: int, length: int, expected_id: str) -> bytes:
        """The bytes of the image. Raises InputError when the file is missing or its bytes have changed."""
        try:
            if self._uri != uri:
                self.close()
                in_parquet = PARQUET_URI.fullmatch(uri)
                self._file, self._uri = paths.open_read(in_parquet["file"] if in_parquet else uri), uri
                if in_parquet:
                    self._column = in_parquet["column"]
                    self._parquet = _open_parquet(self._file, in_parquet["file"], [self._column])
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
                    table = _read_group(self._parquet, group, [self._column], self._uri)
                    self._group = (start, end, _leaf(table, self._column))
                    break
                start = end
            else:
                return b""
        assert self._group is not None
        return self._group[2][row - self._group[0]].as_py() or b""
