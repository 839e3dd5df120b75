"""Measures a step of the trainer against a plain step, the share of each ingredient, and memory.

The plain step is DINOv2's arithmetic in its simplest form. Global and local crops have separate forward passes.
Stochastic depth computes every branch and drops some. The heads hold the scores of the whole batch at once. Ingredients
are then added one by one; the last row is training.loop.step itself. On a GPU, further rows time that step at the sizes
of the short recipe, compiled or not. Attention of packed crops is then in one call, or in one call per size.

All steps take turns on the crops of the same drawn photographs (decoding.py) with the same masks. A row with a memory
figure is a process of its own.
"""

# torch's modules and tensors have untyped methods.
# mypy: disable-error-code="no-untyped-call, no-any-return"

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
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
from curation.images.decode import ImageLimits
from pipelines.bench import decoding
from pipelines.bench.gpu_device import peak_flops
from pipelines.bench.processes import Measurements, in_process, run_work
from pipelines.bench.processes import memory as process_memory
from pipelines.bench.tables import make_table
from pipelines.bench.timing import by_turns
from training import loop, losses
from training.augment import make_crops
from training.data import Batch
from training.loop import TrainConfig, Trainer
from training.masking import mask_token_weights, step_masks
from training.model import NetworkOutputs, crop_pair_weights, draw_kept

NAME = "train"
DROP_PATH = 0.4
TARGETS = {"cpu": 1.3, "cuda": 1.6}
PHOTOGRAPH = (500, 400)
NUM_DRAWN = 16
# By device: the backbone of the comparison, and images of a step.
COMPARED = {"cpu": ("vit_small", 10), "cuda": ("vit_large", 64)}
# On a GPU: backbones of the short recipe, and images of a step.
SHORT_RECIPE = (("vit_small", 128), ("vit_base", 96), ("vit_large", 64))
# For the rows of memory: prototypes, images, and rows of scores in a chunk.
MEMORY = (131_072, 128, 16)


@dataclass(frozen=True)
class Variant:
    """A step with some of the ingredients of training.loop.step."""

    name: str
    kept_only: bool = False
    """Stochastic depth computes the kept images only."""
    packed: bool = False
    """Global and local crops pass the blocks together."""
    chunked: bool = False
    """Scores over prototypes are computed a chunk of rows at a time."""


VARIANTS = (
    Variant("plain"),
    Variant("+ stochastic depth on kept images", kept_only=True),
    Variant("+ crops packed", kept_only=True, packed=True),
    Variant("+ heads in chunks", kept_only=True, packed=True, chunked=True),
)
OUR_STEP = "training.loop.step (+ fused optimizer and EMA)"


