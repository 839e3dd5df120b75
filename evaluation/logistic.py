"""Logistic regression on frozen features: a linear classifier without augmentation or randomness.

The strength of the regularisation is selected on a held-out tenth of the training images, never on the test images. The
classifier is then fitted to all training images.

Legend: n training images, m test images, F features, C classes.

Source: DINOv2's published evaluation (its paper's appendix on linear classification of small sets): L2, L-BFGS in
float64, C of 45 values from 1e-6 to 1e5, at most 1,000 iterations.
"""

import time
import warnings
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from curation.config import Settings
from curation.engine.progress import bar
from curation.engine.runner import InlineRunner, Runner
from curation.errors import InputError
from curation.files import paths
from curation.files.hashes import hash_json
from evaluation import features, results
from evaluation.data import splits
from evaluation.data.splits import SplitConfig
from evaluation.data.views import PicturesConfig
from evaluation.features import FrozenModel, require_finite_rows
from evaluation.results import Result, Score
from evaluation.scores import classifier_scores

# Inverse strengths of the regularisation. Cited: DINOv2, eval/log_regression.py.
DEFAULT_C = tuple(float(value) for value in 10 ** np.linspace(-6, 5, 45))
HELD_OUT_SEED = 0  # draws the held-out share. Cited: the same
TOLERANCE = 1e-12  # of the gradient; a fit that reaches it ends early. Cited: the same


class LogisticConfig(Settings):
    """Logistic regression on one dataset. The defaults are those of DINOv2's published evaluation."""

    name: str
    """Name of the dataset in results."""
    train: SplitConfig
    """The training images."""
    test: SplitConfig
    """The test images, which are classified."""
    pictures: PicturesConfig = PicturesConfig(resize_size=224, image_size=224)
    """How the model sees them."""
    c: tuple[Annotated[float, Field(gt=0)], ...] = Field(default=DEFAULT_C, min_length=1)
    """Inverse strengths of the regularisation, of which the best is selected."""
    held_out: float = Field(default=0.1, gt=0, lt=1)
    """Share of the training images of each class that is held out for the selection."""
    max_iterations: int = Field(default=1000, ge=1)
    """Maximum iterations of L-BFGS for each fit."""
    allow_missing_classes: bool = False
    """Whether the test images may lack classes of the training images."""


def select_c(
    train_features: Tensor,
    train_labels: Tensor,
    c: tuple[float, ...],
    *,
    held_out: float = 0.1,
    seed: int = HELD_OUT_SEED,
    max_iterations: int = 1000,
) -> tuple[float, float]:
    """The best of `c` on a held-out share, and its accuracy there. Ties go to the first.

    train_features: (n, F), train_labels: (n,) integers from 0. Each fit starts from the solution of the one before,
    which changes only the speed: the loss has one minimum.
    """
    fitted, held = splits.hold_out(train_labels, held_out, seed)
    held_labels = train_labels[held].numpy()
    classifier = _classifier(c[0], max_iterations)
    classifier.set_params(warm_start=True)
    best, best_share = c[0], -1.0
    with bar("logistic", total=len(c), unit="fits") as advance:
        for value in c:
            classifier.set_params(C=value)
            _fit(classifier, train_features[fitted], train_labels[fitted])
            share = float((classifier.predict(train_features[held].double().numpy()) == held_labels).mean())
            if share > best_share:
                best, best_share = value, share
            advance(1, "")
    return best, best_share


def predict(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    c: float,
    *,
    max_iterations: int = 1000,
) -> Tensor:
    """The class (m,) int64 of each test image, by a classifier fitted to all training images."""
    require_finite_rows(test_features, "test")
    classifier = _classifier(c, max_iterations)
    _fit(classifier, train_features, train_labels)
    return torch.from_numpy(classifier.predict(test_features.double().numpy()))


def run(
    config: LogisticConfig, model: FrozenModel, output: str, *, cache: str | None = None, runner: Runner | None = None
) -> list[Result]:
    """Fit and classify one dataset. Features are cached in `cache`, <output>/cache when None.

    Only the first rank fits; the others return no results. Raises UserError.
    """
    started, cache = time.perf_counter(), cache or paths.join(output, "cache")
    train, test = splits.load_pair(
        config.train, config.test, cache, runner or InlineRunner(), subset=config.allow_missing_classes
    )
    train_features = features.extract(model, train, config.pictures, cache, runner).matrix()
    test_features = features.extract(model, test, config.pictures, cache, runner).matrix()
    if not model.world.is_first:
        return []
    c, share = select_c(
        train_features,
        train.labels,
        config.c,
        held_out=config.held_out,
        max_iterations=config.max_iterations,
    )
    predicted = predict(train_features, train.labels, test_features, c, max_iterations=config.max_iterations)
    protocol = f"L-BFGS, best of {len(config.c)} C"
    return results.make(
        "logistic",
        config.name,
        model,
        [Score(protocol, metric, value) for metric, value in classifier_scores(predicted, test.labels).items()],
        data_hash=hash_json([train.data_hash, test.data_hash]),
        settings=config.model_dump(mode="json") | {"chosen_c": c, "held_out_top_1": share},
        seconds=time.perf_counter() - started,
    )


def _classifier(c: float, max_iterations: int) -> LogisticRegression:
    return LogisticRegression(C=c, solver="lbfgs", max_iter=max_iterations, tol=TOLERANCE)


def _fit(classifier: LogisticRegression, train_features: Tensor, labels: Tensor) -> None:
    require_finite_rows(train_features, "training")
    if len(torch.unique(labels)) < 2:
        raise InputError("The training images are all of one class. A classifier needs at least two.")
    with warnings.catch_warnings():
        # float64 cannot reach a tolerance of 1e-12; the published protocol ends at the maximum of iterations.
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.fit(train_features.double().numpy(), labels.numpy())


if __name__ == "__main__":
    from evaluation import without_command

    raise SystemExit(without_command("logistic"))
