"""Pooling of a feature map: (B, C, H, W) to one number a channel, (B, C). And networks with a choice of poolings."""

import math
from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

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


class PooledNetwork(nn.Module, ABC):
    """A network with a choice of poolings: normalised images (B, 3, H, W) to features (B, F).

    `features` is the forward pass, and `pool` reads its result. So one pass serves several poolings, with the values of
    a pass for each. A head on the same features is another name that `pool` knows.
    """

    def __init__(self, pooling: str) -> None:
        super().__init__()
        self.pooling = pooling

    @abstractmethod
    def features(self, images: Tensor) -> Any:
        """The layers of the network that the poolings read."""

    @abstractmethod
    def pool(self, features: Any, pooling: str) -> Tensor:
        """The features (B, F) of that pooling. It leaves `features` as they are."""

    def forward(self, images: Tensor) -> Tensor:
        return self.pool(self.features(images), self.pooling)