def tables(*, scale: int = 1, repeats: int | None = None) -> list[Table]:
    """The tables of this machine's device; `scale` divides the sizes, medians are of `repeats` rounds (default 3)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name, num_images = COMPARED[device][0], max(2, COMPARED[device][1] // scale)
    seconds = _in_process("steps", name=name, num_images=num_images, repeats=repeats or 3, device=device)
    tables = [_steps_table(seconds, name, num_images, device)]
    num_prototypes, num_images, rows = MEMORY[0] // scale, *MEMORY[1:]
    peaks = {}
    for kind in ("whole", "chunked"):
        sizes = {"num_prototypes": num_prototypes, "num_images": num_images, "rows_per_chunk": rows}
        peaks[kind] = _in_process("memory", chunked=kind == "chunked", **sizes)["peak"]
    tables.append(_memory_table(peaks, num_prototypes, num_images))
    if device == "cuda":
        tables.append(_gpu_table(repeats or 5))
    return tables


# --- steps --------------------------------------------------------------------------------------------------------


def steps(name: str, num_images: int, repeats: int, device: str) -> Measurements:
    """Seconds of a step of every variant, medians of `repeats` rounds by turns after one warm-up round."""
    config = make_config(name, num_images, device)
    trainer = loop.build_trainer(config, World(0, 1, 0, torch.device(device)))
    batch = make_batch(config, draw_photographs()).to(trainer.world.device)
    plain = torch.optim.AdamW(trainer.model.student.parameters(), lr=1e-5)  # one operation at a time
    step_of_row: dict[str, Callable[[int], Any]] = {
        variant.name: functools.partial(plain_step, trainer, plain, batch, variant) for variant in VARIANTS
    }
    step_of_row[OUR_STEP] = lambda number: loop.step(trainer, [batch], number)
    works = {row: _numbered(step, device) for row, step in step_of_row.items()}
    return {row: statistics.median(seconds) for row, seconds in by_turns(works, repeats).items()}


def _numbered(step: Callable[[int], Any], device: str) -> Callable[[], None]:
    """`step` with the next step number at each call; waits for the GPU."""
    numbers = itertools.count()

    def run() -> None:
        step(next(numbers))
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def draw_photographs() -> list[bytes]:
    """NUM_DRAWN drawn photographs as JPEGs."""
    return [decoding.to_jpeg(decoding.draw(*PHOTOGRAPH, np.random.default_rng(number))) for number in range(NUM_DRAWN)]


def make_batch(config: TrainConfig, photographs: Sequence[bytes]) -> Batch:
    """Crops of the photographs, taken in turn, as the trainer's reader cuts them."""
    crops = [
        make_crops(photographs[image % len(photographs)], ImageLimits(), config.augment, np.random.default_rng(image))
        for image in range(config.batch_size)
    ]
    num_crops, side = 2 * config.batch_size, config.model.backbone.image_size // config.model.backbone.patch_size
    masks = step_masks(config.masks, (side, side), seed=0, step=0, num_crops=num_crops, crops=range(num_crops))
    return Batch(
        crops=tuple(torch.from_numpy(np.stack(group, axis=1)).flatten(0, 1) for group in zip(*crops, strict=True)),
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
    """One step with the ingredients of a variant; the arithmetic of loop.step, written out."""
    config, model = trainer.config, trainer.model
    backbone, num_images = model.student.backbone, len(batch.image_ids)
    generator = torch.Generator().manual_seed(number)
    precision = torch.autocast(config.device, dtype=torch.bfloat16, enabled=config.precision == "bfloat16")
    with precision, torch.no_grad():
        teacher_outputs = model.teacher([batch.crops[0]], None, batch.masked_indices)
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
                features = backbone(batch.crops, is_training=True, masks=masks, kept=kept)
            else:
                features = [
                    backbone([crops], is_training=True, masks=[mask], kept=[((a[i],), (b[i],)) for a, b in kept])[0]
                    for i, (crops, mask) in enumerate(zip(batch.crops, masks, strict=True))
                ]
            cls_tokens = [of_group["x_norm_clstoken"] for of_group in features]
            patches = features[0]["x_norm_patchtokens"]
        else:
            tokens = [plain_forward(backbone, *pair, generator) for pair in zip(batch.crops, masks, strict=True)]
            cls_tokens = [of_group[:, 0] for of_group in tokens]
            patches = tokens[0][:, 1 + backbone.num_register_tokens :]
        images = torch.cat(cls_tokens)
        student_outputs = NetworkOutputs(
            tuple(cls_tokens),
            *model.student.dino_head(images),
            *model.student.dino_head(patches.flatten(0, 1)[batch.masked_indices]),
        )
        loss = (_chunked_losses if variant.chunked else _whole_losses)(config, teacher_outputs, student_outputs, batch)
        for crop in cls_tokens[0].unflatten(0, (2, num_images)):
            loss = loss + 0.1 * losses.koleo_loss(crop)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.student.parameters(), config.optimizer.clip_norm)
    adam.step()
    adam.zero_grad()
    with torch.no_grad():
        for average, student in zip(model.average.parameters(), model.student.parameters(), strict=True):
            average.mul_(0.999).add_(student, alpha=0.001)
    return {"loss": loss.item()}


