"""The rows of a Parquet file with images, read in a separate process with limits on memory and processor time.

    this process                          the reading process (one per ParquetRows, started at the first file)
    ------------                          ----------------------------------------------------------------------
    column names       -- socket -->      opens the file: its footer, then one row group at a time
    bytes of the file  -- socket -->      (each as it asks for them; the process opens nothing itself)
    images, labels     <-- socket --

A Parquet file is untrusted input: a page of some kilobytes can unpack to gigabytes, whatever sizes the footer states.
The limit on memory follows the sizes that a row group states, and the number of its bytes in the file bounds these
sizes. A row group that needs more is damaged. So is one that crashes the process or takes too long.

The process is that of child_process.py. Later stages read a row group that this process has
read (`ReferenceReader`), so they need no more memory than it did.
"""

import contextlib
import itertools
import json
import os
import resource
import signal
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self, final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.errors import DamagedFileError, InputError, SeedbedError
from curation.files import parquet
from curation.images import child_process, sampling
from curation.images.child_process import ChildProcess
from curation.images.listing import MAX_LABEL_CHARACTERS

# Unpacked bytes of the image column in one row group, all in memory at once. Assumed: 1,000 images are some 0.1 GB.
MAX_ROW_GROUP_BYTES = 4 << 30
# The same where repeated values are stored once (a dictionary), which Arrow does up to 2 GiB.
MAX_DICTIONARY_BYTES = 1 << 30
# Memory of the reading process beside its start: a constant, and a multiple of a row group's unpacked bytes. Measured
# 2026-11 with 800 photographs of 1 MB in a row group: between 5 and 6 times (the pages, the column while it grows, and
# its dictionary). The constant is assumed.
MEMORY_BYTES = 512 << 20
MEMORY_PER_BYTE = 6
# Unpacked bytes for each byte of a row group in the file. Assumed: blank bitmaps shrink by more, photographs by 20 at
# most. A row group that states more gets the memory of this ratio.
MAX_EXPANSION = 100
# Processor time for the footer, and for each row group. Assumed: 4 GiB are unpacked in some 20 seconds.
GROUP_SECONDS = 300.0
# Bytes of the file that are sent at a time.
READ_BYTES = 4 << 20

_COMMAND = "from curation.images import parquet_rows; parquet_rows.serve()"
_READY = b"ready"
# Characters of untrusted names in a message.
_MAX_SHOWN = 500


class ImageRow(NamedTuple):
    """The image of one row; `data` is None for an image of more than `max_bytes`."""

    row: int
    length: int
    data: bytes | None
    label: str | None


class NullRows(NamedTuple):
    """All rows of a file without an image: their number, the first of them, and the number of all rows."""

    num_nulls: int
    first: int
    num_rows: int


class SkippedRows(NamedTuple):
    """The number of rows that the sample leaves out."""

    num_rows: int


class RowCounts(NamedTuple):
    """The numbers in the footer of a Parquet file."""

    num_rows: int
    num_nulls: int
    """Rows without an image, where the statistics of the file count them; the other nulls are unknown."""
    num_bytes: int
    """Bytes of the column of images in the file."""


class _ReadingProcess(NamedTuple):
    child: ChildProcess
    connection: "Connection[bytes, bytes]"


