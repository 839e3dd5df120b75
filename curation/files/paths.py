"""Paths of any filesystem that fsspec knows, and atomic writes.

A path is local or an fsspec URL (`s3://`, `gs://`, `memory://`). A file appears under its final name when it is
complete, or not at all.
"""

import contextlib
import glob
import hashlib
import io
import os
import posixpath
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO

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


def filesystem(path: str) -> tuple[AbstractFileSystem, str]:
    """The fsspec filesystem of `path` and the path inside it. Raises InputError for an unknown protocol."""
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


def open_read(path: str) -> BinaryIO:
    """Open the file at `path` for reading bytes. Raises FileNotFoundError."""
    fs, inner = filesystem(path)
    return fs.open(inner, "rb")  # type: ignore[no-any-return]  # fsspec is untyped


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


def delete(path: str) -> None:
    """Delete the file or folder at `path` if there is one."""
    fs, inner = filesystem(path)
    if fs.exists(inner):
        # Filesystems other than the local one would take '*' or '[' in a name for a pattern.
        fs.rm(inner if isinstance(fs, LocalFileSystem) else glob.escape(inner), recursive=True)


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
