"""Tests of robustness: the sets are read from their published folders and scored as published."""

import json
from pathlib import Path

import pytest
import torch

from curation.errors import InputError, UserError
from evaluation import robustness
from evaluation.data.splits import SplitConfig
from evaluation.data.views import PicturesConfig
from evaluation.features import FrozenModelConfig, load_model
from evaluation.linear import LinearConfig
from evaluation.robustness import ALEXNET_ERRORS, RobustnessConfig, mean_corruption_error, real_accuracy
from tests.evaluation.builders import CLASSES, encoded, image_folder


def test_the_corruption_error_by_hand() -> None:
    errors = {"fog": [0.1, 0.3], "snow": [0.5, 0.5]}
    assert mean_corruption_error(errors, {"fog": 0.4, "snow": 1.0}) == pytest.approx((0.5 + 0.5) / 2)


def test_several_classes_can_be_allowed_and_images_without_any_do_not_count() -> None:
    assert real_accuracy(torch.tensor([0, 1, 2, 2]), [[0, 2], [0], [], [2]]) == pytest.approx(2 / 3)
    with pytest.raises(InputError):
        real_accuracy(torch.tensor([0]), [[]])


def test_every_set_is_read_as_published(tmp_path: Path) -> None:
    train = image_folder(tmp_path / "train", 8)
    probe = LinearConfig(
        name="toy",
        train=SplitConfig(path=train),
        test=SplitConfig(path=train),
        pictures=PicturesConfig(resize_size=40, image_size=32),
        learning_rates=(0.05,),
        batch_size=16,
        steps=40,
        held_out=0.25,
    )
    model, cache = load_model(FrozenModelConfig(name="pixels")), str(tmp_path / "cache")

    def value(
        kind: str, path: Path, alexnet_errors: dict[str, float] = ALEXNET_ERRORS, **more: object
    ) -> tuple[str, float]:
        config = RobustnessConfig.model_validate(
            {"name": kind, "path": str(path), "kind": kind, "linear": probe} | more
        )
        (result,) = robustness.run(config, model, str(tmp_path / "out"), cache=cache, alexnet_errors=alexnet_errors)
        return result.metric, result.value

    # A: a single class is scored among itself.
    image_folder(tmp_path / "a", 2, first=50, classes=("disc",))
    assert value("folders", tmp_path / "a") == ("top-1", 1.0)
    image_folder(tmp_path / "r", 3, first=50)
    metric, plain = value("folders", tmp_path / "r")
    # V2: the same images in folders named by the indices of their classes.
    image_folder(tmp_path / "v2", 3, first=50)
    for class_index, label in enumerate(CLASSES):
        (tmp_path / "v2" / label).rename(tmp_path / "v2" / str(class_index))
    assert value("places", tmp_path / "v2") == (metric, plain) and 0.5 < plain
    # C: the same images for every corruption.
    for corruption in ("fog", "snow"):
        for severity in range(1, 6):
            image_folder(tmp_path / "c" / corruption / str(severity), 3, first=50)
    corruption_error = value("corruptions", tmp_path / "c", {"fog": 0.5, "snow": 0.25})
    assert corruption_error == ("mCE", pytest.approx((1 - plain) * (2 + 4) / 2))
    # ReaL: the numbers in the names are indices into real.json. Two images allow all classes, one allows none.
    labels: list[list[int]] = []
    for label in CLASSES:
        (tmp_path / "val" / label).mkdir(parents=True)
        labels.append([0, 1, 2] if label != "ring" else [])
        name = f"ILSVRC2012_val_{len(labels):08d}.JPEG"
        (tmp_path / "val" / label / name).write_bytes(encoded(label, 60, format="JPEG"))
    (tmp_path / "real.json").write_text(json.dumps(labels))
    assert value("real", tmp_path / "val", real_labels=str(tmp_path / "real.json")) == ("ReaL", 1.0)
    with pytest.raises(InputError, match="holds no index into"):
        value("real", tmp_path / "r", real_labels=str(tmp_path / "real.json"))
    with pytest.raises(UserError, match=r"c/brightness/1'"):
        value("corruptions", tmp_path / "c")  # all corruptions count
