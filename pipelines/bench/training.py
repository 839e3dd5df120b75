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

# torch's modules and tensors have untyped methods.
# mypy: disable-error-code="no-untyped-call, no-any-return"

import functools
import io
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from curation.backbone import VisionTransformer
from curation.config import parse
from curation.engine.ranks import World
from curation.errors import SeedbedError
from curation.images.decode import ImageLimits
from pipelines.bench import decoding
from training import loop, losses
from training.augment import make_crops
from training.data import Batch
from training.loop import TrainConfig, Trainer
from training.masking import mask_token_weights, step_masks
from training.model import NetworkOutputs, crop_pair_weights, draw_kept

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
MEMORY = (131_072, 128, 16)


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


def tables(*, scale: int = 1, repeats: int | None = None) -> list[Table]:
    """The tables of this machine's device; sizes are divided by `scale`, medians are of `repeats` runs (default 3)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name, num_images = COMPARED[device]
    found = _in_process("steps", name=name, num_images=max(2, num_images // scale), repeats=repeats or 3, device=device)
    found_tables = [_steps_table(found, name, num_images // scale, device)]
    prototypes, images, rows = MEMORY
    found_tables.append(
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
    if device == "cuda":
        asked = [
            (of_size, count, packed, compiled)
            for of_size, count in SHORT_RECIPE
            for packed, compiled in (("grouped", False), ("varlen", False), ("grouped", True))
        ]
        found_tables.append(
            _gpu_table(
                {
                    row: _in_process(
                        "gpu",
                        **dict(zip(("name", "num_images", "packed", "compile"), row, strict=True)),
                        repeats=repeats or 5,
                    )
                    for row in asked
                }
            )
        )
    return found_tables


# --- steps --------------------------------------------------------------------------------------------------------


def steps(name: str, num_images: int, repeats: int, device: str) -> dict[str, float]:
    """Seconds of a step of every variant, medians of `repeats` by turns after one to warm up."""
    config = _config(name, num_images, device)
    trainer = loop.build_trainer(config, World(0, 1, 0, torch.device(device)))
    batch = make_batch(config).to(trainer.world.device)
    plain = torch.optim.AdamW(trainer.model.student.parameters(), lr=1e-5)  # one operation at a time
    works: dict[str, Callable[[int], Any]] = {
        variant.name: functools.partial(plain_step, trainer, plain, batch, variant) for variant in VARIANTS
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
        crops=tuple(torch.from_numpy(np.stack(group, axis=1)).flatten(0, 1) for group in zip(*cut, strict=True)),
        masks=masks,
        masked_indices=masks.flatten().nonzero()[:, 0],
        masked_weights=mask_token_weights(masks),
        image_ids=[str(image) for image in range(config.batch_size)],
        positions=torch.arange(config.batch_size),
        rejected={},
    )


def plain_step(
    trainer: Trainer, adam: torch.optim.Optimizer, batch: Batch, variant: Variant, number: int
) -> dict[str, float]:
    """One step with the ingredients of a variant; the arithmetic is that of loop.step, written out."""
    config, model = trainer.config, trainer.model
    backbone, num_images = model.student.backbone, len(batch.image_ids)
    generator = torch.Generator().manual_seed(number)
    precision = torch.autocast(config.device, dtype=torch.bfloat16, enabled=config.precision == "bfloat16")
    with precision, torch.no_grad():
        taught = model.teacher([batch.crops[0]], None, batch.masked_indices)
    with precision:
        masks: list[Tensor | None] = [batch.masks, None]
        if variant.kept_only:
            kept = draw_kept(
                config.model.backbone,
                backbone.n_blocks,
                [len(of) for of in batch.crops],
                generator,
                trainer.world.device,
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
        out = NetworkOutputs(
            tuple(cls_tokens),
            *model.student.dino_head(images),
            *model.student.dino_head(patches.flatten(0, 1)[batch.masked_indices]),
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


def _whole_losses(config: TrainConfig, taught: NetworkOutputs, said: NetworkOutputs, batch: Batch) -> Tensor:
    """Of matrices of all scores."""
    num_images = len(batch.image_ids)
    with torch.no_grad():
        images = losses.sinkhorn_knopp(taught.image_features @ taught.image_prototypes.T, 0.04)
        patches = losses.sinkhorn_knopp(taught.patch_features @ taught.patch_prototypes.T, 0.04)
    targets = images.unflatten(0, (2, num_images))
    scores = (said.image_features @ said.image_prototypes.T).unflatten(0, (-1, num_images))
    pairs = crop_pair_weights(len(scores))
    total = losses.ibot_loss(
        said.patch_features @ said.patch_prototypes.T, patches, batch.masked_weights, 2 * num_images
    )
    for crop, own in enumerate(scores):
        for other, target in enumerate(targets):
            if crop != other:
                total = total + pairs[crop, other].item() * losses.dino_loss(own, target)
    return total


def _chunked_losses(config: TrainConfig, taught: NetworkOutputs, said: NetworkOutputs, batch: Batch) -> Tensor:
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
        crop_pair_weights(len(images)),
        whole,
        0.1,
        rows_per_chunk=rows,
    )
    patch_loss, _ = losses.prototype_cross_entropy(
        said.patch_features[None],
        said.patch_prototypes,
        targets(taught.patch_features, taught.patch_prototypes, 1),
        torch.ones(1, 1),
        batch.masked_weights / (2 * num_images),
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
            crop_pair_weights(10),
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


# --- on a GPU -----------------------------------------------------------------------------------------------------


def gpu(name: str, num_images: int, repeats: int, packed: str, compile: bool) -> dict[str, float]:
    """Images/s, share of the GPU's peak (cited: 989 TFLOP/s in bfloat16 of an H100 or H200, 312 of an A100), and peak
    bytes, of training.loop.step at the short recipe."""
    config = _config(name, num_images, "cuda", packed_attention=packed, compile=compile)
    trainer = loop.build_trainer(config, World(0, 1, 0, torch.device("cuda")))
    batch = make_batch(config).to(trainer.world.device)
    seconds = []
    for number in range(3 + repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        loop.step(trainer, [batch], number)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    rate = num_images / statistics.median(seconds[3:])
    peak = 312e12 if "A100" in torch.cuda.get_device_name() else 989e12
    return {
        "rate": rate,
        "utilization": rate * loop.step_flops(config) / peak,
        "peak": float(torch.cuda.max_memory_allocated()),
    }


# --- around -------------------------------------------------------------------------------------------------------


def _config(name: str, num_images: int, device: str, **changes: Any) -> TrainConfig:
    """The short recipe with drop path 0.4 and Sinkhorn-Knopp on one device."""
    values: dict[str, Any] = {
        "num_steps": 1000,
        "batch_size": num_images,
        "images_per_pass": num_images,
        "device": device,
        "precision": "bfloat16" if device == "cuda" else "float32",
        "model": {"backbone": {"name": name, "patch_size": 16, "image_size": 224, "drop_path": DROP_PATH}},
        "schedule": {"learning_rate_warmup_steps": 100},
        "data": {"path": "drawn"},
        **changes,
    }
    return parse(TrainConfig, values, origin="bench")


def _in_process(function: str, **arguments: Any) -> Any:
    """What a function of this module gives in a process of its own."""
    command = [sys.executable, "-m", "pipelines.bench.training", function, json.dumps(arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SeedbedError(f"The benchmark {function} {arguments} ended with status {done.returncode}.")
    return json.loads(done.stdout.splitlines()[-1])


def _steps_table(seconds: dict[str, float], name: str, num_images: int, device: str) -> Table:
    table = Table(
        title=f"A training step, {name}/16 on {device}, {num_images} images of 10 crops, drop path {DROP_PATH}",
        title_justify="left",
    )
    for column in ("step", "seconds", "plain by it", "share of this ingredient", "to reach"):
        table.add_column(column, justify="left" if column == "step" else "right")
    before = plain = seconds[VARIANTS[0].name]
    for row, value in seconds.items():
        to_reach = f"{TO_REACH[device]}" if row == OURS else ""
        table.add_row(row, f"{value:.2f}", f"{plain / value:.2f}", f"{before / value:.2f}", to_reach)
        before = value
    return table


def _memory_table(peaks: dict[str, float], prototypes: int, num_images: int) -> Table:
    table = Table(
        title=f"Memory of the image-level loss, {prototypes:,} prototypes, {num_images} images of 10 crops",
        title_justify="left",
    )
    for column in ("scores", "MB above the weights"):
        table.add_column(column, justify="left" if column == "scores" else "right")
    for kind, peak in peaks.items():
        table.add_row(kind, f"{peak / 1e6:,.0f}")
    return table


def _gpu_table(rows: dict[tuple[str, int, str, bool], dict[str, float]]) -> Table:
    table = Table(
        title="The short recipe on one GPU; published: 93 images/s (ViT-L/16, A100), 112 to 159 (H100)",
        title_justify="left",
    )
    for column in ("backbone", "images", "attention", "compiled", "images/s", "share of peak", "peak GB"):
        table.add_column(column, justify="left" if column in ("backbone", "attention") else "right")
    for (name, num_images, packed, compiled), row in rows.items():
        numbers = (f"{row['rate']:.1f}", f"{row['utilization']:.2f}", f"{row['peak'] / 1e9:.1f}")
        table.add_row(name, f"{num_images}", packed, str(compiled), *numbers)
    return table


if __name__ == "__main__":
    from pipelines.bench import training as this  # by its real name

    print(json.dumps(getattr(this, sys.argv[1])(**json.loads(sys.argv[2]))))
