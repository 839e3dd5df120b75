"""Arrays on disk behave as arrays in memory, and leave no files behind."""

import contextlib
import gc
import os
from pathlib import Path

import numpy as np
import pytest

from curation.files import disk_arrays
from curation.files.disk_arrays import Buckets, blocks, count_true, on_disk

ROW = np.dtype([("image_id", "S16"), ("row", np.int64)])


@pytest.mark.parametrize("length", [0, 1, 9, 10, 11, 35])
def test_blocks_cover_everything_once(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_arrays, "BLOCK", 10)
    parts = list(blocks(length))
    assert [n for part in parts for n in range(part.start, part.stop)] == list(range(length))
    assert all(0 < part.stop - part.start <= 10 for part in parts)


@pytest.mark.parametrize("length", [0, 1, 25])
def test_arrays_are_filled_and_can_be_written(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_arrays, "BLOCK", 10)
    assert on_disk(length, np.int32).tolist() == [0] * length
    assert on_disk(length, bool, fill=True).all()
    assert np.isnan(on_disk(length, np.float32, fill=np.nan)).all()
    array = on_disk(length, np.int64, fill=-1)
    assert array.shape == (length,) and array.dtype == np.int64 and type(array) is np.ndarray
    array[:] = np.arange(length)
    assert array[::-1].tolist() == list(range(length))[::-1]
    assert count_true(array > 20) == max(length - 21, 0)


def test_no_file_has_a_name_and_none_stays_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def open_files() -> list[str]:  # of this process in tmp_path; files of earlier tests may be closed meanwhile
        links = []
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):
                links.append(os.readlink(f"/proc/self/fd/{name}"))
        return [link for link in links if link.startswith(str(tmp_path))]

    array, buckets = on_disk(10, np.int64), Buckets(2, ROW)
    buckets.add(np.zeros(3, np.int64), np.zeros(3, ROW))
    assert len(buckets.read(0)) == 3
    assert list(tmp_path.iterdir()) == [] and open_files()
    del array, buckets
    gc.collect()
    assert open_files() == []


@pytest.mark.parametrize("seed", range(6))
def test_buckets_return_their_rows_in_the_order_of_adding(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_arrays, "BLOCK", 20)
    rng = np.random.default_rng(seed)
    num_buckets = int(rng.integers(1, 5))
    buckets, added = Buckets(num_buckets, ROW), []
    for _ in range(int(rng.integers(0, 12))):
        count = int(rng.integers(0, 30))
        rows = np.empty(count, ROW)
        rows["image_id"] = rng.integers(0, 256, (count, 16), dtype=np.uint8).view("S16").reshape(-1)
        rows["row"] = np.arange(count)
        bucket = rng.integers(0, num_buckets, count)
        buckets.add(bucket, rows)
        added += list(zip(bucket.tolist(), rows.tolist(), strict=True))
        if rng.random() < 0.2:  # reading between additions changes nothing
            buckets.read(0)
    for number in range(num_buckets):
        assert buckets.read(number).tolist() == [row for bucket, row in added if bucket == number]
