"""Tests that every evaluation gives the same results in one process, on two ranks and on Ray workers.

Only the first rank writes.
"""

import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from PIL import Image

from curation.config import parse
from curation.engine.ranks import open_world
from curation.engine.ray_runner import RayRunner
from curation.engine.runner import Runner
from evaluation import features, results, retrieval, run, segmentation
from evaluation.features import load_model
from evaluation.run import EvaluationConfig
from evaluation.visualize import GAP
from tests.conftest import Ranks
from tests.evaluation.builders import CLASSES, drawn, image_folder, model_config
from tests.evaluation.data.scene_builders import depth_scene, stamps, write

Values = dict[tuple[str, str, str], float]


def write_config(folder: Path) -> str:
    """Writes data and a config of every evaluation into `folder`, and returns the path of the config."""
    train, test = image_folder(folder / "train", 5), image_folder(folder / "test", 3, first=50)
    pairs = folder / "pairs"
    for number, label in enumerate((*CLASSES, *CLASSES[:2])):
        for era, seed in (("old", 0), ("new", 1)):
            write(pairs / era / f"{number:04d}.png", drawn(label, seed + 2 * number))
    for name, seed in (("near", 0), ("far", 1)):
        depth_scene(folder / name, 5, seed)
    pictures = {"resize_size": 40, "image_size": 32, "batch_size": 4}
    labelled: dict[str, Any] = {
        "name": "toy",
        "train": {"path": train},
        "test": {"path": test},
        "pictures": pictures,
    }
    probe = {**labelled, "blocks": [1, 2], "batch_size": 6, "steps": 5, "held_out": 0.25}
    protocol = {"image_side": 32, "window": 32, "stride": 24, "train_scales": [1.0, 1.5]}
    scenes = {
        layout: {"name": layout, "layout": "folder", "folder": str(folder / layout)} for layout in ("near", "far")
    }
    values = {
        "model": model_config(folder).model_dump(exclude_none=True),
        "knn": [{**labelled, "k": [1, 5], "per_class": [2]}],
        "logistic": [{**labelled, "c": [0.01, 1.0], "max_iterations": 50, "held_out": 0.25}],
        "linear": [probe],
        "robustness": [{"name": "again", "path": test, "linear": probe}],
        "retrieval": [
            {"name": "labelled", "data": {"layout": "labelled", "split": {"path": test}, "pictures": pictures}},
            {"name": "pairs", "data": {"layout": "amstertime", "path": str(pairs), "view": {"image_size": 32}}},
        ],
        "neighbours": [{"name": "sheet", "split": {"path": test}, "pictures": pictures, "queries": 4, "k": 3}],
        "segmentation": [
            {
                "name": "discs",
                "data": stamps(folder / "stamps").model_dump(),
                "protocol": {**protocol, "batch_size": 5, "steps": 6, "warmup_steps": 2},
            }
        ],
        "depth": [
            {
                "train": scenes["near"],
                "tests": [scenes["far"]],
                "heads": ["linear_1"],
                "crop_size": [32, 32],
                "steps": 5,
                "warmup_steps": 2,
                "batch_size": 3,
            }
        ],
    }
    path = folder / "eval.toml"
    path.write_text(tomli_w.dumps(values))
    return str(path)


def values_of(all_results: list[results.Result]) -> Values:
    return {(one.evaluation + " " + one.dataset, one.protocol, one.metric): one.value for one in all_results}


def evaluate(path: str, output: str, runner: Runner | None = None) -> Values:
    """Evaluates in this process, or as one rank of several, with shards of two images."""
    config = parse(EvaluationConfig, tomllib.loads(Path(path).read_text()), origin=path)
    with pytest.MonkeyPatch.context() as patch, open_world("cpu", timeout_seconds=120) as world:
        patch.setattr(features, "SHARD_IMAGES", 2)  # so that every worker and rank has shards
        return values_of(run.evaluate(config, load_model(config.model, world), output, runner=runner))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_config(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def alone(config: str, tmp_path_factory: pytest.TempPathFactory) -> Values:
    return evaluate(config, str(tmp_path_factory.mktemp("alone")))


def test_two_ranks_agree_with_one_process(config: str, alone: Values, ranks: Ranks, tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    first, second = ranks(evaluate, config, output)
    assert len({evaluation for evaluation, _, _ in alone}) == 8
    assert first == pytest.approx(alone, abs=1e-6)
    written = results.read(output)
    assert values_of(written) == first and len(written) == len(first)
    # The second rank has the same results, except of logistic regression, which only the first fits.
    assert second == {key: value for key, value in first.items() if not key[0].startswith("logistic")}
    (sheet,) = (tmp_path / "out" / "pictures").glob("neighbours-sheet-*.png")
    assert Image.open(sheet).size == (4 * 96 + 3 * GAP, 4 * 96 + 3 * GAP)
    # Now everything is in the cache, and all ranks read it.
    assert ranks(evaluate, config, output)[0] == first


def test_batch_sizes_do_not_change_results(config: str, alone: Values, tmp_path: Path) -> None:
    values = tomllib.loads(Path(config).read_text())
    for table in (*values["knn"], *values["logistic"], values["retrieval"][0]["data"]):
        table["pictures"]["batch_size"] = 3
    for probe in (values["linear"][0], values["robustness"][0]["linear"]):
        probe["images_per_pass"] = 2
    other = tmp_path / "other.toml"
    other.write_text(tomli_w.dumps(values))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "PHOTOS_PER_PASS", 1)
        patch.setattr(segmentation, "WINDOWS_PER_PASS", 1)
        assert evaluate(str(other), str(tmp_path / "out")) == pytest.approx(alone, abs=1e-6)


def test_ray_workers_agree_with_one_process(config: str, alone: Values, tmp_path: Path, ray_runner: RayRunner) -> None:
    assert evaluate(config, str(tmp_path), ray_runner) == alone
