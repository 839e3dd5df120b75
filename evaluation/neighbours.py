"""Draws sheets of images with their nearest neighbours in a labelled set, to illustrate the scores of k-NN."""

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

# Side in pixels of an image on the sheet. Assumed: nine fit side by side on a page.
SIDE = 96


class NeighboursConfig(Settings):
    """One sheet. It uses the features of k-NN, from the cache where it has them."""

    name: str
    """Name of the sheet."""
    split: SplitConfig
    """The labelled set: queries and neighbours."""
    pictures: PicturesConfig = PicturesConfig()
    """How the model sees them."""
    queries: int = Field(default=8, ge=1)
    """Number of queries. They are drawn, one of each class before a second of any."""
    k: int = Field(default=8, ge=1)
    """Neighbours of each query."""


def choose_queries(labels: Tensor, count: int, seed: int = 0) -> list[int]:
    """`count` rows, or all where there are fewer: one of each class before a second of any, drawn by `seed`.

    labels: (n,) integers from 0.
    """
    order = np.random.default_rng([seed]).permutation(len(labels))
    num_drawn = torch.zeros(int(labels.max()) + 1, dtype=torch.int64)
    ranked_rows = []  # the rank of a row within its class, and the row
    for row in order.tolist():
        ranked_rows.append((int(num_drawn[labels[row]]), row))
        num_drawn[labels[row]] += 1
    return [row for _, row in sorted(ranked_rows, key=lambda ranked: ranked[0])[:count]]


def run(
    config: NeighboursConfig, model: FrozenModel, output: str, *, cache: str | None = None, runner: Runner | None = None
) -> PictureRecord | None:
    """Draw one sheet below `output`, on the first rank. Features are cached in `cache`, <output>/cache when None."""
    cache = cache or paths.join(output, "cache")
    split = splits.load(config.split, cache, runner or InlineRunner())
    image_features = features.extract(model, split, config.pictures, cache, runner)
    if not model.world.is_first:
        return None
    labels = [split.classes[label] for label in split.labels.tolist()]
    rows = choose_queries(split.labels, config.queries)
    return visualize.draw_neighbours(
        model,
        output,
        image_features.matrix(),
        labels,
        lambda row: _square(split, row),
        queries=rows,
        k=config.k,
        name=config.name,
    )


def _square(split: Split, row: int) -> Pixels:
    """The largest square in the middle of an image, (SIDE, SIDE, 3)."""
    shape = (SIDE, SIDE)
    ((_, pixels),) = splits.pictures(
        split, [row], lambda picture: to_shape(picture, shape, crop=True), target_side=SIDE, threads=1
    )
    return pixels.transpose(1, 2, 0)


if __name__ == "__main__":
    from evaluation import without_command

    raise SystemExit(without_command("neighbours"))
