"""The figures of the demo: how training went, and what the evaluations found of its result. Run by `make test-demo`."""

import json
from pathlib import Path

import pytest

from evaluation import results
from evaluation.visualize import read_pictures

pytestmark = pytest.mark.demo

ROOT = Path(__file__).parents[3]
TRAIN, EVALUATE = ROOT / "runs" / "train", ROOT / "runs" / "evaluate"


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, str, str, str], float]:
    """Values by model, evaluation, protocol and metric."""
    return {
        (one.model, one.evaluation, one.protocol, one.metric): one.value
        for one in results.latest(results.read(str(EVALUATE)))
    }


def test_training_gets_better_and_does_not_collapse() -> None:
    lines = [json.loads(line) for line in (TRAIN / "metrics.jsonl").read_text().splitlines()]
    losses, scores = ([line for line in lines if key in line] for key in ("loss", "knn"))
    assert losses[-1]["loss"] < losses[0]["loss"] - 0.5
    assert losses[-1]["rank_me"] > 10 and losses[-1]["mean_cosine"] < 0.5
    # Measured (2026-11, seeds 0 to 2): 3 to 12 points of accuracy, 7 to 11 of its mean over the classes.
    assert scores[-1]["knn"] > scores[0]["knn"] + 0.02
    assert scores[-1]["knn_of_classes"] > scores[0]["knn_of_classes"] + 0.05


@pytest.mark.parametrize("metric", ["mAP", "mIoU"])
def test_what_training_changed_is_seen(metric: str, found: dict[tuple[str, str, str, str], float]) -> None:
    trained, untrained = (
        [value for (model, *_, of), value in found.items() if (model, of) == (name, metric)]
        for name in ("trained", "untrained")
    )
    assert len(trained) == len(untrained) == 1 and trained[0] > untrained[0]


def test_a_model_of_a_million_photographs_stands_above_all(found: dict[tuple[str, str, str, str], float]) -> None:
    for evaluation, protocol, metric in (
        ("knn", "k=10", "top-1"),
        ("logistic", "L-BFGS, best of 9 C", "top-1"),
    ):
        own = {
            model: found[model, evaluation, protocol, metric] for model in ("EfficientNet-Lite0", "trained", "pixels")
        }
        assert own["EfficientNet-Lite0"] > own["trained"] + 0.1 and own["trained"] >= own["pixels"]


def test_the_pictures_are_in_the_report() -> None:
    drawn = read_pictures(str(EVALUATE))
    # What has no patches has neighbours to show, and nothing else.
    of_patches = {picture.model for picture in drawn if picture.kind != "neighbours"}
    assert of_patches == {"trained", "untrained"}
    assert len({picture.model for picture in drawn if picture.kind == "neighbours"}) == 4
    page = (EVALUATE / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(drawn)
