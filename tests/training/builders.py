"""Small real inputs for several tests of the trainer."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curation.config import parse
from tests.curation.builders import encoded_image
from training.data import Batch
from training.loop import TrainConfig
from training.masking import MaskConfig, mask_token_weights, step_masks
from training.model import ModelConfig

GLOBAL, LOCAL, PATCH = 32, 16, 8


def model_values() -> dict[str, Any]:
    """Two blocks of a ViT-Ti on 32-pixel crops, and two small heads."""
    return {
        # LayerScale is 1: at 1e-5 all images start nearly equal, and KoLeo's gradients are mostly rounding.
        "backbone": {"name": "vit_tiny", "depth": 2, "patch_size": PATCH, "image_size": GLOBAL, "layer_scale": 1.0},
        "dino_head": {"num_prototypes": 64, "bottleneck_dim": 16, "hidden_dim": 32},
        "ibot_head": {"num_prototypes": 48, "bottleneck_dim": 12, "hidden_dim": 32},
    }


def model_config(**changes: object) -> ModelConfig:
    """`model_values` with some sections replaced."""
    return ModelConfig.model_validate_json(json.dumps(model_values() | changes))


def random_batch(num_images: int, seed: int = 0, num_local: int = 4) -> Batch:
    """Crops of noise, with masks as the trainer draws them."""
    generator = torch.Generator().manual_seed(seed)

    def noise(crops: int, side: int) -> Tensor:
        return torch.randn(crops * num_images, 3, side, side, generator=generator)

    side = GLOBAL // PATCH
    masks = step_masks(
        MaskConfig(sampler="exact"),
        (side, side),
        seed=seed,
        step=0,
        num_crops=2 * num_images,
        crops=range(2 * num_images),
    )
    return Batch(
        crops=(noise(2, GLOBAL), noise(num_local, LOCAL)),
        masks=masks,
        masked_indices=masks.flatten().nonzero()[:, 0],
        masked_weights=mask_token_weights(masks),
        image_ids=[f"{seed:02}{image:030}" for image in range(num_images)],
        positions=torch.arange(num_images),
        rejected={},
    )


def split(batch: Batch, num_parts: int) -> list[Batch]:
    """The batch divided in order, as among several ranks or passes."""
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
                masked_indices=masks.flatten().nonzero()[:, 0],
                masked_weights=mask_token_weights(masks),
                image_ids=batch.image_ids[start : start + size],
                positions=batch.positions[start : start + size],
                rejected={},
            )
        )
    return parts


def train_config(images: str, **changes: Any) -> TrainConfig:
    """Four steps of eight images in two passes, with every part of the recipe in use. `a__b=value` changes `a.b`."""
    views = [{"blur": 0.0}, {"blur": 0.9, "solarize": 0.2}]
    values: dict[str, Any] = {
        "num_steps": 4,
        "batch_size": 8,
        "images_per_pass": 4,
        "device": "cpu",
        "precision": "float32",
        "log_every": 1,
        "model": model_values(),
        "schedule": {
            "learning_rate_warmup_steps": 1,
            "frozen_last_layer_steps": 1,
            "teacher_temperature_warmup_steps": 2,
            "start_teacher_momentum": 0.9,
        },
        "augment": {
            "crops": [
                {"name": "global", "size": GLOBAL, "scale": [0.32, 1.0], "views": views},
                {"name": "local", "size": LOCAL, "scale": [0.05, 0.32], "views": [{"num": 2, "blur": 0.5}]},
            ]
        },
        "data": {"path": images, "layout": "folder"},
        "checkpoint": {"every": 2, "keep": 4},
    }
    values["model"]["backbone"]["drop_path"] = 0.3
    for name, value in changes.items():
        *path, last = name.split("__")
        section = values
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    return parse(TrainConfig, values, origin="test")


def write_images(folder: Path, number: int = 12) -> str:
    """A folder of small pictures of noise."""
    folder.mkdir(parents=True)
    for image in range(number):
        (folder / f"{image:02}.png").write_bytes(encoded_image(image, size=(48, 40)))
    return str(folder)
