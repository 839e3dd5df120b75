"""Tests of logistic regression against fits from scratch; C is selected on held-out training images."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from curation.errors import InputError
from evaluation.data.splits import hold_out
from evaluation.logistic import DEFAULT_C, predict, select_c


def clustered(seed: int, num_rows: int, width: int = 6) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (num_rows,), generator=random)
    centers = torch.randn(3, width, generator=torch.Generator().manual_seed(9))
    return centers[labels] + torch.randn(num_rows, width, generator=random), labels


def test_the_grid_is_the_published_one() -> None:
    assert len(DEFAULT_C) == 45 and DEFAULT_C[0] == pytest.approx(1e-6) and DEFAULT_C[-1] == pytest.approx(1e5)


def test_agrees_with_fits_from_scratch() -> None:
    train, labels = clustered(0, 120)
    test, truth = clustered(1, 60)
    grid = (1e-4, 1e-2, 1.0, 100.0)
    trained, held = hold_out(labels, 0.1, 0)
    shares = []
    for c in grid:
        classifier = LogisticRegression(C=c, max_iter=1000, tol=1e-10).fit(train[trained].double(), labels[trained])
        shares.append(float(classifier.score(train[held].double(), labels[held])))
    chosen, share = select_c(train, labels, grid)
    assert share == max(shares) and chosen == grid[shares.index(share)]
    predicted = predict(train, labels, test, chosen)
    expected = LogisticRegression(C=chosen, max_iter=1000, tol=1e-10).fit(train.double(), labels).predict(test.double())
    assert predicted.tolist() == expected.tolist() and float((predicted == truth).double().mean()) > 0.6


def test_bad_features_are_reported() -> None:
    train, labels = clustered(0, 40)
    train[7, 2] = torch.nan
    with pytest.raises(InputError, match=r"training features hold .* row 7"):
        predict(train, labels, train[:3], 1.0)
    with pytest.raises(InputError, match="all of one class"):
        predict(train[:5], labels[:5] * 0, train[:3], 1.0)
