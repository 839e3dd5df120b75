"""The demo's training: labelled images are read, classified and reported; unusable labels are refused."""

import math
import zlib
from pathlib import Path

import pytest
import torch

from curation import ingest
from curation.config import parse, resolved_toml
from curation.engine.runner import InlineRunner
from curation.errors import InputError
from curation.ingest import IngestConfig
from pipelines import train as pipeline
from tests.curation.builders import encoded_image, run_in_process
from tests.training.builders import train_config
from training.loop import train
from training.model import build_backbone


def write(folder: Path, names: dict[str, int]) -> str:
    """A source with the given number of images in each folder; folders are labels."""
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


def test_the_holdout_is_classified_before_and_after_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = ingested(tmp_path, {"cats": 2, "dogs/large": 3, "birds": 4})
    config = train_config(str(tmp_path / "seeds"), batch_size=4, images_per_pass=4)
    train(config, str(tmp_path / "run"), pipeline.knn_of_holdout(images, 32))
    pipeline.print_curve(str(tmp_path / "run"), 2)
    printed = capsys.readouterr().out
    rows = [line.split("│") for line in printed.splitlines() if line.startswith("│")]
    steps = [row[1].strip() for row in rows]
    assert steps == ["2", "4", "0", "4"]  # two rows of losses, then the two evaluations
    assert all(0 <= float(row[2]) <= 1 for row in rows[2:])


def test_every_holdout_image_is_classified_by_all_others(tmp_path: Path) -> None:
    images = ingested(tmp_path, {"cats": 2, "dogs/large": 3, "birds": 4, "newts": 1})
    backbone = build_backbone(train_config(images).model.backbone, 0)
    scores = pipeline.knn_of_holdout(images, 32)(backbone, 0)
    pixels, labels, is_test = pipeline._labelled(images, 32)
    features = torch.nn.functional.normalize(pipeline._features(backbone, pixels).double(), dim=1)
    similarity = (features @ features.T).fill_diagonal_(-2)

    def predicted(image: int, among: list[int]) -> str:
        nearest = sorted(among, key=lambda other: -similarity[image, other].item())[: pipeline.NUM_NEIGHBORS]
        votes: dict[str, float] = {}
        for other in nearest:
            votes[labels[other]] = votes.get(labels[other], 0.0) + math.exp(similarity[image, other].item() / 0.07)
        return max(votes, key=lambda label: votes[label])

    everyone, seeds = range(len(labels)), [image for image in range(len(labels)) if not is_test[image]]
    tested = [image for image in everyone if is_test[image] and labels[image] != "newts"]  # no other image is a newt
    assert len(tested) == 9
    right = [predicted(image, [other for other in everyone if other != image]) == labels[image] for image in tested]
    assert scores["knn"] == pytest.approx(sum(right) / 9)
    by_seeds = [image for image in tested if labels[image] != "birds"]
    assert scores["knn_by_seeds"] == pytest.approx(
        sum(predicted(image, seeds) == labels[image] for image in by_seeds) / len(by_seeds)
    )


def test_a_holdout_without_classes_in_common_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="of 4 classes of labels, the holdout needs two"):
        pipeline.knn_of_holdout(ingested(tmp_path, {"newts": 2, "birds": 1}), 32)


def test_images_without_labels_are_enough_to_train(tmp_path: Path) -> None:
    images = write(tmp_path / "images", {"": 8})
    config = tmp_path / "train.toml"
    config.write_text(resolved_toml(train_config(images, num_steps=1, batch_size=4, images_per_pass=4)))
    options = ("--config", str(config), "--output", str(tmp_path / "run"))
    plan = run_in_process(pipeline.command_line, *options, "--plan")
    assert plan.returncode == 0 and "# 1 steps of 4 images: 4 in total" in plan.stdout
    assert not (tmp_path / "run").exists()
    done = run_in_process(pipeline.command_line, *options)
    assert done.returncode == 0 and "Training" in done.stdout and "10-NN" not in done.stdout
