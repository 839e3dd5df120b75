"""The projection heads, which turn a token into scores over prototypes. Only training uses them.

A head gives a unit vector and the prototypes, not their product. Scores of every token over 131,072 prototypes would be
the largest tensor in memory, so the losses compute them a chunk at a time. Parameter names are those of DINOv2's
training checkpoints (`mlp.0`, `mlp.2`, `mlp.4`, `last_layer.weight_g`, `last_layer.weight_v`).

Shapes:
    S  tokens    D  width of the backbone    d  bottleneck_dim    K  num_prototypes

Source: Caron et al., DINO (arXiv 2104.14294), appendix C; Oquab et al., DINOv2 (arXiv 2304.07193).
"""

import math

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from curation.config import Settings


class HeadConfig(Settings):
    """One projection head."""

    num_prototypes: int = Field(default=65_536, ge=2)
    """K. Cited: 65,536 in the short recipe, 131,072 in the long ones."""
    bottleneck_dim: int = Field(default=256, ge=1)
    """d. Cited: 256, and 384 for the image-level head of the long recipes."""
    hidden_dim: int = Field(default=2048, ge=1)
    """Width of the two hidden layers."""
    train_prototype_norms: bool = True
    """Train the length of each prototype. Cited: DINOv2 trains it, DINO (v1) fixes it at 1."""


class Prototypes(nn.Module):
    """The last layer: K directions, each with a length (weight normalisation)."""

    def __init__(self, num_prototypes: int, bottleneck_dim: int, train_norms: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.empty(num_prototypes, 1), requires_grad=train_norms)
        self.weight_v = nn.Parameter(torch.empty(num_prototypes, bottleneck_dim))

    def forward(self) -> Tensor:
        """(K, d), float32, even if the weights are gathered in a smaller type."""
        return functional.normalize(self.weight_v.float(), dim=-1) * self.weight_g


class ProjectionHead(nn.Module):
    """Three linear layers with GELU between them, down to a unit vector. `build` makes one."""

    def __init__(self, in_dim: int, config: HeadConfig) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, config.hidden_dim),
            nn.GELU(),
            nn.Linear(config.hidden_dim, config.hidden_dim),
            nn.GELU(),
            nn.Linear(config.hidden_dim, config.bottleneck_dim),
        )
        self.last_layer = Prototypes(config.num_prototypes, config.bottleneck_dim, config.train_prototype_norms)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The unit vectors (S, d) of the tokens (S, D), and the prototypes (K, d). Their product is the logits.

        Both have the type of the linear layers' outputs.
        """
        bottleneck = self.mlp(tokens)  # (S, d)
        unit = functional.normalize(bottleneck.float(), dim=-1)
        return unit.to(bottleneck.dtype), self.last_layer().to(bottleneck.dtype)


def build(in_dim: int, config: HeadConfig, generator: torch.Generator) -> ProjectionHead:
    """A head with fresh weights.

    Cited: DINOv2's initialisation. Linear layers are truncated normal with deviation 0.02, and lengths are 1.
    Directions are drawn as PyTorch fills a linear layer.
    """
    with torch.device("meta"):
        head = ProjectionHead(in_dim, config)
    head.to_empty(device="cpu")
    for module in head.mlp:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
            nn.init.zeros_(module.bias)
    bound = 1 / math.sqrt(config.bottleneck_dim)
    nn.init.uniform_(head.last_layer.weight_v, -bound, bound, generator=generator)
    nn.init.ones_(head.last_layer.weight_g)
    return head