@final
class ParquetRows:
    """Reads untrusted Parquet files in a separate process, one after another. A context manager; else call `close`."""

    def __init__(self) -> None:
        self._reader: _ReadingProcess | None = None

    def read(
        self,
        file: BinaryIO,
        uri: str,
        image_column: str,
        label_column: str | None,
        *,
        max_bytes: int,
        sample: tuple[float, str, str] | None = None,
    ) -> Iterator[ImageRow | NullRows | SkippedRows]:
        """The images of `file` in the order of its rows, then the rows that are not chosen, and those without one.

        sample: the share, the source and the path that choose rows (sampling.py); None for all rows. A row group
        without a chosen row is not read. Only chosen rows count as rows without an image.

        Raises DamagedFileError, whose message names `uri`, where the file cannot be read further; InputError for a
        column that is missing or holds no bytes; OSError when the bytes of the file cannot be read.
        """
        request = {"label_column": label_column, "max_bytes": max_bytes, "sample": sample}
        with contextlib.closing(self._answers(file, uri, {"image_column": image_column, **request})) as answers:
            for answer, connection in answers:
                match answer:
                    case ["row", row, length, label]:
                        yield ImageRow(row, length, connection.recv_bytes() if length <= max_bytes else None, label)
                    case ["end", num_nulls, first, num_rows, num_skipped]:
                        if num_skipped:
                            yield SkippedRows(num_skipped)
                        if num_nulls:
                            yield NullRows(num_nulls, first, num_rows)

    def count(self, file: BinaryIO, uri: str, image_column: str) -> RowCounts:
        """The numbers in the footer of `file`. Raises as `read` does."""
        ((answer, _),) = self._answers(file, uri, {"image_column": image_column, "only_count": True})
        return RowCounts(*answer[1:])

    def _answers(
        self, file: BinaryIO, uri: str, request: dict[str, Any]
    ) -> "Generator[tuple[list[Any], Connection[bytes, bytes]], None, None]":
        """The answers of the reading process to a request, which it gives while it reads `file`; "end" is the last."""
        if self._reader is None:
            self._reader = _start()
        connection, done = self._reader.connection, False
        try:
            _send(connection, {"uri": uri, "size": file.seek(0, os.SEEK_END), **request})
            while not done:
                match json.loads(connection.recv_bytes()):
                    case ["read", offset, size]:
                        file.seek(offset)
                        connection.send_bytes(file.read(size))
                    case ["row", *_] as answer:
                        yield answer, connection
                    case ["end", *_] as answer:
                        done = True
                        yield answer, connection
                    case ["damaged", text]:
                        done = True
                        raise DamagedFileError(text)
                    case ["input", text]:
                        done = True
                        raise InputError(text)
        except (EOFError, ConnectionError):
            reader, self._reader = self._reader, None
            raise _error_of_death(reader, uri) from None
        finally:
            if not done:  # an unread answer must not be mistaken for one about the next file
                self.close()

    def close(self) -> None:
        """Ends the reading process. The next `read` starts another."""
        if self._reader is not None:
            _end(self._reader)
            self._reader = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _start() -> _ReadingProcess:
    """Starts a reading process and waits until it is ready. Raises SeedbedError if it does not start."""
    # Memory that this pool frees returns to the system, so that the limit counts the memory in use.
    child = child_process.start(_COMMAND, ARROW_DEFAULT_MEMORY_POOL="system")
    reader = _ReadingProcess(child, Connection(child.channel.detach()))
    try:
        ready = reader.connection.recv_bytes()
    except (EOFError, ConnectionError):
        status, text = _end(reader)
        raise SeedbedError(f"The process that reads Parquet did not start (status {status}): {text}") from None
    assert ready == _READY
    return reader


def _end(reader: _ReadingProcess) -> tuple[int, str]:
    reader.connection.close()
    return child_process.end(reader.child)


def _error_of_death(reader: _ReadingProcess, uri: str) -> SeedbedError:
    """The error for a process that has ended by itself."""
    reader.child.process.wait()  # the process is ending already; without the wait, the status could be that of our kill
    status, last_line = _end(reader)
    if status == -signal.SIGKILL:  # not by the file
        return SeedbedError(f"{uri}: the system killed the process that reads it. Free some memory, and start again.")
    if status == -signal.SIGPROF:
        cause = f"it takes more than {GROUP_SECONDS:g} s of processor time"
    else:
        name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        cause = f"its reader ended with {name}: {last_line}" if last_line else f"its reader ended with {name}"
    return DamagedFileError(f"{uri}: not a readable Parquet file: {cause}. {_REMEDY}")


def _send(connection: "Connection[bytes, bytes]", message: object) -> None:
    connection.send_bytes(json.dumps(message).encode())


# In the reading process


