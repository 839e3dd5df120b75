"""How long does a step of the trainer take against a plain one, what is each ingredient's share, and how much memory?

The plain step is DINOv2's arithmetic as one would first write it: global and local crops in forward passes of their
own, stochastic depth that computes every branch and drops some, heads whose scores for the whole batch are there at
once. Ingredients are then added one by one; the last row is training.loop.step itself. On a GPU the rest are rows of
that alone: sizes of the short recipe, compiled and not, and attention of packed crops in one call or in one a size.

All see the crops of the same drawn photographs (decoding.py) with the same masks, and take turns; each row is a process
of its own where its memory counts.

    python -m pipelines.bench.training steps '{"name": "vit_small", "num_images": 10, "repeats": 3}'

prints as JSON what it measured.
"""

import io
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from curation.backbone import VisionTransformer
from curation.config import parse
from curation.errors import SeedbedError
from curation.images import ImageLimits
from pipelines.bench import decoding
from training import loop, losses, optimizer
from training.augment import AugmentConfig, make_crops
from training.data import Batch
from training.distributed import World
from training.loop import Trainer, TrainConfig
from training.masking import mask_token_weights, step_masks
from training.model import Outputs, crop_pairs, draw_kept, model_memory

NAME = "train"
DROP_PATH = 0.4
TO_REACH = {"cpu": 1.3, "cuda": 1.6}
PHOTOGRAPH = (500, 400)
NUM_DRAWN = 16
# By device: the backbone of the comparison, and images of a step.
COMPARED = {"cpu": ("vit_small", 10), "cuda": ("vit_large", 64)}
# On a GPU: the short recipe in three sizes, and images of a step.
SHORT_RECIPE = (("vit_small", 128), ("vit_base", 96), ("vit_large", 64))
# Prototypes of the memory's rows, images of whose heads, and rows of scores at once.
MEMORY = (131_072, 32, 256)


@dataclass(frozen=True)
class Variant:
    """A step, by the ingredients that it has."""

    name: str
    kept_only: bool = False
    """Stochastic depth computes only what it keeps."""
    packed: bool = False
    """Global and local crops go through the blocks together."""
    chunked: bool = False
    """Scores over prototypes are made a chunk of rows at a time."""


VARIANTS = (
    Variant("plain"),
    Variant("+ stochastic depth on kept images", kept_only=True),
    Variant("+ crops packed", kept_only=True, packed=True),
    Variant("+ heads in chunks", kept_only=True, packed=True, chunked=True),
)
OURS = "training.loop.step (+ fused optimizer and average)"


def bench(*, scale: int = 1, repeats: int | None = None) -> list[Table]:
    """The tables of this machine's device; sizes are divided by `scale`, medians are of `repeats` runs (default 3)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name, num_images = COMPARED[device]
    found = _in_process(
        "steps", name=name, num_images=max(2, num_images // scale), repeats=repeats or 3, device=device
    )
    tables = [_steps_table(found, name, num_images // scale, device)]
    prototypes, images, rows = MEMORY
    tables.append(
        _memory_table(
            {
                kind: _in_process(
                    "memory", chunked=kind == "chunked", prototypes=prototypes // scale, num_images=images, rows=rows
                )["peak"]
                for kind in ("whole", "chunked")
            },
            prototypes // scale,
            images,
        )
    )
    return tables


# --- steps --------------------------------------------------------------------------------------------------------


def steps(name: str, num_images: int, repeats: int, device: str) -> dict[str, float]:
    """Seconds of a step of every variant, medians of `repeats` by turns after one to warm up."""
    config = _config(name, num_images, device)
    trainer = loop.prepare(config, World(0, 1, 0, torch.device(device)))
    batch = make_batch(config).to(trainer.world.device)
    plain = torch.optim.AdamW(trainer.model.student.parameters(), lr=1e-5)  # one operation at a time
    works: dict[str, Callable[[int], Any]] = {
        variant.name: lambda number, variant=variant: plain_step(trainer, plain, batch, number, variant)
        for variant in VARIANTS
    }
    works[OURS] = lambda number: loop.step(trainer, [batch], number)
    seconds: dict[str, list[float]] = {row: [] for row in works}
    for number in range(1 + repeats):
        for row, work in works.items():
            started = time.perf_counter()
            work(number)
            if device == "cuda":
                torch.cuda.synchronize()
            if number:
                seconds[row].append(time.perf_counter() - started)
    return {row: statistics.median(of_row) for row, of_row in seconds.items()}


def make_batch(config: TrainConfig) -> Batch:
    """Crops of drawn photographs, as the trainer's own reader cuts them."""
    photographs = []
    for number in range(NUM_DRAWN):
        buffer = io.BytesIO()
        decoding.draw(*PHOTOGRAPH, np.random.default_rng(number)).save(buffer, "JPEG", quality=decoding.QUALITY)
        photographs.append(buffer.getvalue())
    cut = [
        make_crops(photographs[image % NUM_DRAWN], ImageLimits(), config.augment, np.random.default_rng(image))
        for image in range(config.batch_size)
    ]
    num_crops, side = 2 * config.batch_size, config.model.backbone.image_size // config.model.backbone.patch_size
    masks = step_masks(config.masks, (side, side), seed=0, step=0, num_crops=num_crops, crops=range(num_crops))
    return Batch(
        crops=tuple(
            torch.from_numpy(np.stack(group, axis=1)).flatten(0, 1) for group in zip(*cut, strict=True)
        ),
        masks=masks,
        places=masks.flatten().nonzero()[:, 0],
        patch_weights=mask_token_weights(masks),
        image_ids=[str(image) for image in range(config.batch_size)],
        positions=torch.arange(config.batch_size),
        rejected={},
    )