def plain_forward(
    backbone: VisionTransformer, crops: Tensor, masks: Tensor | None, generator: torch.Generator
) -> Tensor:
    """The normalised tokens (B, T, D) of one group of crops; every branch is computed, then some are dropped."""
    x = backbone._embed(crops, masks)
    for block in backbone.blocks:
        for branch in (
            lambda of, block=block: block.ls1(block.attn(block.norm1(of))),
            lambda of, block=block: block.ls2(block.mlp(block.norm2(of))),
        ):
            is_kept = (torch.rand(len(x), 1, 1, generator=generator) >= DROP_PATH).to(x.device, x.dtype)
            x = x + branch(x) * is_kept / (1 - DROP_PATH)
    return backbone.norm(x)


def _whole_losses(config: TrainConfig, teacher: NetworkOutputs, student: NetworkOutputs, batch: Batch) -> Tensor:
    """The losses from matrices of all scores."""
    num_images = len(batch.image_ids)
    with torch.no_grad():
        images = losses.sinkhorn_knopp(teacher.image_features @ teacher.image_prototypes.T, 0.04)
        patches = losses.sinkhorn_knopp(teacher.patch_features @ teacher.patch_prototypes.T, 0.04)
    targets = images.unflatten(0, (2, num_images))
    scores = (student.image_features @ student.image_prototypes.T).unflatten(0, (-1, num_images))
    pairs = crop_pair_weights(len(scores))
    total = losses.ibot_loss(
        student.patch_features @ student.patch_prototypes.T, patches, batch.masked_weights, 2 * num_images
    )
    for crop, crop_scores in enumerate(scores):
        for other, target in enumerate(targets):
            if crop != other:
                total = total + pairs[crop, other].item() * losses.dino_loss(crop_scores, target)
    return total


def _chunked_losses(config: TrainConfig, teacher: NetworkOutputs, student: NetworkOutputs, batch: Batch) -> Tensor:
    """The losses from a chunk of scores at a time."""
    num_images, rows = len(batch.image_ids), config.model.objective.rows_per_chunk

    def targets(features: Tensor, prototypes: Tensor, num_crops: int) -> losses.Targets:
        bias = losses.sinkhorn_bias(features, prototypes, 0.04, rows_per_chunk=rows)
        return losses.Targets(features.unflatten(0, (num_crops, -1)), prototypes, bias, 0.04)

    images = student.image_features.unflatten(0, (-1, num_images))
    whole = images.new_full((num_images,), 1 / num_images, dtype=torch.float32)
    image_loss, _ = losses.prototype_cross_entropy(
        images,
        student.image_prototypes,
        targets(teacher.image_features, teacher.image_prototypes, 2),
        crop_pair_weights(len(images)),
        whole,
        0.1,
        rows_per_chunk=rows,
    )
    patch_loss, _ = losses.prototype_cross_entropy(
        student.patch_features[None],
        student.patch_prototypes,
        targets(teacher.patch_features, teacher.patch_prototypes, 1),
        torch.ones(1, 1),
        batch.masked_weights / (2 * num_images),
        0.1,
        rows_per_chunk=rows,
    )
    return image_loss + patch_loss


# --- memory -------------------------------------------------------------------------------------------------------


def memory(chunked: bool, num_prototypes: int, num_images: int, rows_per_chunk: int) -> Measurements:
    """Bytes by which the losses of one head raise this process's peak, with scores of all rows at once or in chunks."""
    features = [functional.normalize(torch.randn(count, 256), dim=-1) for count in (2 * num_images, 10 * num_images)]
    weights = functional.normalize(torch.randn(num_prototypes, 256), dim=-1)
    student = [features[1].requires_grad_(), weights.clone().requires_grad_()]
    before = process_memory("VmHWM")
    if chunked:
        bias = losses.sinkhorn_bias(features[0], weights, 0.04, rows_per_chunk=rows_per_chunk)
        targets = losses.Targets(features[0].unflatten(0, (2, -1)), weights, bias, 0.04)
        loss, _ = losses.prototype_cross_entropy(
            student[0].unflatten(0, (10, -1)),
            student[1],
            targets,
            crop_pair_weights(10),
            torch.full((num_images,), 1 / num_images),
            0.1,
            rows_per_chunk=rows_per_chunk,
        )
    else:
        probabilities = losses.sinkhorn_knopp(features[0] @ weights.T, 0.04).unflatten(0, (2, -1))
        scores = (student[0] @ student[1].T).unflatten(0, (10, -1))
        pairs = [(a, b) for a in range(10) for b in range(2) if a != b]
        loss = torch.stack([losses.dino_loss(scores[a], probabilities[b]) for a, b in pairs]).mean()
    loss.backward()
    return {"peak": process_memory("VmHWM") - before}