def serve() -> None:
    """Runs as the reading process: sends the rows of one file after another until the parent closes."""
    connection: Connection[bytes, bytes] = Connection(os.dup(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process when its timer runs out, even inside C code
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    at_start = child_process.address_space()
    connection.send_bytes(_READY)
    while True:
        try:
            request = json.loads(connection.recv_bytes())
            send = _send_counts if request.pop("only_count", False) else _send_rows
            send(connection, at_start, **request)
        except (EOFError, ConnectionError):
            return
        except DamagedFileError as error:
            _send(connection, ["damaged", str(error)])
        except InputError as error:
            _send(connection, ["input", str(error)])


def _send_rows(
    connection: "Connection[bytes, bytes]",
    at_start: int,
    uri: str,
    size: int,
    image_column: str,
    label_column: str | None,
    max_bytes: int,
    sample: tuple[float, str, str] | None,
) -> None:
    columns = [image_column] + ([label_column] if label_column else [])
    num_nulls, first_null, start, num_skipped = 0, -1, 0, 0
    with _limits(at_start, MEMORY_BYTES, f"{uri}: not a readable Parquet file"):
        opened = open_images(_RemoteFile(connection, size), uri, columns)
    for group in range(opened.num_row_groups):
        num_rows = opened.metadata.row_group(group).num_rows
        is_chosen = np.ones(num_rows, bool)
        if sample is not None:
            is_chosen = np.fromiter((sampling.is_chosen(*sample, start + row) for row in range(num_rows)), bool)
            num_skipped += num_rows - int(is_chosen.sum())
            if not is_chosen.any():
                start += num_rows
                continue
        memory = MEMORY_BYTES + MEMORY_PER_BYTE * min(*_sizes(opened, group, columns, size))
        with _limits(at_start, memory, f"{uri}: row group {group} is not readable"):
            table = read_group(opened, group, columns, uri)
            array = column_of(table, image_column)
            labels = _labels(table, label_column, uri) if label_column else None
            is_absent = array.is_null().to_numpy(zero_copy_only=False)
        is_null = is_absent & is_chosen
        if is_null.any():
            first_null = start + int(is_null.argmax()) if first_null < 0 else first_null
            num_nulls += int(is_null.sum())
        for index in (~is_absent & is_chosen).nonzero()[0].tolist():
            scalar = array[index]
            data = (scalar.value if pa.types.is_dictionary(array.type) else scalar).as_buffer()
            _send(connection, ["row", start + index, data.size, labels[index] if labels else None])
            if data.size <= max_bytes:
                connection.send_bytes(data)
        start += num_rows
        del table, array, labels
    _send(connection, ["end", num_nulls, first_null, start - num_skipped, num_skipped])


def _send_counts(connection: "Connection[bytes, bytes]", at_start: int, uri: str, size: int, image_column: str) -> None:
    with _limits(at_start, MEMORY_BYTES, f"{uri}: not a readable Parquet file"):
        opened = open_images(_RemoteFile(connection, size), uri, [image_column])
        groups = range(opened.num_row_groups)
        statistics = [chunk.statistics for group in groups for chunk in _chunks(opened, group, [image_column])]
        num_nulls = sum(each.null_count for each in statistics if each is not None and each.has_null_count)
        num_bytes = sum(packed_bytes(opened, group, [image_column]) for group in groups)
    _send(connection, ["end", opened.metadata.num_rows, num_nulls, num_bytes])


def _sizes(opened: pq.ParquetFile, group: int, columns: list[str], size: int) -> tuple[int, int]:
    """Unpacked bytes of a row group as its footer states them, and as its bytes in the file allow them."""
    return unpacked_bytes(opened, group, columns), MAX_EXPANSION * min(packed_bytes(opened, group, columns), size)


@contextmanager
def _limits(at_start: int, growth: int, message: str) -> Iterator[None]:
    """Limits on memory (`growth` bytes beyond `at_start`) and processor time. Raises DamagedFileError for memory."""
    address_space = at_start + growth
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if at_start and (hard == resource.RLIM_INFINITY or address_space < hard):
        resource.setrlimit(resource.RLIMIT_AS, (address_space, hard))
    signal.setitimer(signal.ITIMER_PROF, GROUP_SECONDS)
    try:
        yield
    except MemoryError:
        raise DamagedFileError(
            f"{message}: it needs more memory than the sizes in its footer allow, {growth} bytes. {_REMEDY}"
        ) from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class _RemoteFile:
    """The file that the parent has open, for Arrow: read, seek and tell."""

    closed = False

    def __init__(self, connection: "Connection[bytes, bytes]", size: int) -> None:
        self._connection, self._size, self._position = connection, size, 0

    def read(self, size: int | None = None) -> bytearray:
        left = max(0, self._size - self._position)
        size = left if size is None or size < 0 else min(size, left)
        data, count = bytearray(size), 0
        while count < size:
            _send(self._connection, ["read", self._position + count, min(size - count, READ_BYTES)])
            part = self._connection.recv_bytes_into(data, count)
            if not part:
                break  # the file has become shorter
            count += part
        del data[count:]
        self._position += count
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        """Nothing to do: the parent closes the file."""


# In both processes

_REMEDY = "Write it again, or remove it from the source."


def open_images(file: Any, uri: str, columns: list[str]) -> pq.ParquetFile:
    """A reader of a Parquet file whose first column is that of the images.

    Raises DamagedFileError, or InputError for a missing column and for a column of images that holds no bytes.
    """
    with _damage(f"{uri}: not a readable Parquet file"):
        opened = parquet.open_file(file)
    leaves = {leaf.path: leaf for leaf in map(opened.schema.column, range(len(opened.schema)))}
    missing = [column for column in columns if column not in leaves]
    if missing:
        raise InputError(
            f"{uri}: no column {', '.join(missing)}. It has: {_listed(leaves)}. Set image_column (and label_column)."
        )
    image = leaves[columns[0]]
    if str(image.logical_type) == "Null":  # as pandas writes a column without any value
        return opened
    if (image.physical_type, image.logical_type.type) != ("BYTE_ARRAY", "NONE"):
        raise InputError(f"{uri}: column '{image.path}' holds no bytes ({image.physical_type}). Set image_column.")
    for column in columns:
        if leaves[column].max_repetition_level:
            raise InputError(f"{uri}: column '{column}' lies inside a list; one image and one label a row are read.")
    with _damage(f"{uri}: not a readable Parquet file"):
        _check_rows(opened, columns)
    # One value of a dictionary can represent any number of rows: a file of 412 bytes for 10 GB (measured). A column
    # that is read as a dictionary takes only the memory of its unpacked pages.
    texts = [
        column
        for column in columns
        if leaves[column].physical_type == "BYTE_ARRAY" and not _has_delta_encoding(opened, column)
    ]
    sizes = (unpacked_bytes(opened, group, columns) for group in range(opened.num_row_groups))
    if max(sizes, default=0) <= MAX_DICTIONARY_BYTES:
        opened = parquet.open_file(file, metadata=opened.metadata, read_dictionary=texts)
    return opened


def _has_delta_encoding(opened: pq.ParquetFile, column: str) -> bool:
    """Whether a chunk is encoded as differences of lengths or prefixes, which Arrow cannot read as a dictionary."""
    groups = range(opened.num_row_groups)
    chunks = itertools.chain.from_iterable(_chunks(opened, group, [column]) for group in groups)
    return any(encoding.startswith("DELTA_") for chunk in chunks for encoding in chunk.encodings)


def _check_rows(opened: pq.ParquetFile, columns: list[str]) -> None:
    """Raises ArrowInvalid where the numbers of rows in the footer disagree, since rows would be missing in silence."""
    groups = [opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)]
    if sum(groups) != opened.metadata.num_rows:
        raise pa.ArrowInvalid(f"its row groups have {sum(groups)} rows, and it states {opened.metadata.num_rows}")
    for group, num_rows in enumerate(groups):
        for chunk in _chunks(opened, group, columns):
            if chunk.num_values != num_rows:
                column = f"its column {chunk.path_in_schema} {chunk.num_values}"
                raise pa.ArrowInvalid(f"row group {group} has {num_rows} rows, and {column}")


def unpacked_bytes(opened: pq.ParquetFile, group: int, columns: list[str]) -> int:
    """Unpacked bytes of the columns' pages in a row group, as the footer states them."""
    return sum(chunk.total_uncompressed_size for chunk in _chunks(opened, group, columns))


def packed_bytes(opened: pq.ParquetFile, group: int, columns: list[str]) -> int:
    """Bytes of the columns' pages of a row group in the file, as the footer states them."""
    return sum(chunk.total_compressed_size for chunk in _chunks(opened, group, columns))


def _chunks(opened: pq.ParquetFile, group: int, columns: list[str]) -> list[Any]:
    parts = opened.metadata.row_group(group)
    chunks = [parts.column(index) for index in range(parts.num_columns)]
    return [chunk for chunk in chunks if chunk.path_in_schema in columns]


def read_group(opened: pq.ParquetFile, group: int, columns: list[str], uri: str) -> pa.Table:
    """The columns of a row group, in memory. Raises DamagedFileError."""
    with _damage(f"{uri}: row group {group} is not readable"):
        if (unpacked := unpacked_bytes(opened, group, columns)) > MAX_ROW_GROUP_BYTES:
            raise pa.ArrowInvalid(f"{unpacked} bytes unpacked, and {MAX_ROW_GROUP_BYTES} at most are read")
        table = opened.read_row_group(group, columns=columns, use_threads=False)  # as in files/parquet.py
        if table.num_rows != (num_rows := opened.metadata.row_group(group).num_rows):
            raise pa.ArrowInvalid(f"{table.num_rows} rows, and the footer states {num_rows}")
        return table


@contextmanager
def _damage(message: str) -> Iterator[None]:
    """Turns Arrow's errors about an untrusted file into DamagedFileError; a failing disk or server stays OSError."""
    try:
        yield
    except MemoryError:  # also an error of Arrow
        raise
    except OSError as error:
        if error.errno is not None:  # Arrow's errors about bytes that do not unpack have no number
            raise
        raise DamagedFileError(f"{message}: {error}. {_REMEDY}") from None
    except pa.ArrowException as error:
        raise DamagedFileError(f"{message}: {error}. {_REMEDY}") from None


def column_of(table: pa.Table, column: str) -> Any:
    """A column by its dotted path, as one array."""
    # A flattened struct has columns with a dot in their name.
    first, *rest = [column] if column in table.column_names else column.split(".")
    array = table.column(first).combine_chunks()
    for name in rest:
        array = array.field(name)
    return array


def _listed(names: Iterable[str]) -> str:
    """The first of some untrusted names, for a message."""
    text = ", ".join(names)
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."


def _labels(table: pa.Table, column: str, uri: str) -> list[str | None]:
    array = column_of(table, column)
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
