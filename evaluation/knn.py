"""k-NN classification by a weighted vote, which measures features without training anything on them.

The search is the exact one of the curation. Neighbours and the order of equally near ones depend neither on blocks nor
on threads. `classify` is `neighbors`, then `vote`. For several k, search once for the greatest, then take the votes of
the first k columns.

Legend: n training images, m test images, D dimensions, C classes, k neighbours.

Source: Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination (arXiv 1805.01978), 3.4, and
DINOv2's published evaluation, with T = 0.07 and k of 10, 20, 100 and 200.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from curation.config import Settings
from curation.engine.device import require_device
from curation.engine.ranks import gather_rows
from curation.engine.runner import InlineRunner, Runner
from curation.errors import InputError
from curation.files import paths
from curation.files.hashes import hash_json
from curation.search import exact
from evaluation import features, results
from evaluation.data import splits
from evaluation.data.splits import SplitConfig
from evaluation.data.views import PicturesConfig
from evaluation.features import FrozenModel, unit_rows
from evaluation.results import Result, Score
from evaluation.scores import class_mean

TEMPERATURE = 0.07  # of the weights exp(cosine / temperature). Cited: DINOv2, eval/knn.py
# Draws of each few-shot variant, with the seeds 0, 1, ... as in DINOv2's eval/knn.py. Assumed.
TRIES = 5
BLOCK_ROWS = 16_384  # training images converted to float32 at a time: 100 MB at D 1,536. Assumed.


def classify(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    k: int,
    temperature: float = TEMPERATURE,
    device: str = "cpu",
) -> Tensor:
    """Class probabilities (m, C) float32 by the weighted vote of the `k` training images nearest in cosine.

    train_features: (n, D) of any float type and norm. Read block by block, so it may be a view of a memory-mapped file
        larger than memory. Where n is less than k, all vote.
    train_labels: (n,) integers from 0; C is the greatest of them + 1.
    device: where the products are computed; the result is the same, and on the CPU.
    Equally near images are ordered by their row in `train_features`. Raises InputError.
    """
    if train_features.ndim != 2 or len(train_features) == 0 or train_labels.shape != train_features.shape[:1]:
        raise InputError(
            f"Expected training features (n, D) and labels (n,), n at least 1. Found: {list(train_features.shape)} and "
            f"{list(train_labels.shape)}."
        )
    train_labels = train_labels.cpu()
    if train_labels.is_floating_point() or int(train_labels.min()) < 0:
        raise InputError(
            f"Labels must be integers from 0. Found: {train_labels.dtype}, minimum {train_labels.min().item()}."
        )
    starts = range(0, len(train_features), BLOCK_ROWS)
    blocks = (train_features[start : start + BLOCK_ROWS] for start in starts)
    similarities, rows = neighbors(blocks, test_features, k=min(k, len(train_features)), device=device)
    return vote(similarities, train_labels[rows], int(train_labels.max()) + 1, temperature=temperature)


def neighbors(
    train_blocks: Iterable[Tensor], test_features: Tensor, *, k: int, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """The `k` training images nearest to each test image: cosines (m, k) float32 and rows (m, k) int64.

    Nearest first, equally near ones by row. Rows are counted through the blocks (., D) in order. A zero feature has
    cosine 0 to all. Raises InputError, also where there are fewer than `k` training images.
    """
    if k < 1:
        raise InputError(f"k is {k}; expected at least 1 neighbour.")
    require_device(device)
    if test_features.ndim != 2:
        raise InputError(f"Expected test features (m, D). Found: {list(test_features.shape)}.")
    queries = unit_rows(test_features, "test").cpu().numpy()
    similarities, rows = exact.search(queries, _units(train_blocks, queries.shape[1]), k, device=device)
    if (rows < 0).any():
        raise InputError(f"k is {k}, and there are only {int((rows[0] >= 0).sum())} training images.")
    return torch.from_numpy(similarities), torch.from_numpy(rows)


def vote(similarities: Tensor, labels: Tensor, num_classes: int, *, temperature: float = TEMPERATURE) -> Tensor:
    """Class probabilities (m, C) float32: a neighbour counts exp(cosine / temperature), normalised to a sum of 1.

    similarities, labels: (m, k), of the neighbours. DINOv2's evaluation computes one softmax over the greatest k and
    sums its first columns for each smaller k. Its sums are below 1, and the most probable class is the same.
    """
    if not temperature > 0:
        raise InputError(f"The temperature is {temperature}; expected more than 0.")
    weights = torch.softmax(similarities / temperature, dim=1)
    return torch.zeros(len(weights), num_classes).scatter_add_(1, labels.long(), weights)


def accuracy(probabilities: Tensor, labels: Tensor, *, top: int = 1) -> float:
    """The share of test images whose class is among the `top` most probable. Ties are broken by the lower class.

    probabilities: (m, C). labels: (m,) integers. A label of C or above, a class without training images, is wrong.
    """
    num_images, num_classes = probabilities.shape
    if labels.shape != (num_images,) or num_images == 0:
        raise InputError(
            f"Expected probabilities (m, C) and labels (m,), m at least 1. Found: {list(probabilities.shape)} and "
            f"{list(labels.shape)}."
        )
    known = labels < num_classes
    true_class = torch.where(known, labels, 0).long()[:, None]
    score = probabilities.gather(1, true_class)
    before = (probabilities > score) | (
        (probabilities == score) & (torch.arange(num_classes, device=labels.device) < true_class)
    )
    return float((known & (before.sum(1) < top)).double().mean())


class KnnConfig(Settings):
    """k-NN on one dataset. The defaults are those of DINOv2's published evaluation."""

    name: str
    """Name of the dataset in results."""
    train: SplitConfig
    """The training images, which vote."""
    test: SplitConfig
    """The test images, which are classified."""
    pictures: PicturesConfig = PicturesConfig()
    """How the model sees them."""
    k: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(10, 20, 100, 200), min_length=1)
    """Numbers of voting neighbours; each gives a result."""
    per_class: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Few-shot variants: numbers of training images for each class. A variant of n images has the values of `k` up to
    n, and n itself. Cited: DINOv2, eval/knn.py."""
    allow_missing_classes: bool = False
    """Whether the test images may lack classes of the training images."""


def run(
    config: KnnConfig, model: FrozenModel, output: str, *, cache: str | None = None, runner: Runner | None = None
) -> list[Result]:
    """Classify one dataset. Features are cached in `cache`, <output>/cache when None. Raises UserError."""
    started, cache = time.perf_counter(), cache or paths.join(output, "cache")
    train, test = splits.load_pair(
        config.train, config.test, cache, runner or InlineRunner(), subset=config.allow_missing_classes
    )
    train_features = features.extract(model, train, config.pictures, cache, runner)
    test_features = features.extract(model, test, config.pictures, cache, runner).matrix()
    if max(config.k) > len(train):
        raise InputError(
            f"k is {max(config.k)}, and {train.path} has only {len(train)} images. Take smaller values of k."
        )
    scores: list[Score] = []
    by_k = _scores(config.k, model, train_features.blocks(), train.labels, test_features, test.labels)
    for k, values_by_metric in by_k.items():
        scores += [Score(f"k={k}", metric, value) for metric, value in values_by_metric.items()]
    for per_class in config.per_class:
        few_k = few_shot_k(config.k, per_class)
        draws = [splits.few_shot(train.labels, per_class, seed) for seed in range(TRIES)]
        by_draw = [
            _scores(few_k, model, [train_features.take(rows)], train.labels[rows], test_features, test.labels)
            for rows in draws
        ]
        for k in few_k:
            for metric in by_draw[0][k]:
                values = [values_by_k[k][metric] for values_by_k in by_draw]
                spread = float(np.std(values, ddof=1))
                scores.append(Score(f"k={k}, {per_class} per class", metric, float(np.mean(values)), spread))
    return results.make(
        "knn",
        config.name,
        model,
        scores,
        data_hash=hash_json([train.data_hash, test.data_hash]),
        settings=config.model_dump(mode="json"),
        seconds=time.perf_counter() - started,
    )


def few_shot_k(k: Sequence[int], per_class: int) -> list[int]:
    """The numbers of neighbours of a few-shot variant: those of `k` up to `per_class`, and `per_class` itself."""
    return sorted({one for one in (*k, per_class) if one <= per_class})


def _scores(
    k: Sequence[int],
    model: FrozenModel,
    blocks: Iterable[Tensor],
    labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
) -> dict[int, dict[str, float]]:
    """The scores by k and metric. Top-5 is left out where there are no more than five classes.

    Ranks share the test images.
    """
    share = model.world.share(len(test_features))
    queries = test_features[share.start : share.stop]
    similarities, rows = (
        gather_rows(model.world, part, len(test_features))
        for part in neighbors(blocks, queries, k=max(k), device=str(model.device))
    )
    num_classes = int(labels.max()) + 1
    scores: dict[int, dict[str, float]] = {}
    for one in k:
        votes = vote(similarities[:, :one], labels[rows[:, :one]], num_classes)
        scores[one] = {"top-1": accuracy(votes, test_labels)}
        if num_classes > 5:
            scores[one]["top-5"] = accuracy(votes, test_labels, top=5)
        scores[one]["mean per class"] = class_mean(votes.argmax(1), test_labels)
    return scores


def _units(blocks: Iterable[Tensor], width: int) -> Iterator[np.ndarray]:
    first_row = 0
    for block in blocks:
        if block.ndim != 2 or block.shape[1] != width:
            raise InputError(f"Training features are {list(block.shape)}, test features have {width} dimensions.")
        yield unit_rows(block, "training", first_row=first_row).cpu().numpy()
        first_row += len(block)


if __name__ == "__main__":
    from evaluation import without_command

    raise SystemExit(without_command("knn"))
