"""Files of a finished run that change afterwards: the stage that reads them says so, and --replace repairs them."""

import shutil
from pathlib import Path

import pytest

from curation.config import load
from curation.engine.runner import InlineRunner
from curation.errors import InputError
from curation.run_folder import STAGES
from pipelines import main_path
from pipelines.main_path import CurateConfig
from tests.pipelines.test_curate import CONFIG, drawing, save

MORE = """
[retrieve.clustering]
num_images = 6
[pairs.verification]
"""
# A kind of file of each stage that a later stage reads.
READ_LATER = [
    ("ingest", "images-"),
    ("embed", "vectors-"),
    ("describe", "vectors-"),
    ("describe", "thumbnails-"),
    ("pairs", "pairs-"),
    ("dedup", "duplicates-"),
    ("cluster", "centroids-"),
    ("cluster", "parents-"),
    ("cluster", "assignments-"),
    ("retrieve", "retrieved-"),
    ("corpus", "corpus-00000.parquet"),
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
