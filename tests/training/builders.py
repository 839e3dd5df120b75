"""Small real parts that several tests of the trainer use."""

import json

import torch
from torch import Tensor

from training.data import Batch
from training.masking import MaskConfig, mask_token_weights, step_masks
from training.model import ModelConfig

GLOBAL, LOCAL, PATCH = 32, 16, 8


def model_config(**changes: object) -> ModelConfig:
    """Two blocks of a ViT-Ti on 32-pixel crops, and two small heads."""
    values = {
        # LayerScale at 1: at 1e-5 all images start as one, where KoLeo's gradients are mostly rounding.
        "backbone": {"name": "vit_tiny", "depth": 2, "patch_size": PATCH, "image_size": GLOBAL, "layer_scale": 1.0},
        "dino_head": {"num_prototypes": 64, "bottleneck_dim": 16, "hidden_dim": 32},
        "ibot_head": {"num_prototypes": 48, "bottleneck_dim": 12, "hidden_dim": 32},
        **changes,
    }
    return ModelConfig.model_validate_json(json.dumps(values))


def random_batch(num_images: int, seed: int = 0, num_local: int = 4) -> Batch:
    """Crops of noise with masks as the trainer draws them."""
    generator = torch.Generator().manual_seed(seed)

    def noise(crops: int, side: int) -> Tensor:
        return torch.randn(crops * num_images, 3, side, side, generator=generator)

    side = GLOBAL // PATCH
    masks = step_masks(
        MaskConfig(), (side, side), seed=seed, step=0, num_crops=2 * num_images, crops=range(2 * num_images)
    )
    return Batch(
        crops=(noise(2, GLOBAL), noise(num_local, LOCAL)),
        masks=masks,
        places=masks.flatten().nonzero()[:, 0],
        patch_weights=mask_token_weights(masks),
        image_ids=[f"{seed:02}{image:030}" for image in range(num_images)],
        positions=torch.arange(num_images),
    )


def split(batch: Batch, num_parts: int) -> list[Batch]:
    """The batch as several, in order: what several ranks or passes see of it."""
    num_images = len(batch.image_ids)
    size = num_images // num_parts

    def part(tensor: Tensor, start: int) -> Tensor:
        return tensor.unflatten(0, (-1, num_images))[:, start : start + size].flatten(0, 1)

    parts = []
    for start in range(0, num_images, size):
        masks = part(batch.masks, start)
        parts.append(
            Batch(
                crops=tuple(part(crops, start) for crops in batch.crops),
                masks=masks,
                places=masks.flatten().nonzero()[:, 0],
                patch_weights=mask_token_weights(masks),
                image_ids=batch.image_ids[start : start + size],
                positions=batch.positions[start : start + size],
            )
        )
    return parts
