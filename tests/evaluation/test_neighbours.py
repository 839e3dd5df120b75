"""Tests of sheets of neighbours: the draw of the queries, and the images on the sheet."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from evaluation import neighbours
from evaluation.data.splits import SplitConfig
from evaluation.data.views import PicturesConfig
from evaluation.features import FrozenModelConfig, load_model
from evaluation.neighbours import SIDE, NeighboursConfig, choose_queries
from evaluation.visualize import GAP, OTHER, SAME
from tests.evaluation.builders import image_folder


def test_every_class_is_drawn_before_any_is_drawn_twice() -> None:
    labels = torch.tensor([0] * 50 + [1] * 3 + [2])
    rows = choose_queries(labels, 5, seed=1)
    assert sorted(labels[rows[:3]].tolist()) == [0, 1, 2] and sorted(labels[rows].tolist()) == [0, 0, 1, 1, 2]
    assert len(set(choose_queries(labels, 99, seed=1))) == 54
    assert choose_queries(labels, 5, seed=1) == rows != choose_queries(labels, 5, seed=2)


def test_the_sheet_shows_the_nearest_images(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "set", 4)
    config = NeighboursConfig(
        name="toy",
        split=SplitConfig(path=folder),
        pictures=PicturesConfig(resize_size=40, image_size=32),
        queries=3,
        k=2,
    )
    model = load_model(FrozenModelConfig(name="pixels"))
    picture = neighbours.run(config, model, str(tmp_path / "out"))
    assert picture is not None and picture.kind == "neighbours" and "2 nearest in toy" in picture.caption
    drawn = np.asarray(Image.open(tmp_path / "out" / "pictures" / picture.file))
    assert drawn.shape == (3 * SIDE + 2 * GAP, 3 * SIDE + 2 * GAP, 3)
    frames = {tuple(drawn[row * (SIDE + GAP), column * (SIDE + GAP)]) for row in range(3) for column in (1, 2)}
    assert frames <= {SAME, OTHER} and SAME in frames
