"""The cost of an embedder: the width of its vectors, and the operations and parameters of a forward pass."""

from dataclasses import dataclass

from curation.backbone import SIZES
from curation.models.embedders import EmbedderConfig, split_name


@dataclass(frozen=True)
class ForwardCost:
    """The cost of one image in a forward pass."""

    operations: float
    """Two for each product."""
    parameters: float
    is_vit: bool


def vector_width(embedder: EmbedderConfig) -> int:
    """The number of values of a vector."""
    if name := split_name(embedder.name):
        return SIZES[name[0]].embed_dim * (2 if embedder.pooling == "cls_patch_mean" else 1)
    if embedder.name == "sscd_disc_mixup":
        return 512
    return 1280 + 320 * (embedder.pooling == "gem_and_bottleneck")


def forward_cost(embedder: EmbedderConfig) -> ForwardCost:
    """The cost of one image at the configured image size."""
    if name := split_name(embedder.name):
        size, patch = SIZES[name[0]], name[1]
        tokens, width = 1 + (embedder.image_size // patch) ** 2, size.embed_dim
        block = 24 * width**2 + 4 * tokens * width  # projections and MLP, two operations a weight; attention
        return ForwardCost(float(tokens * size.depth * block), 12.0 * width**2 * size.depth, is_vit=True)
    # Cited: products of one image at 224 pixels (He et al. 2015; EfficientNet-Lite); parameters.
    products, parameters = (4.1e9, 25e6) if embedder.name == "sscd_disc_mixup" else (0.407e9, 4.7e6)
    return ForwardCost(2 * products * (embedder.image_size / 224) ** 2, parameters, is_vit=False)
