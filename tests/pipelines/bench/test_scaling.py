"""The benchmarks of workers, tars and shards run, at a thousandth of their sizes. Times are not checked."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from curation.engine.manifest import done_shards, require_manifest
from pipelines.bench import scaling


def test_packing_has_a_row_for_each_size() -> None:
    rows = scaling.bench_packing(scale=500, repeats=1)
    assert [row.image_bytes for row in rows] == list(scaling.SIZES)
    assert all(row.elapsed.keys() == row.processor.keys() == scaling.WRITERS.keys() for row in rows)
    console = Console(file=io.StringIO(), width=150)
    console.print(scaling.packing_table(rows))
    assert isinstance(console.file, io.StringIO) and "TarWriter" in console.file.getvalue()


def test_shards_stop_before_the_last_and_resume_with_it(tmp_path: Path) -> None:
    scaling.shards(str(tmp_path), 7, "inline")
    assert len(done_shards(str(tmp_path / "tiny"))) == 6
    scaling.shards(str(tmp_path), 7, "inline")
    assert require_manifest(str(tmp_path / "tiny")).totals["images"] == 70


@pytest.mark.slow
def test_workers_do_all_images(tmp_path: Path) -> None:
    scaling.make(str(tmp_path), 32)
    seconds = scaling.stages(str(tmp_path), 2)
    assert seconds.keys() == {"ingest", "pack", "ingest processor", "pack processor"}
