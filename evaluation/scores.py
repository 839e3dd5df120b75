"""How right a classifier is, where the share of right answers is not the published measure.

Legend: m images, C classes.
"""

import torch
from torch import Tensor

from curation.errors import InputError


def class_mean(predicted: Tensor, labels: Tensor) -> float:
    """The mean over the classes that occur in `labels` of each one's share of right answers. Both (m,) integers."""
    if predicted.shape != labels.shape or labels.ndim != 1 or len(labels) == 0:
        raise InputError(
            f"Expected predicted classes and labels (m,), m at least 1. Found: {list(predicted.shape)} and "
            f"{list(labels.shape)}."
        )
    classes, place = torch.unique(labels, return_inverse=True)
    counts = torch.bincount(place, minlength=len(classes))
    right = torch.bincount(place, weights=(predicted == labels).double(), minlength=len(classes))
    return float((right / counts).mean())
