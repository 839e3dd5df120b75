"""Scores of a classifier.

Legend: m images, C classes.
"""

import torch
from torch import Tensor

from curation.errors import InputError


def classifier_scores(predicted: Tensor, labels: Tensor) -> dict[str, float]:
    """Scores by metric of predicted classes (m,) against labels (m,)."""
    return {"top-1": accuracy(predicted, labels), "mean per class": class_mean(predicted, labels)}


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """The share of images whose class is right. Both (m,) integers."""
    return float((predicted == labels).double().mean())


def class_mean(predicted: Tensor, labels: Tensor) -> float:
    """The mean of the accuracy of each class, over the classes in `labels`. Both (m,) integers."""
    if predicted.shape != labels.shape or labels.ndim != 1 or len(labels) == 0:
        raise InputError(
            f"Expected predicted classes and labels (m,), m at least 1. Found: {list(predicted.shape)} and "
            f"{list(labels.shape)}."
        )
    classes, indices = torch.unique(labels, return_inverse=True)
    counts = torch.bincount(indices, minlength=len(classes))
    right = torch.bincount(indices, weights=(predicted == labels).double(), minlength=len(classes))
    return float((right / counts).mean())
