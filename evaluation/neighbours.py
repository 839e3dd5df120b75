"""A sheet of pictures and their nearest neighbours in a labelled set: what the numbers of k-NN look like."""

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from curation.config import Settings
from curation.engine.runner import InlineRunner, Runner
from curation.files import paths
from curation.images.decode import to_shape
from evaluation import features, visualize
from evaluation.data import splits
from evaluation.data.splits import Split, SplitConfig
from evaluation.data.views import PicturesConfig
from evaluation.features import FrozenModel
from evaluation.visualize import PictureRecord, Pixels

# Side in pixels of a picture on the sheet. Assumed: nine fit beside one another on a page.
SIDE = 96


class NeighboursConfig(Settings):
    """Whose neighbours are drawn. Features are those of k-NN, from the cache where they are there."""

    name: str
    """What the sheet is called."""
    split: SplitConfig
    """The pictures that are asked for, and those that may be found."""
    pictures: PicturesConfig = PicturesConfig()
    """What the model sees of them."""
    queries: int = Field(default=8, ge=1)
    """How many are asked for: drawn, one of each class before a second of any."""
    k: int = Field(default=8, ge=1)
    """Neighbours of each."""


def choose(labels: Tensor, count: int, seed: int = 0) -> list[int]:
    """`count` rows, or all where there are fewer: one of each class before a second of any, drawn by `seed`.

    labels: (n,) integers from 0.
    """
    order = np.random.default_rng([seed]).permutation(len(labels))
    seen = torch.zeros(int(labels.max()) + 1, dtype=torch.int64)
    turns = []
    for row in order.tolist():
        turns.append((int(seen[labels[row]]), row))
        seen[labels[row]] += 1
    return [row for _, row in sorted(turns, key=lambda turn: turn[0])[:count]]


def run(
    config: NeighboursConfig, model: FrozenModel, output: str, *, cache: str | None = None, runner: Runner | None = None
) -> PictureRecord | None:
    """Draw one sheet below `output`, on the first rank; features are kept in `cache`, <output>/cache when None."""
    cache = cache or paths.join(output, "cache")
    split = splits.load(config.split, cache, runner or InlineRunner())
    found = features.extract(model, split, config.pictures, cache, runner)
    if not model.world.is_first:
        return None
    labels = [split.classes[label] for label in split.labels.tolist()]
    rows = choose(split.labels, config.queries)
    return visualize.draw_neighbours(
        model,
        output,
        found.matrix(),
        labels,
        lambda row: _square(split, row),
        queries=rows,
        k=config.k,
        name=config.name,
    )


def _square(split: Split, row: int) -> Pixels:
    """The largest square in the middle of a picture, (SIDE, SIDE, 3)."""
    shape = (SIDE, SIDE)
    ((_, pixels),) = splits.pictures(
        split, [row], lambda picture: to_shape(picture, shape, crop=True), target_side=SIDE, threads=1
    )
    return pixels.transpose(1, 2, 0)
