"""Paths of any filesystem that fsspec knows, and atomic writes.

A path is local or an fsspec URL (`s3://`, `gs://`, `memory://`). A file appears under its final name when it is
complete, or not at all.
"""

import contextlib
import errno
import glob
import hashlib
import io
import os
import posixpath
import secrets
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, TypeVar, final

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from pydantic import BaseModel, ConfigDict

from curation.errors import ConfigError, InputError

TEMPORARY_PREFIX = ".tmp-"
# The empty file that shows whether an object store can be written.
PROBE_NAME = f"{TEMPORARY_PREFIX}probe"
# Bytes handed to the hashing thread at a time; as many again may wait. Assumed: hashing them takes milliseconds, and
# handing them over a hundredth of that.
HASHED_AT_ONCE = 1 << 20
# Seconds before each further attempt at a failed read. Assumed: a busy server or a full table of open files recovers
# within two seconds or not soon.
RETRY_WAITS = (0.1, 0.4, 1.6)
# Beside no such file, no permission and a folder (FileNotFoundError, PermissionError, IsADirectoryError).
_PERMANENT = frozenset({errno.ELOOP, errno.ENAMETOOLONG})

Result = TypeVar("Result")


def filesystem(path: str) -> tuple[AbstractFileSystem, str]:
    """The fsspec filesystem of `path` and the path inside it. Raises InputError where there is no such filesystem."""
    if "\0" in path:
        raise InputError(f"Cannot open {path!r}: a path holds no zero byte. Correct it.")
    protocol, mark, rest = path.partition("://")
    if not mark:  # file names of a crawl may contain '::', which fsspec would take for a chain of protocols
        return LocalFileSystem(), os.path.abspath(path)
    if mark not in rest:  # a URL may contain '::' too
        rest = rest.replace("::", "\0")
    try:
        fs, inner = fsspec.core.url_to_fs(protocol + mark + rest)
        return fs, inner.replace("\0", "::")
    except (ImportError, ValueError) as error:
        raise InputError(f"Cannot open '{path}': {error}. Install the fsspec driver of its protocol.") from None
    except Exception as error:  # some drivers connect, or open an archive, and have errors of their own
        raise InputError(f"Cannot open '{path}': {type(error).__name__}: {error}. Correct the path.") from None


def is_local(path: str) -> bool:
    """Whether `path` lies on a filesystem of this machine, including mounted network drives."""
    return isinstance(filesystem(path)[0], LocalFileSystem)


def join(folder: str, *names: str) -> str:
    """`folder` and `names` with single slashes between them; a protocol in front stays."""
    return posixpath.join(folder.rstrip("/") or "/", *names)


def exists(path: str) -> bool:
    """Whether there is a file or folder at `path`."""
    fs, inner = filesystem(path)
    return bool(fs.exists(inner))


def is_folder(path: str) -> bool:
    """Whether `path` is a folder."""
    fs, inner = filesystem(path)
    return bool(fs.isdir(inner))


def require_apart(output: str, inputs: Iterable[str], *, or_below: bool = False, or_above: bool = False) -> None:
    """Raise InputError where `output` is one of the `inputs`, by whatever links or relative forms.

    With `or_below` also where it lies below one of them, so that a later run would read it; with `or_above` also where
    one of them lies below it, for folders whose content a command may delete.
    """
    place = _true_place(output)
    for given in filter(None, inputs):
        if place == (input_place := _true_place(given)):
            raise InputError(f"--output '{output}' is the input '{given}', which would be lost. Give another --output.")
        if or_above and input_place.startswith(place.rstrip("/") + "/"):
            raise InputError(
                f"The input '{given}' lies below --output '{output}', where --replace would delete it. Give another "
                "--output."
            )
        if or_below and place.startswith(input_place.rstrip("/") + "/"):
            raise InputError(
                f"--output '{output}' lies below the input '{given}', so the next run would read it. Give another "
                "--output."
            )


