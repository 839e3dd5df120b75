"""The demo's training: labelled images are found, classified and reported; what does not fit is refused."""

import zlib
from pathlib import Path

import pytest

from curation import ingest
from curation.config import parse
from curation.errors import InputError
from curation.ingest import IngestConfig
from curation.runner import InlineRunner
from pipelines import train as pipeline
from tests.curation.builders import encoded_image
from tests.training.builders import train_config
from training.loop import train
from training.model import build_backbone


def write(folder: Path, names: dict[str, int]) -> str:
    """A source with so many images for each folder of labels."""
    for name, number in names.items():
        (folder / name).mkdir(parents=True)
        for image in range(number):
            seed = zlib.crc32(f"{folder.name}/{name}/{image}".encode())
            (folder / name / f"{image}.png").write_bytes(encoded_image(seed, size=(40, 48)))
    return str(folder)


def ingested(tmp_path: Path, holdout: dict[str, int]) -> str:
    seeds = write(tmp_path / "seeds", {"cats/black": 3, "dogs": 4})
    sources = [
        {"name": "seeds", "role": "seed", "path": seeds},
        {"name": "holdout", "role": "holdout", "path": write(tmp_path / "holdout", holdout)},
    ]
    output = str(tmp_path / "ingest")
    ingest.run(parse(IngestConfig, {"sources": sources}, origin="test"), output, InlineRunner())
    return output


def test_the_holdout_is_classified_before_and_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = ingested(tmp_path, {"cats": 2, "dogs/large": 3, "birds": 4})
    config = train_config(str(tmp_path / "seeds"), batch_size=4, images_per_pass=4)
    train(config, str(tmp_path / "run"), pipeline.knn_of_holdout(images, 32))
    pipeline.print_curve(str(tmp_path / "run"), 2)
    printed = capsys.readouterr().out
    rows = [line.split("│") for line in printed.splitlines() if line.startswith("│")]
    steps = [row[1].strip() for row in rows]
    assert steps == ["2", "4", "0", "4"]  # two rows of losses, then the two evaluations
    assert all(0 <= float(row[2]) <= 1 for row in rows[2:])


def test_accuracy_is_over_the_shared_classes(tmp_path: Path) -> None:
    images = ingested(tmp_path, {"cats": 2, "dogs/large": 3, "birds": 4})
    found = pipeline.knn_of_holdout(images, 32)(build_backbone(train_config(images).model.backbone, 0), 0)
    # 2 cats and 3 dogs; the birds have no seed.
    assert found["knn"] * 5 == pytest.approx(round(found["knn"] * 5))
    assert found["knn_balanced"] * 12 == pytest.approx(round(found["knn_balanced"] * 12))


def test_classes_that_do_not_meet_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="share 1 classes of labels"):
        pipeline.knn_of_holdout(ingested(tmp_path, {"cats": 2, "birds": 2}), 32)
