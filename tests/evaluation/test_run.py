"""Tests of the command: results of several runs in one file, and status 2 with one message for bad input."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from curation.errors import InputError
from evaluation import knn, results, run
from evaluation.data.splits import SplitConfig
from evaluation.data.views import PicturesConfig
from evaluation.features import FrozenModelConfig, load_model
from evaluation.knn import KnnConfig
from evaluation.run import EvaluationConfig, evaluate
from evaluation.scores import class_mean
from tests.evaluation.builders import checkpoint, image_folder

SMALL = PicturesConfig(resize_size=40, image_size=32)


def knn_config(tmp_path: Path, **changes: object) -> KnnConfig:
    train, test = image_folder(tmp_path / "train", 8), image_folder(tmp_path / "test", 3, first=50)
    fields: dict[str, object] = {
        "name": "toy",
        "train": SplitConfig(path=train),
        "test": SplitConfig(path=test),
        "pictures": SMALL,
        "k": (1, 5, 12),
        "per_class": (3,),
    }
    return KnnConfig.model_validate(fields | changes)


def test_knn_of_pictures_with_few_shots(tmp_path: Path) -> None:
    config, model = knn_config(tmp_path), load_model(FrozenModelConfig(name="pixels"))
    first = knn.run(config, model, str(tmp_path / "out"))
    scores = {(result.protocol, result.metric): result for result in first}
    assert {protocol for protocol, _ in scores} == {"k=1", "k=5", "k=12", "k=1, 3 per class", "k=5, 3 per class"}
    assert scores["k=1", "top-1"].value > 0.6 and scores["k=1", "top-1"].spread is None
    assert scores["k=1, 3 per class", "top-1"].spread is not None
    # Every class has the same number of test images.
    assert scores["k=5", "mean per class"].value == pytest.approx(scores["k=5", "top-1"].value)
    again = knn.run(config, model, str(tmp_path / "out"))
    assert [result.value for result in again] == [result.value for result in first]
    with pytest.raises(InputError, match=r"k is 25, and .* has only 24"):
        knn.run(config.model_copy(update={"k": (25,)}), model, str(tmp_path / "out"))
    with pytest.raises(InputError, match="fewer than every k"):
        knn.run(config.model_copy(update={"k": (12,)}), model, str(tmp_path / "out"))


def test_the_mean_over_classes_weights_classes_equally() -> None:
    predicted, labels = torch.tensor([0, 0, 0, 0, 1]), torch.tensor([0, 0, 0, 2, 2])
    assert class_mean(predicted, labels) == 0.5
    with pytest.raises(InputError):
        class_mean(predicted[:0], labels[:0])


def test_results_stay_when_a_later_evaluation_fails(tmp_path: Path) -> None:
    good = knn_config(tmp_path, per_class=())
    bad = good.model_copy(update={"name": "bad", "test": SplitConfig(path=str(tmp_path / "absent"))})
    config = EvaluationConfig(model=FrozenModelConfig(name="pixels"), knn=(good, bad))
    with pytest.raises(InputError, match="absent"):
        evaluate(config, load_model(config.model), str(tmp_path / "out"))
    assert [result.dataset for result in results.read(str(tmp_path / "out"))] == ["toy"] * 6
    assert evaluate(config, load_model(config.model), str(tmp_path / "out"), only=("linear",)) == []
    assert run.table(results.read(str(tmp_path / "out"))).row_count == 6


def test_the_command_runs_and_refuses_bad_input(tmp_path: Path) -> None:
    train, test = image_folder(tmp_path / "train", 5), image_folder(tmp_path / "test", 2, first=50)
    text = f"""
        [[knn]]
        name = "toy"
        train = {{ path = "{train}" }}
        test = {{ path = "{test}" }}
        pictures = {{ resize_size = 40, image_size = 32 }}
        k = [1]
    """
    (tmp_path / "eval.toml").write_text(text)

    def command(*options: str) -> subprocess.CompletedProcess[str]:
        arguments = ["--config", str(tmp_path / "eval.toml"), "--output", str(tmp_path / "out"), *options]
        return subprocess.run([sys.executable, "-m", "evaluation.run", *arguments], capture_output=True, text=True)

    done = command("--model", checkpoint(tmp_path / "vit.pth"), "--only", "knn")
    assert done.returncode == 0, done.stderr
    assert [(one.model, one.protocol) for one in results.read(str(tmp_path / "out"))] == [
        (f"vit_tiny_patch8 {tmp_path.name}/vit.pth", "k=1")
    ] * 2
    refused = command("--model", "pixels", "--only", "depth")
    assert refused.returncode == 2 and refused.stderr.endswith("eval.toml has no [[depth]]. It has: knn.\n")
    Path(test, "ring").rename(Path(test, "wheel"))
    refused = command("--model", "pixels")
    assert refused.returncode == 2 and "1 classes that" in refused.stderr and "Traceback" not in refused.stderr
    assert len(results.read(str(tmp_path / "out"))) == 2