def _true_place(path: str) -> str:
    """An absolute form of `path` without links, the same for all its forms."""
    fs, inner = filesystem(path)
    return os.path.realpath(inner) if isinstance(fs, LocalFileSystem) else str(fs.unstrip_protocol(inner)).rstrip("/")


def open_read(path: str) -> BinaryIO:
    """Open the file at `path` for reading bytes. Raises FileNotFoundError."""
    fs, inner = filesystem(path)
    return fs.open(inner, "rb")  # type: ignore[no-any-return]  # fsspec is untyped


def is_permanent(error: OSError) -> bool:
    """Whether a further attempt cannot help: no such file, no permission, a folder, a loop of links, too long a name.

    Object stores report 404 and 403 as the first two.
    """
    return isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError) or error.errno in _PERMANENT


def retried(operation: Callable[[], Result]) -> Result:
    """The result of `operation`, which is tried again after an error that may pass (RETRY_WAITS).

    Raises the last error, or at once an error that `is_permanent`.
    """
    for wait in RETRY_WAITS:
        try:
            return operation()
        except OSError as error:
            if is_permanent(error):
                raise
        except Exception as error:
            if not _is_server_error(error):
                raise
        time.sleep(wait)
    try:
        return operation()
    except Exception as error:
        if isinstance(error, OSError) or not _is_server_error(error):
            raise
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error


def _is_server_error(error: Exception) -> bool:
    """Whether a server answered that it cannot now. The drivers for HTTP and for Google raise no OSError then."""
    status = getattr(error, "status", None) or getattr(error, "code", None)
    return isinstance(status, int) and (status == 429 or 500 <= status < 600)


