"""Arrays in NumPy's `.npy` format: written atomically, read without pickles."""

import math
import os
import posixpath
import tokenize
from typing import BinaryIO

import numpy as np

from curation.files import paths
from curation.files.hashes import sha256_of_file
from curation.files.paths import FileRecord, RecordedPath, check_hash


def write_arrays(path: str, *arrays: np.ndarray) -> FileRecord:
    """Write arrays to one file, one behind the other; returns the record of the file. `numpy.load` reads the first."""
    with paths.atomic_write(path) as file:
        for array in arrays:
            np.lib.format.write_array(file, array, allow_pickle=False)
    return FileRecord(name=posixpath.basename(path), sha256=file.sha256, bytes=file.size, rows=0)


def read_arrays(path: str, count: int) -> list[np.ndarray]:
    """The first `count` arrays of a file. Raises InputError where the hash of a RecordedPath differs."""
    if isinstance(path, RecordedPath):
        check_hash(path, sha256_of_file(path))
    with paths.open_read(path) as file:
        return [np.lib.format.read_array(file, allow_pickle=False) for _ in range(count)]


def read_array(path: str) -> np.ndarray:
    """The first array of a file."""
    return read_arrays(path, 1)[0]


def num_rows(path: str) -> int:
    """The length of the first array of a file, from its header."""
    with paths.open_read(path) as file:
        return int(read_header(file)[0][0])


def read_rows(path: str, rows: np.ndarray) -> np.ndarray:
    """The given rows of the first array of a file, which is stored row by row. Only they are read."""
    if paths.is_local(path):
        chosen: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)[rows]
        return chosen
    with paths.open_read(path) as file:
        shape, _, dtype = read_header(file)
        start = file.tell()
    length = dtype.itemsize * math.prod(shape[1:])
    fs, inner = paths.filesystem(path)
    offsets = (start + rows.astype(np.int64) * length).tolist()
    pieces = paths.retried(
        lambda: fs.cat_ranges([inner] * len(offsets), offsets, [offset + length for offset in offsets])
    )
    return np.frombuffer(b"".join(pieces), dtype).reshape(len(rows), *shape[1:])


def read_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """The shape of the next array in `file`, whether it is stored column by column, and its dtype.

    Afterwards `file` stands at the array's first value. Raises ValueError for no array, and for an impossible shape.
    """
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"format version {version[0]}.{version[1]} is unknown")
    try:
        shape, by_column, dtype = readers[version](file)
    except (SyntaxError, tokenize.TokenError) as error:  # NumPy's parser of damaged headers
        raise ValueError(f"its header cannot be parsed: {error}") from None
    position = file.tell()
    num_bytes = file.seek(0, os.SEEK_END) - position
    file.seek(position)
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > num_bytes:
        raise ValueError(f"its header states the shape {shape}, and {num_bytes:,} bytes follow")
    return shape, by_column, dtype
