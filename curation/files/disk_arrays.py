"""Arrays on the driver's disk, for data that does not fit in memory: one value for every image or pair.

The files have no name: the system deletes them with the last reference to them, also when the process is killed. They
lie in the folder for temporary files (the environment variable TMPDIR), which should be on a disk and not in memory.
"""

import os
import tempfile
from collections.abc import Iterator
from typing import final

import numpy as np
from numpy.typing import DTypeLike

# Elements of an array that are processed at once; memory holds a few dozen arrays of this length. Measured on the
# components of 50 million edges with 2 cores: a quarter of it is as fast, four times as many take 1.6 times as long.
BLOCK = 1 << 20


def blocks(length: int) -> Iterator[slice]:
    """Slices of at most `BLOCK` that cover `length` elements."""
    for start in range(0, length, BLOCK):
        yield slice(start, min(start + BLOCK, length))


def on_disk(length: int, dtype: DTypeLike, fill: float = 0) -> np.ndarray:
    """An array (length,) on disk, filled with `fill`. Zeros that are never overwritten take no space."""
    with tempfile.TemporaryFile(prefix="seedbed-") as file:
        mapped = np.memmap(file, dtype, "w+", shape=(max(length, 1),))  # an empty file cannot be mapped
    array = mapped[:length].view(np.ndarray)  # indexing the subclass would be slower
    if fill:
        for part in blocks(length):
            array[part] = fill
    return array


def count_true(values: np.ndarray) -> int:
    """The number of true values."""
    return int(np.count_nonzero(values))


@final
class Buckets:
    """Rows of one dtype on disk, added in any order and read bucket by bucket, each in the order of adding.

    A bucket must fit in memory. Memory also holds `BLOCK` rows, and 8 bytes a bucket for every `BLOCK` rows.
    """

    def __init__(self, num_buckets: int, dtype: DTypeLike) -> None:
        self.num_buckets = num_buckets
        self._dtype = np.dtype(dtype)
        self._file = tempfile.TemporaryFile(prefix="seedbed-")
        self._added: list[tuple[np.ndarray, np.ndarray]] = []  # not yet written: the bucket of each row, and the rows
        self._bounds: list[np.ndarray] = []  # for each block in the file: the first row of each bucket, and the end

    def add(self, bucket: np.ndarray, rows: np.ndarray) -> None:
        """Add rows (R,), each with its bucket (R,)."""
        self._added.append((bucket, rows))
        if sum(len(added) for _, added in self._added) >= BLOCK:
            self._write()

    def read(self, bucket: int) -> np.ndarray:
        """The rows of one bucket."""
        self._write()
        parts = [np.empty(0, self._dtype)]
        for bounds in self._bounds:
            start, stop = (int(bound) * self._dtype.itemsize for bound in bounds[bucket : bucket + 2])
            parts.append(np.frombuffer(os.pread(self._file.fileno(), stop - start, start), self._dtype))
        return np.concatenate(parts)

    def _write(self) -> None:
        if not self._added:
            return
        bucket, rows = (np.concatenate(column) for column in zip(*self._added, strict=True))
        self._added = []
        before = self._bounds[-1][-1] if self._bounds else 0
        counts = np.bincount(bucket, minlength=self.num_buckets)
        self._bounds.append(before + np.concatenate([[0], np.cumsum(counts)]))
        self._file.write(rows[np.argsort(bucket, kind="stable")].tobytes())
        self._file.flush()