@final
class RetryingFile(io.RawIOBase):
    """A file for reading, opened anew where a read fails with an error that may pass (`retried`)."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._position = 0
        self._file: BinaryIO | None = None
        self._size = retried(lambda: self._opened().seek(0, os.SEEK_END))

    def _opened(self) -> BinaryIO:
        if self._file is None:
            self._file = open_read(self._path)
        return self._file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        data = retried(lambda: self._read_once(size))
        self._position += len(data)
        return data

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _read_once(self, size: int) -> bytes:
        file = self._opened()
        try:
            file.seek(self._position)
            return file.read(size)
        except Exception:
            self._file = None  # a handle whose server went away stays useless
            with contextlib.suppress(OSError):
                file.close()
            raise

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        super().close()


def read_bytes(path: str) -> bytes:
    """All bytes of the file at `path`. Raises FileNotFoundError."""
    with open_read(path) as file:
        return file.read()


def list_names(folder: str) -> list[str]:
    """The base names in `folder`, sorted; empty when there is no such folder."""
    fs, inner = filesystem(folder)
    fs.invalidate_cache()
    if not fs.isdir(inner):
        return []
    return sorted(posixpath.basename(str(entry).rstrip("/")) for entry in fs.ls(inner, detail=False))


def list_sizes(folder: str) -> dict[str, int]:
    """The size in bytes of each file in `folder`, by base name, from one listing; empty without such a folder."""
    fs, inner = filesystem(folder)
    fs.invalidate_cache()
    if not fs.isdir(inner):
        return {}
    entries = [entry for entry in fs.ls(inner, detail=True) if entry["type"] == "file"]
    return {posixpath.basename(str(entry["name"])): int(entry["size"]) for entry in entries}


def delete(path: str) -> None:
    """Delete the file or folder at `path` if there is one."""
    fs, inner = filesystem(path)
    if fs.exists(inner):
        # Filesystems other than the local one would take '*' or '[' in a name for a pattern.
        fs.rm(inner if isinstance(fs, LocalFileSystem) else glob.escape(inner), recursive=True)


@final
class RecordedPath(str):
    """The path of a file with the SHA-256 that the manifest of its stage records.

    The readers of `parquet` and `npy` compare the hash with the bytes that they read. Text made from it has no hash.
    """

    sha256: str

    def __new__(cls, path: str, sha256: str) -> "RecordedPath":
        recorded = super().__new__(cls, path)
        recorded.sha256 = sha256
        return recorded

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return RecordedPath, (str(self), self.sha256)  # workers check the hash as well


def check_hash(path: str, sha256: str) -> None:
    """Raise InputError where `path` is a RecordedPath whose file has another SHA-256 than `sha256`."""
    if isinstance(path, RecordedPath) and path.sha256 != sha256:
        raise InputError(
            f"{path}: damaged after it was written (its SHA-256 is {sha256}, and the manifest beside it says "
            f"{path.sha256}). Run the command that wrote it again with --replace, which does its damaged shards again."
        )


def require_writable(folder: str, *, unless: Sequence[str] = ()) -> None:
    """Raise ConfigError where no file can be written in `folder`, which is made where it is missing.

    Nothing is checked where every path of `unless` exists: there is nothing to write.
    """
    if not folder:  # an unset variable of a shell; it would be the working folder
        raise ConfigError("--output is empty. Give a folder.")
    try:
        if unless and all(map(exists, unless)):
            return
        fs, inner = filesystem(folder)
        if isinstance(fs, LocalFileSystem):
            os.makedirs(inner, exist_ok=True)
            with tempfile.TemporaryFile(dir=inner):  # without a name, so that a kill leaves nothing
                return
        write_bytes(probe := join(folder, PROBE_NAME), b"", durable=False)
        delete(probe)
    except InputError:
        raise
    except FileExistsError:
        raise ConfigError(f"'{folder}' is a file. Give a folder with --output.") from None
    except Exception as error:  # each driver of fsspec has errors of its own, for example for a refused connection
        reason = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"The output '{folder}' cannot be written: {reason}. Give another --output, or correct its permissions or "
            "its address."
        ) from None


def delete_temporary(folder: str) -> None:
    """Delete the temporary files that a killed writer left in `folder`, but not those in its subfolders."""
    for name in list_names(folder):
        if name.startswith(TEMPORARY_PREFIX):
            delete(join(folder, name))


class HashingFile(io.RawIOBase):
    """A write-only file that hashes and counts the bytes written. `sha256` and `size` are valid at any time.

    A thread hashes the bytes of a large file while later ones are written: on a processor without instructions for
    SHA-256, hashing takes longer than everything else in packing.
    """

    def __init__(self, target: BinaryIO) -> None:
        self._target = target
        self._hash = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1)  # the thread starts with the first block to hash
        self._hashing: Future[None] | None = None
        self._unhashed: list[bytes] = []
        self._unhashed_size = 0
        self.size = 0

    @property
    def sha256(self) -> str:
        """The SHA-256 of all bytes so far, as 64 hex digits."""
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
            # As one piece: after each update, the thread waits until this thread releases the interpreter lock.
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
    """A file to write, which takes the name `path` only when the block ends without an error.

    A local file is synced and renamed. With `durable` false it is not synced, and a power failure may lose it. On other
    filesystems the finished file is uploaded in one piece. An error or a kill leaves `path` as it was.
    """
    fs, inner = filesystem(path)
    folder, name = posixpath.split(inner)
    fs.makedirs(folder, exist_ok=True)
    if not isinstance(fs, LocalFileSystem):
        with tempfile.TemporaryFile() as file:  # without a name, so that a kill leaves nothing on this machine
            yield (writer := HashingFile(file))
            writer.flush()
            file.flush()
            file.seek(0)  # where /dev/fd duplicates the descriptor, reading starts at its position
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
    """Write `data` to `path` atomically; returns the record of the file."""
    with atomic_write(path, durable=durable) as file:
        file.write(data)
    return FileRecord(name=posixpath.basename(path), sha256=file.sha256, bytes=file.size, rows=0)


class FileRecord(BaseModel):
    """One file that a shard wrote."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    """The base name."""
    sha256: str
    """The hash of the file's bytes, as 64 hex digits."""
    bytes: int
    """The file's size."""
    rows: int
    """Rows of a table; 0 for other files."""