def plain_step(
    trainer: Trainer, adam: torch.optim.Optimizer, batch: Batch, number: int, variant: Variant
) -> dict[str, float]:
    """One step with the ingredients of a variant; the arithmetic is that of loop.step, written out."""
    config, model = trainer.config, trainer.model
    backbone, num_images = model.student.backbone, len(batch.image_ids)
    generator = torch.Generator().manual_seed(number)
    precision = torch.autocast(config.device, dtype=torch.bfloat16, enabled=config.precision == "bfloat16")
    with precision, torch.no_grad():
        taught = model.teacher([batch.crops[0]], None, batch.places)
    with precision:
        masks: list[Tensor | None] = [batch.masks, None]
        if variant.kept_only:
            kept = draw_kept(
                config.model.backbone, backbone.n_blocks, [len(of) for of in batch.crops], generator, trainer.world.device
            )
            assert kept is not None
            if variant.packed:
                said = backbone(batch.crops, is_training=True, masks=masks, kept=kept)
            else:
                said = [
                    backbone([crops], is_training=True, masks=[mask], kept=[((a[i],), (b[i],)) for a, b in kept])[0]
                    for i, (crops, mask) in enumerate(zip(batch.crops, masks, strict=True))
                ]
            cls_tokens = [features["x_norm_clstoken"] for features in said]
            patches = said[0]["x_norm_patchtokens"]
        else:
            tokens = [plain_forward(backbone, *pair, generator) for pair in zip(batch.crops, masks, strict=True)]
            cls_tokens = [of_group[:, 0] for of_group in tokens]
            patches = tokens[0][:, 1 + backbone.num_register_tokens :]
        images = torch.cat(cls_tokens)
        out = Outputs(
            tuple(cls_tokens),
            *model.student.dino_head(images),
            *model.student.dino_head(patches.flatten(0, 1)[batch.places]),
        )
        loss = (_chunked_losses if variant.chunked else _whole_losses)(config, taught, out, batch)
        for crop in cls_tokens[0].unflatten(0, (2, num_images)):
            loss = loss + 0.1 * losses.koleo_loss(crop)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.student.parameters(), config.optimizer.clip_norm)
    adam.step()
    adam.zero_grad()
    with torch.no_grad():
        for mean, new in zip(model.average.parameters(), model.student.parameters(), strict=True):
            mean.mul_(0.999).add_(new, alpha=0.001)
    return {"loss": loss.item()}


