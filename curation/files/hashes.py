"""Content hashes: SHA-256 of bytes, of files and of JSON values, as 64 hex digits."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from curation.files import paths

# Bytes that are read and hashed at a time. Assumed.
READ_BYTES = 1 << 20


def sha256_of_bytes(data: bytes) -> str:
    """The SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: str) -> str:
    """The SHA-256 of a file's bytes. Raises FileNotFoundError."""
    return sha256_of_files([path])


def sha256_of_files(files: Iterable[str]) -> str:
    """The SHA-256 of the bytes of all files, one file after another. Raises FileNotFoundError."""
    hashed = hashlib.sha256()
    for path in files:
        with paths.open_read(path) as file:
            while block := file.read(READ_BYTES):
                hashed.update(block)
    return hashed.hexdigest()


def hash_json(value: Any) -> str:
    """The SHA-256 of `value` as canonical JSON: sorted keys, no spaces."""
    return sha256_of_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())
