"""Pooling of a feature map: (B, C, H, W) to one number a channel, (B, C)."""

import math

from torch import Tensor

GEM_POWER = 3.0  # cited: SSCD (arXiv 2202.10261), section 4
GEM_FLOOR = 1e-6  # cited: SSCD's released code; keeps the root of zero differentiable


def generalized_mean(x: Tensor) -> Tensor:
    """The 3-mean (GeM) of each channel. For channels without negative values.

    Source: Radenovic et al. (arXiv 1711.02512), equation 3.
    """
    return x.clamp(min=GEM_FLOOR).pow(GEM_POWER).mean(dim=(2, 3)).pow(1 / GEM_POWER)


def log_mean_exp(x: Tensor) -> Tensor:
    """A smooth maximum of each channel. For channels of both signs."""
    cells = x.flatten(2)
    return cells.logsumexp(dim=2) - math.log(cells.shape[2])