def plain_forward(
    backbone: VisionTransformer, crops: Tensor, masks: Tensor | None, generator: torch.Generator
) -> Tensor:
    """The normalised tokens (B, T, D) of one group of crops; every branch is computed, and some are dropped."""
    x = backbone._embed(crops, masks)
    for block in backbone.blocks:
        for branch in (
            lambda of, block=block: block.ls1(block.attn(block.norm1(of))),
            lambda of, block=block: block.ls2(block.mlp(block.norm2(of))),
        ):
            drawn = (torch.rand(len(x), 1, 1, generator=generator) >= DROP_PATH).to(x.device, x.dtype)
            x = x + branch(x) * drawn / (1 - DROP_PATH)
    return backbone.norm(x)


def _whole_losses(config: TrainConfig, taught: Outputs, said: Outputs, batch: Batch) -> Tensor:
    """Of matrices of all scores."""
    num_images = len(batch.image_ids)
    with torch.no_grad():
        images = losses.sinkhorn_knopp(taught.image_features @ taught.image_prototypes.T, 0.04)
        patches = losses.sinkhorn_knopp(taught.patch_features @ taught.patch_prototypes.T, 0.04)
    targets = images.unflatten(0, (2, num_images))
    scores = (said.image_features @ said.image_prototypes.T).unflatten(0, (-1, num_images))
    pairs = crop_pairs(len(scores))
    total = losses.ibot_loss(
        said.patch_features @ said.patch_prototypes.T, patches, batch.patch_weights, 2 * num_images
    )
    for crop, own in enumerate(scores):
        for other, target in enumerate(targets):
            if crop != other:
                total = total + pairs[crop, other].item() * losses.dino_loss(own, target)
    return total


def _chunked_losses(config: TrainConfig, taught: Outputs, said: Outputs, batch: Batch) -> Tensor:
    """Of a chunk of scores at a time."""
    num_images, rows = len(batch.image_ids), config.model.objective.rows_per_chunk

    def targets(features: Tensor, prototypes: Tensor, num_crops: int) -> losses.Targets:
        bias = losses.sinkhorn_bias(features, prototypes, 0.04, rows_per_chunk=rows)
        return losses.Targets(features.unflatten(0, (num_crops, -1)), prototypes, bias, 0.04)

    images = said.image_features.unflatten(0, (-1, num_images))
    whole = images.new_full((num_images,), 1 / num_images, dtype=torch.float32)
    image_loss, _ = losses.prototype_cross_entropy(
        images,
        said.image_prototypes,
        targets(taught.image_features, taught.image_prototypes, 2),
        crop_pairs(len(images)),
        whole,
        0.1,
        rows_per_chunk=rows,
    )
    patch_loss, _ = losses.prototype_cross_entropy(
        said.patch_features[None],
        said.patch_prototypes,
        targets(taught.patch_features, taught.patch_prototypes, 1),
        torch.ones(1, 1),
        batch.patch_weights / (2 * num_images),
        0.1,
        rows_per_chunk=rows,
    )
    return image_loss + patch_loss


# --- memory -------------------------------------------------------------------------------------------------------


def memory(chunked: bool, prototypes: int, num_images: int, rows: int) -> dict[str, float]:
    """Bytes by which the losses of one head raise this process's peak, with scores of all rows at once or in chunks."""
    features = [functional.normalize(torch.randn(count, 256), dim=-1) for count in (2 * num_images, 10 * num_images)]
    weights = functional.normalize(torch.randn(prototypes, 256), dim=-1)
    student = [features[1].requires_grad_(), weights.clone().requires_grad_()]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if chunked:
        bias = losses.sinkhorn_bias(features[0], weights, 0.04, rows_per_chunk=rows)
        targets = losses.Targets(features[0].unflatten(0, (2, -1)), weights, bias, 0.04)
        loss, _ = losses.prototype_cross_entropy(
            student[0].unflatten(0, (10, -1)),
            student[1],
            targets,
            crop_pairs(10),
            torch.full((num_images,), 1 / num_images),
            0.1,
            rows_per_chunk=rows,
        )
    else:
        probabilities = losses.sinkhorn_knopp(features[0] @ weights.T, 0.04).unflatten(0, (2, -1))
        scores = (student[0] @ student[1].T).unflatten(0, (10, -1))
        pairs = [(a, b) for a in range(10) for b in range(2) if a != b]
        loss = torch.stack([losses.dino_loss(scores[a], probabilities[b]) for a, b in pairs]).mean()
    loss.backward()
    return {"peak": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024}
