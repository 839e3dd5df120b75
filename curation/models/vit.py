"""Vision Transformers as embedders: the backbone that a checkpoint holds, and the pooling of its tokens.

Shapes:
    B  images    H, W  pixels, multiples of the patch size    D  embed_dim    F  num_features
"""

# Calling a torch module is typed Any.
# mypy: disable-error-code="no-any-return"

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from curation import backbone, weights
from curation.backbone import Features, PositionInterpolation, VisionTransformer
from curation.errors import WeightsError
from curation.models.pooling import PooledNetwork

Family = Literal["vit", "ijepa", "mae"]
Pooling = Literal["cls", "patch_mean", "cls_patch_mean"]

# The first is the default. Cited: the CLS token for DINOv2 (its k-NN evaluation) and for MAE (its linear probing,
# main_linprobe.py: no loss trains that token, yet its authors probe it); the mean of the patches for I-JEPA, which has
# no CLS token (arXiv 2301.08243, appendix A.1).
POOLINGS: dict[Family, tuple[Pooling, ...]] = {
    "vit": ("cls", "patch_mean", "cls_patch_mean"),
    "ijepa": ("patch_mean",),
    "mae": ("cls", "patch_mean", "cls_patch_mean"),
}


@dataclass(frozen=True)
class Variant:
    """The parts of a Vision Transformer's name."""

    size: backbone.Name
    patch_size: int
    family: Family = "vit"
    """"vit" has LayerScale, SwiGLU and register tokens as its checkpoint has them; the others have none of these."""


class PooledTransformer(PooledNetwork):
    """A Vision Transformer with its poolings: normalised images (B, 3, H, W) to features (B, F)."""

    def __init__(self, network: VisionTransformer, pooling: str) -> None:
        super().__init__(pooling)
        self.network = network

    def features(self, images: Tensor) -> Features:
        return self.network.forward_features(images)

    def pool(self, features: Features, pooling: str) -> Tensor:
        if pooling == "cls":
            return features["x_norm_clstoken"]
        patch_mean = features["x_norm_patchtokens"].mean(dim=1)
        if pooling == "patch_mean":
            return patch_mean
        return torch.cat([features["x_norm_clstoken"], patch_mean], dim=1)


def num_features(embed_dim: int, pooling: str) -> int:
    """Length F of the pooled features."""
    return embed_dim * (2 if pooling == "cls_patch_mean" else 1)


def num_parameters(variant: Variant) -> float:
    """Weights of the blocks; the rest is small beside them."""
    size = backbone.SIZES[variant.size]
    return 12.0 * size.embed_dim**2 * size.depth


def flops(variant: Variant, image_size: int) -> float:
    """Operations for one image of that side in pixels; a multiplication with its addition counts as two."""
    size = backbone.SIZES[variant.size]
    num_tokens, width = 1 + (image_size // variant.patch_size) ** 2, size.embed_dim
    block = 24 * width**2 + 4 * num_tokens * width  # projections and MLP, two operations a weight; attention
    return float(num_tokens * size.depth * block)


def interpolation(family: Family, num_register_tokens: int) -> PositionInterpolation:
    """How the authors of the weights resize the positional embedding, where the file does not state it.

    Cited: DINOv2 hub/backbones.py, MAE util/pos_embed.py. I-JEPA's own code splits off a CLS token that its embedding
    does not have, so I-JEPA follows the transformers library.
    """
    if family != "vit":
        return "plain"
    return "antialias" if num_register_tokens else "offset"


def load(
    variant: Variant,
    path: str,
    *,
    sha256: str | None,
    pooling: str,
    weights_image_size: int | None,
    num_register_tokens: int | None,
    position_interpolation: PositionInterpolation | None,
) -> PooledTransformer:
    """The Vision Transformer with the weights at `path`, on the CPU. None leaves a value to the checkpoint.

    Raises WeightsError where the checkpoint does not fit the variant or the given values.
    """
    checkpoint = weights.read(path, sha256=sha256)
    stored = weights.architecture(checkpoint.tensors, checkpoint.path)
    given_and_stored = {
        "weights_image_size": (weights_image_size, stored.grid_size * stored.patch_size),
        "num_register_tokens": (num_register_tokens, stored.num_register_tokens),
    }
    problems = [
        f"{key} is {given}, and the checkpoint has {value}"
        for key, (given, value) in given_and_stored.items()
        if given not in (None, value)
    ]
    if problems:
        raise WeightsError(f"{path}: {'; '.join(problems)}. Leave the option out, or give other weights.")
    follows_checkpoint = variant.family == "vit"
    network = backbone.build(
        variant.size,
        patch_size=variant.patch_size,
        image_size=stored.grid_size * variant.patch_size,
        num_register_tokens=stored.num_register_tokens if follows_checkpoint else 0,
        cls_token=variant.family != "ijepa",
        feed_forward=stored.feed_forward if follows_checkpoint else "mlp",
        layer_scale=1.0 if follows_checkpoint and stored.has_layer_scale else None,
        position_interpolation=position_interpolation
        or checkpoint.position_interpolation
        or interpolation(variant.family, stored.num_register_tokens),
        seed=None,
    )
    weights.fill(network, checkpoint)
    return PooledTransformer(network, pooling)
