"""Parquet files are read without threads of Arrow, which could outlive the interpreter and lose the exit status."""

import subprocess
import sys
from pathlib import Path

import pyarrow as pa

from curation.files import parquet

COUNT_THREADS = """
import os, sys
from curation.files import parquet
from curation.images.sources import ReferenceReader
from curation.images.hashing import image_id
import pyarrow as pa

def threads():
    names = [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")]
    return sum("jemalloc" not in name for name in names)  # the allocator's, which hold no file

before, path = threads(), sys.argv[1]
schema = pa.schema([("number", pa.int32()), ("data", pa.binary())])
assert parquet.read_table(path, schema).num_rows == 1000
assert parquet.read_row_groups(path, "number", 0, schema).num_rows == 1000
assert ReferenceReader().read(f"{path}#data", 0, 1, image_id(b"x"), "parquet")
assert threads() == before, (before, threads())
sys.exit(2)
"""


def test_reading_starts_no_thread_so_that_the_exit_status_is_kept(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    columns = {"number": pa.array([0] * 1000, pa.int32()), "data": pa.array([b"x"] * 1000)}
    parquet.write_table(path, pa.table(columns))
    done = subprocess.run([sys.executable, "-c", COUNT_THREADS, path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