# --- on a GPU -----------------------------------------------------------------------------------------------------


def gpu(name: str, num_images: int, repeats: int, packed: str, compile: bool) -> Measurements:
    """Images/s, share of the GPU's peak rate, and peak bytes of training.loop.step at the short recipe."""
    config = make_config(name, num_images, "cuda", packed_attention=packed, compile=compile)
    trainer = loop.build_trainer(config, World(0, 1, 0, torch.device("cuda")))
    batch = make_batch(config, draw_photographs()).to(trainer.world.device)
    seconds = []
    for number in range(3 + repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        loop.step(trainer, [batch], number)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    rate = num_images / statistics.median(seconds[3:])
    peak = peak_flops() or math.nan
    return {
        "rate": rate,
        "utilization": rate * loop.step_flops(config) / peak,
        "peak": float(torch.cuda.max_memory_allocated()),
    }


# --- config and tables --------------------------------------------------------------------------------------------


def make_config(name: str, num_images: int, device: str, **changes: Any) -> TrainConfig:
    """The short recipe with drop path 0.4 and Sinkhorn-Knopp, on one device."""
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


def _steps_table(seconds: dict[str, float], name: str, num_images: int, device: str) -> Table:
    title = f"A training step, {name}/16 on {device}, {num_images} images of 10 crops, drop path {DROP_PATH}"
    columns = ("step", "seconds", "speed-up over plain", "speed-up of this ingredient", "target")
    table = make_table(title, columns, left=("step",))
    previous = plain = seconds[VARIANTS[0].name]
    for row, value in seconds.items():
        target = f"{TARGETS[device]}" if row == OUR_STEP else ""
        table.add_row(row, f"{value:.2f}", f"{plain / value:.2f}", f"{previous / value:.2f}", target)
        previous = value
    return table


def _memory_table(peaks: dict[str, float], num_prototypes: int, num_images: int) -> Table:
    title = f"Memory of the image-level loss, {num_prototypes:,} prototypes, {num_images} images of 10 crops"
    table = make_table(title, ("scores", "MB above the weights"), left=("scores",))
    for kind, peak in peaks.items():
        table.add_row(kind, f"{peak / 1e6:,.0f}")
    return table


def _gpu_table(repeats: int) -> Table:
    title = "The short recipe on one GPU; published: 93 images/s (ViT-L/16, A100), 112 to 159 (H100)"
    columns = ("backbone", "images", "attention", "compiled", "images/s", "share of peak", "peak GB")
    table = make_table(title, columns, left=("backbone", "attention"))
    for name, num_images in SHORT_RECIPE:
        for packed, compiled in (("grouped", False), ("varlen", False), ("grouped", True)):
            step: dict[str, Any] = {"name": name, "num_images": num_images, "packed": packed, "compile": compiled}
            row = _in_process("gpu", repeats=repeats, **step)
            numbers = (f"{row['rate']:.1f}", f"{row['utilization']:.2f}", f"{row['peak'] / 1e9:.1f}")
            table.add_row(name, f"{num_images}", packed, str(compiled), *numbers)
    return table


_in_process = functools.partial(in_process, "training")

if __name__ == "__main__":
    from pipelines.bench import training as this  # by its real name

    run_work({"steps": this.steps, "memory": this.memory, "gpu": this.gpu})
