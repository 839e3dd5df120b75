"""Tests of several models side by side: results of each, one report, and config errors before any work."""

import json
from pathlib import Path
from typing import Any

import pytest

from curation import weights
from curation.config import parse
from curation.errors import ConfigError
from evaluation import results
from pipelines.evaluate import EvaluateConfig, evaluate
from tests.curation.builders import encoded_image
from tests.training.builders import train_config
from training.model import build_backbone


def write(folder: Path, number: int, first: int) -> str:
    for name in ("cats", "dogs"):
        (folder / name).mkdir(parents=True)
        for image in range(number):
            seed = first + image + (1000 if name == "dogs" else 0)
            (folder / name / f"{image}.png").write_bytes(encoded_image(seed, size=(40, 48)))
    return str(folder)


def values(tmp_path: Path) -> dict[str, Any]:
    train, test = write(tmp_path / "train", 4, 0), write(tmp_path / "test", 3, 500)
    checkpoint = str(tmp_path / "teacher.pth")
    weights.save(build_backbone(train_config("unused").model.backbone, seed=1), checkpoint)
    return {
        "models": [
            {"label": "trained", "name": "vit_tiny_patch8", "weights": checkpoint, "image_size": 32},
            {"label": "pixels", "name": "pixels", "image_size": 32},
        ],
        "evaluations": {
            "knn": [{"name": "pets", "train": {"path": train}, "test": {"path": test}, "k": [1, 3]}],
            "retrieval": [{"name": "pets", "data": {"layout": "labelled", "split": {"path": test}}}],
            "visualize": [{"images": [f"{train}/cats/0.png", f"{train}/dogs/0.png"], "image_size": 32}],
        },
    }


def test_every_model_has_results_and_is_in_the_report(tmp_path: Path) -> None:
    report = evaluate(parse(EvaluateConfig, values(tmp_path), origin="test"), str(tmp_path / "out"))
    all_results = results.read(str(tmp_path / "out"))
    assert {(result.model, result.evaluation) for result in all_results} == {
        (model, evaluation) for model in ("trained", "pixels") for evaluation in ("knn", "retrieval")
    }
    assert len({result.model_hash for result in all_results}) == 2
    assert report is not None
    page = Path(report).read_text()
    assert "trained" in page and "pixels" in page
    # "pixels" has no patch tokens to draw.
    drawn = [json.loads(line) for line in (tmp_path / "out" / "pictures" / "pictures.jsonl").read_text().splitlines()]
    assert {picture["model"] for picture in drawn} == {"trained"}


def test_config_errors_are_reported_before_any_work(tmp_path: Path) -> None:
    wrong = values(tmp_path)
    wrong["models"][1]["colour"] = 3
    with pytest.raises(ConfigError, match=r"models\.1: 1 problem in the config:\n  Unknown key: 'model\.colour'"):
        evaluate(parse(EvaluateConfig, wrong, origin="test"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    del wrong["models"][1]["image_size"]
    with pytest.raises(ConfigError, match=r"models\.1 has no image_size"):
        parse(EvaluateConfig, wrong, origin="test")
