"""Where bytes live: fsspec paths and atomic writes.

A path is local or any fsspec URL (`s3://`, `gs://`, `memory://`). A file appears under its final name whole or not at
all.
"""

import contextlib
import glob
import hashlib
import io
import os
import posixpath
import secrets
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from pydantic import BaseModel, ConfigDict

from curation.errors import InputError

TEMPORARY_PREFIX = ".tmp-"
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


class FileRecord(BaseModel):
    """One file that a shard wrote."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    sha256: str
    bytes: int
    rows: int
