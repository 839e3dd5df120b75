"""Files of a finished run that change afterwards: the stage that reads them says so, and --replace repairs them."""

import io
import os
import shutil
import time
from pathlib import Path

import pytest
from PIL import Image

from curation import embed, ingest
from curation.config import load
from curation.engine.runner import InlineRunner
from curation.errors import InputError
from curation.run_folder import STAGES, RunFolder
from pipelines import main_path
from pipelines.main_path import CurateConfig
from tests.pipelines.test_curate import CONFIG, drawing, save

MORE = """
[retrieve.clustering]
num_images = 6
[pairs.verification]
"""
# A kind of file of each stage that a later stage or the report reads.
READ_LATER = [
    ("ingest", "images-"),
    ("embed", "vectors-"),
    ("describe", "vectors-"),
    ("describe", "thumbnails-"),
    ("pairs", "pairs-"),
    ("self_check", "scores-"),
    ("self_check", "known-"),
    ("dedup", "duplicates-"),
    ("cluster", "centroids-"),
    ("cluster", "parents-"),
    ("cluster", "assignments-"),
    ("retrieve", "retrieved-"),
    ("corpus", "corpus-00000.parquet"),
    ("images", "images-"),
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> CurateConfig:
    home = tmp_path_factory.mktemp("home")
    for kind, folder in (("discs", "seeds/discs"), ("stripes", "seeds/stripes"), ("scribbles", "holdout")):
        for number in range(6):
            save(drawing(kind, number), home / folder / f"{number}.png")
    for kind in ("discs", "stripes"):
        for number in range(20, 26):
            save(drawing(kind, number), home / f"pool/{kind}/{number}.png")
    text = CONFIG.replace("num_clusters = 4", "num_clusters = 4\n[[cluster.levels]]\nnum_clusters = 2")
    for source in ("seeds/discs", "seeds/stripes", "holdout", "pool"):
        text = text.replace(f'path = "{source}"', f'path = "{home / source}"')
    text = text.replace("holdout_threshold = 0.95", "holdout_threshold = 0.9")  # the highest with verification
    (home / "config.toml").write_text(text + MORE)
    return load(CurateConfig, str(home / "config.toml"))


@pytest.fixture(scope="module")
def whole(config: CurateConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    output = tmp_path_factory.mktemp("whole")
    main_path.run(config, str(output), InlineRunner())
    return output


@pytest.fixture
def output(whole: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(("stage", "kind"), READ_LATER)
def test_the_stage_that_reads_changed_bytes_names_the_file(
    config: CurateConfig, output: Path, stage: str, kind: str
) -> None:
    for file in (output / stage).glob(f"{kind}*"):  # the thumbnails of images without candidates are not read
        flip_a_bit(file)
    for later in STAGES[STAGES.index(stage) + 1 :]:
        shutil.rmtree(output / later)
    (output / "report.html").unlink()
    with pytest.raises(InputError, match=rf"{stage}/{kind}.*: damaged after it was written.*--replace"):
        main_path.run(config, str(output), InlineRunner())


def test_replace_repairs_what_a_bit_and_what_a_deletion_spoiled(
    config: CurateConfig, whole: Path, output: Path
) -> None:
    flip_a_bit(output / "embed/vectors-00001.parquet")
    flip_a_bit(output / "corpus/corpus-000000.tar")
    (output / "cluster/centroids-0.npy").unlink()
    (output / "pairs/pairs-00000.parquet").write_bytes(b"")
    with pytest.raises(InputError, match=r"pairs: damaged.*pairs-00000\.parquet has 0 bytes.*--replace"):
        main_path.run(config, str(output), InlineRunner())
    main_path.run(config, str(output), InlineRunner(), replace=True)
    assert bytes_in(output) == bytes_in(whole)


def replace_by_equal_length(file: Path) -> None:
    """Another picture in place of `file`: of the same length, and with the same time of its content."""
    state, buffer = file.stat(), io.BytesIO()
    Image.new("L", (96, 80), 90).save(buffer, "PNG")
    assert len(buffer.getvalue()) <= state.st_size
    file.write_bytes(buffer.getvalue().ljust(state.st_size, b"\0"))
    os.utime(file, (state.st_atime, state.st_mtime))


def test_a_source_image_replaced_by_one_of_equal_length_is_refused_and_replace_reads_it_again(
    config: CurateConfig, output: Path, tmp_path: Path
) -> None:
    pool = tmp_path / "pool"
    sources = tuple(
        source.model_copy(update={"path": str(pool)}) if source.role == "pool" else source
        for source in config.ingest.sources
    )
    shutil.copytree(next(source.path for source in config.ingest.sources if source.role == "pool"), pool)
    moved = config.model_copy(update={"ingest": config.ingest.model_copy(update={"sources": sources})})
    folder = RunFolder.of(str(output))
    shutil.rmtree(folder.ingest)
    time.sleep(0.05)  # filesystems count in steps of some milliseconds
    before = ingest.run(moved.ingest, folder.ingest, InlineRunner())
    assert ingest.run(moved.ingest, folder.ingest, InlineRunner(), replace=True) == before

    time.sleep(0.05)
    replace_by_equal_length(pool / "stripes/25.png")
    shutil.rmtree(folder.embed)
    with pytest.raises(InputError, match=r"25\.png: the bytes at 0 are no longer those of image .*--replace"):
        embed.run(moved.embed, folder, folder.embed, InlineRunner())
    untouched = output / "ingest/images-00000.parquet"
    written_at = untouched.stat().st_mtime_ns
    after = ingest.run(moved.ingest, folder.ingest, InlineRunner(), replace=True)
    assert untouched.stat().st_mtime_ns == written_at
    assert ingest.run(moved.ingest, str(tmp_path / "fresh"), InlineRunner()) == after != before
    assert bytes_in(output / "ingest") == bytes_in(tmp_path / "fresh")
