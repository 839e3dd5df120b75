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
from tests.evaluation.builders import CLASSES, checkpoint, image_folder

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
    # As in DINOv2's eval/knn.py: the values of k up to the number of images a class, and that number.
    assert {protocol for protocol, _ in scores} == {"k=1", "k=5", "k=12", "k=1, 3 per class", "k=3, 3 per class"}
    assert {metric for _, metric in scores} == {"top-1", "mean per class"}  # of three classes, all are among five
    assert scores["k=1", "top-1"].value > 0.6 and scores["k=1", "top-1"].spread is None
    assert scores["k=1, 3 per class", "top-1"].spread is not None
    # Every class has the same number of test images.
    assert scores["k=5", "mean per class"].value == pytest.approx(scores["k=5", "top-1"].value)
    again = knn.run(config, model, str(tmp_path / "out"))
    assert [result.value for result in again] == [result.value for result in first]
    with pytest.raises(InputError, match=r"k is 25, and .* has only 24"):
        knn.run(config.model_copy(update={"k": (25,)}), model, str(tmp_path / "out"))
    few = knn.run(config.model_copy(update={"k": (12,)}), model, str(tmp_path / "out"))
    assert {result.protocol for result in few} == {"k=12", "k=3, 3 per class"}


@pytest.mark.parametrize(
    ("per_class", "expected"),
    [(1, [1]), (2, [2]), (5, [5]), (10, [10]), (15, [10, 15]), (100, [10, 20, 100]), (500, [10, 20, 100, 200, 500])],
)
def test_the_neighbours_of_few_shots_follow_the_published_rule(per_class: int, expected: list[int]) -> None:
    assert knn.few_shot_k((10, 20, 100, 200), per_class) == expected


def test_top_5_of_more_than_five_classes(tmp_path: Path) -> None:
    for split, first, count in (("train", 0, 4), ("test", 50, 2)):
        folder = Path(image_folder(tmp_path / split / "some", count, first=first))
        folder_of_others = Path(image_folder(tmp_path / split / "others", count, first=first + 8))
        for name in CLASSES:
            (folder_of_others / name).rename(folder / f"{name} again")
        folder_of_others.rmdir()
    splits = {name: SplitConfig(path=str(tmp_path / name / "some")) for name in ("train", "test")}
    config = KnnConfig(name="six", pictures=SMALL, k=(8,), per_class=(3,), **splits)
    first = knn.run(config, load_model(FrozenModelConfig(name="pixels")), str(tmp_path / "out"))
    scores = {(result.protocol, result.metric): result.value for result in first}
    for protocol in ("k=8", "k=3, 3 per class"):
        assert scores[protocol, "top-1"] < scores[protocol, "top-5"] <= 1


@pytest.mark.parametrize("name", [name for name in EvaluationConfig.model_fields if name != "model"])
def test_a_protocol_has_no_command_and_says_so(name: str) -> None:
    source = (Path(run.__file__).parent / f"{name}.py").read_text()
    assert source.endswith(f'    raise SystemExit(without_command("{name}"))\n')
    if name == "knn":  # one process of the nine: each takes seconds to start
        result = subprocess.run([sys.executable, "-m", f"evaluation.{name}"], capture_output=True, text=True)
        assert result.returncode == 2 and "seedbed evaluate --only knn" in result.stderr
        assert len(result.stderr.splitlines()) == 1


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
