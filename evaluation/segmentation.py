"""What a frozen model's patches say of every pixel: a linear head on patch tokens, and its mean IoU.

Two protocols have names, "linear" and "multiscale": those of DINOv2's published configs for ADE20K and
VOC 2012. Two things differ: pictures are scaled with antialiasing, and logits are laid over the padded picture
that the model saw, not stretched over the one without its padding.

Legend: B pictures, C classes, D channels of a head, H W pixels, h w patches.
"""

# Calling a torch module is typed Any, and some of torch's functions are not typed.
# mypy: disable-error-code="no-any-return, no-untyped-call"

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Literal, Self, final

import numpy as np
import torch
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from curation.config import Settings
from curation.engine.ranks import World, gather_rows, sum_over_ranks
from curation.errors import InputError
from curation.files.hashes import hash_json
from curation.files.prefetch import prefetch
from evaluation import order, results
from evaluation.data.scenes import IGNORED, Scene, SceneData, Scenes, load_scenes
from evaluation.features import FrozenModel
from evaluation.padding import pad, pad_to_patches
from evaluation.results import Result, Score

# Tries for a crop with more than one class. Cited: mmsegmentation, RandomCrop.
CROP_TRIES = 10
# A crop is drawn again while one class has more of it. Cited: mmsegmentation, RandomCrop's cat_max_ratio in DINOv2's
# configs.
MAX_SHARE = 0.75
WEIGHT_DECAY = 1e-4  # of AdamW, on all parameters. Cited: DINOv2's configs, as the protocols below
# Windows that the model sees at a time when pictures are scored; changes no score but for rounding. Assumed.
WINDOWS_PER_PASS = 4
READERS = 2  # threads that read and crop ahead of the model. Assumed.


class Protocol(Settings):
    """How the head is made, trained and scored. The defaults are DINOv2's linear protocol."""

    blocks: int = Field(default=1, ge=1)
    """The last so many blocks, side by side."""
    image_side: int = Field(default=512, ge=1)
    """Pixels to which the shorter side of a picture is scaled."""
    window: int = Field(default=512, ge=1)
    """Side in pixels of the crops that are trained on, and of the window that slides over scored pictures."""
    stride: int = Field(default=341, ge=1)
    """Pixels from window to window."""
    train_scales: tuple[float, float] = (0.5, 2.0)
    """Least and greatest factor on `image_side`, drawn for each crop."""
    test_scales: tuple[float, ...] = (1.0,)
    """Factors on `image_side` whose probabilities are averaged."""
    flip: bool = False
    """Whether the mirrored picture is averaged in too."""
    batch_size: int = Field(default=16, ge=2)
    """Crops a step."""
    steps: int = Field(default=40_000, ge=1)
    """Of the optimizer."""
    warmup_steps: int = Field(default=1500, ge=0)
    """In which the learning rate rises from 0; all the while it falls to 0 at the end."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Of AdamW."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        if not 0 < self.train_scales[0] <= self.train_scales[1]:
            problems.append(f"train_scales {self.train_scales}: expected 0 < least <= greatest")
        if not self.test_scales or min(self.test_scales) <= 0:
            problems.append(f"test_scales {self.test_scales}: expected one or more above 0")
        if self.stride > self.window:
            problems.append(f"stride {self.stride} is more than window {self.window}: pixels would be left out")
        if problems:
            raise ValueError("; ".join(problems))
        return self


# Cited: DINOv2's published configs dinov2_*_{ade20k,voc2012}_{linear,ms}_config.py. Its reduced rate of the first step
# (warmup_ratio 1e-6) is 0 here.
PROTOCOLS = {
    "linear": Protocol(),
    "multiscale": Protocol(
        blocks=4,
        image_side=640,
        window=640,
        stride=320,
        train_scales=(1.0, 3.0),
        test_scales=(1.0, 1.32, 1.73, 2.28, 3.0),
        flip=True,
    ),
}


class SegmentationConfig(Settings):
    """One dataset, one protocol."""

    name: str
    """What results call the dataset."""
    data: Annotated[SceneData, Field(discriminator="layout")]
    """Where the pictures and their masks are."""
    protocol: Literal["linear", "multiscale"] | Protocol = "linear"
    """A published one by its name, or all of one's own."""
    seed: int = 0
    """Of the head, the order of pictures and the crops."""


# --------------------------------------------------------------------------------------------------- crops and order


def crop_of(scene: Scene, protocol: Protocol, random: np.random.Generator, *, distort: bool = True) -> Scene:
    """A crop of `window` pixels a side to train on: scaled, perhaps mirrored and distorted, padded where too small."""
    factor = random.uniform(*protocol.train_scales)
    scaled = _scaled(scene, protocol.image_side * factor / min(scene.target.shape))
    height, width = (min(length, protocol.window) for length in scaled.target.shape)
    for _ in range(CROP_TRIES):
        top, left = (
            int(random.integers(length - part + 1))
            for length, part in zip(scaled.target.shape, (height, width), strict=True)
        )
        target = scaled.target[top : top + height, left : left + width]
        counts = torch.bincount(target[target != IGNORED].long().flatten())
        if (counts > 0).sum() > 1 and counts.max() < MAX_SHARE * counts.sum():
            break
    image = scaled.image[:, top : top + height, left : left + width]
    if random.random() < 0.5:
        image, target = image.flip(2), target.flip(1)
    if distort:
        image = _distorted(image, random)
    beyond = (0, protocol.window - width, 0, protocol.window - height)
    return Scene(pad(image, *beyond), functional.pad(target, beyond, value=IGNORED))


def _scaled(scene: Scene, factor: float) -> Scene:
    shape = [max(1, round(length * factor)) for length in scene.target.shape]
    target = functional.interpolate(scene.target[None, None], size=shape, mode="nearest-exact")[0, 0]
    return Scene(_resized(scene.image, shape), target)


def _resized(image: Tensor, shape: Sequence[int]) -> Tensor:
    """(3, H, W) uint8 at another shape."""
    if list(image.shape[1:]) == list(shape):
        return image
    resized = functional.interpolate(image[None].float(), size=tuple(shape), mode="bilinear", antialias=True)[0]
    return resized.round().clamp(0, 255).to(torch.uint8)


def _distorted(image: Tensor, random: np.random.Generator) -> Tensor:
    """Brightness, contrast, saturation and hue vary, each half of the time.

    Cited: mmsegmentation's PhotoMetricDistortion, whose hue is in steps of 2 degrees.
    """

    def now() -> bool:
        return bool(random.random() < 0.5)

    pixels: np.ndarray = image.numpy().astype(np.float32)
    if now():
        pixels = np.clip(pixels + random.uniform(-32, 32), 0, 255)
    contrast_first, contrast = now(), now()
    factor = random.uniform(0.5, 1.5)
    if contrast and contrast_first:
        pixels = np.clip(pixels * factor, 0, 255)
    saturate, turn = now(), now()
    if saturate or turn:
        picture = Image.fromarray(pixels.astype(np.uint8).transpose(1, 2, 0)).convert("HSV")
        hue, saturation, value = (np.asarray(band, np.float64) for band in picture.split())
        if saturate:
            saturation = np.clip(saturation * random.uniform(0.5, 1.5), 0, 255)
        if turn:
            hue = (hue + random.integers(-18, 18) * 2 * 256 / 360) % 256
        bands = [Image.fromarray(band.astype(np.uint8)) for band in (hue, saturation, value)]
        pixels = np.asarray(Image.merge("HSV", bands).convert("RGB")).transpose(2, 0, 1).astype(np.float32)
    if contrast and not contrast_first:
        pixels = np.clip(pixels * factor, 0, 255)
    return torch.from_numpy(np.ascontiguousarray(pixels.astype(np.uint8)))


# ---------------------------------------------------------------------------------------------------------- the head


@final
class LinearSegmentationHead(nn.Module):
    """Batch normalisation and one linear layer on each patch: (B, D, h, w) to logits (B, C, h, w)."""

    def __init__(self, channels: int, num_classes: int, seed: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.classify = nn.utils.skip_init(nn.Conv2d, channels, num_classes, kernel_size=1)
        # Cited: mmsegmentation's decode heads start from a normal distribution of 0.01.
        nn.init.normal_(self.classify.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.classify.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.classify(self.norm(tokens))


def pixel_logits(
    model: FrozenModel, head: LinearSegmentationHead, pixels: Tensor, num_blocks: int, *, all_rows: int | None = None
) -> Tensor:
    """Logits of every pixel: (B, 3, H, W) uint8 to (B, C, H, W) float32 on the model's device.

    all_rows: `pixels` are this rank's share of so many pictures, and the logits are those of all of them.
    Sides that are no multiple of the patch are padded on both sides; the padding's logits are cut off again.
    """
    assert model.patch_size is not None and model.num_blocks is not None
    height, width = pixels.shape[-2:]
    padded, top, left = pad_to_patches(pixels, model.patch_size)
    blocks = range(model.num_blocks - num_blocks, model.num_blocks)
    tokens = torch.cat([patches for patches, _ in model.intermediate(padded, blocks)], dim=1)
    if all_rows is not None:
        tokens = gather_rows(model.world, tokens, all_rows)
    logits = functional.interpolate(head(tokens), size=padded.shape[-2:], mode="bilinear", align_corners=False)
    return logits[..., top : top + height, left : left + width]


def learning_rate(step: int, protocol: Protocol) -> float:
    """It falls in a line to 0 at the last step, and rises in a line from 0 meanwhile at the start."""
    warmup = min(1.0, step / protocol.warmup_steps) if protocol.warmup_steps else 1.0
    return protocol.learning_rate * (1 - step / protocol.steps) * warmup


def train_head(model: FrozenModel, scenes: Scenes, protocol: Protocol, *, seed: int = 0) -> LinearSegmentationHead:
    """A head trained on `scenes`, in evaluation mode. The same seed gives the same head on the same device; on a GPU
    but for rounding."""
    head = LinearSegmentationHead(model.embed_dim * protocol.blocks, scenes.num_classes, seed).to(model.device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.0, weight_decay=WEIGHT_DECAY)
    for step, (pixels, targets) in enumerate(_batches(scenes, protocol, seed, model.world)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, protocol)
        logits = pixel_logits(model, head, pixels.to(model.device), protocol.blocks, all_rows=protocol.batch_size)
        targets = targets.to(model.device).long()
        loss = functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        # All pixels count in the mean, those without a class as 0. Cited: mmsegmentation's avg_non_ignore, off.
        (loss / targets.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return head.eval()


def _batches(scenes: Scenes, protocol: Protocol, seed: int, world: World) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of the crops (., 3, H, W) of each step, and the targets (B, H, W) of all of them."""
    size = protocol.batch_size
    num_crops = len(order.share_of_batch(size, world))

    def make(item: tuple[int, int]) -> Scene:
        position, place = item
        return crop_of(scenes.read(place), protocol, np.random.default_rng([seed, 1, position]))

    items = order.share_of_steps(len(scenes.names), seed, num_steps=protocol.steps, batch_size=size, world=world)
    crops = prefetch(make, items, threads=READERS, ahead=2 * num_crops)
    while batch := list(islice(crops, num_crops)):
        targets = torch.stack([crop.target for crop in batch])
        yield torch.stack([crop.image for crop in batch]), gather_rows(world, targets, size)


# ------------------------------------------------------------------------------------------------------------- scores


@torch.no_grad()
def predict(
    model: FrozenModel,
    head: LinearSegmentationHead,
    image: Tensor,
    protocol: Protocol,
    *,
    windows_per_pass: int = WINDOWS_PER_PASS,
) -> Tensor:
    """The class of every pixel of (3, H, W) uint8, (H, W) int64: of the mean probability over scales and mirrors."""
    height, width = image.shape[1:]
    total: Tensor | None = None
    for scale in protocol.test_scales:
        factor = protocol.image_side * scale / min(height, width)
        resized = _resized(image, [max(1, round(length * factor)) for length in (height, width)]).to(model.device)
        for mirrored in (False, True) if protocol.flip else (False,):
            seen = resized.flip(2) if mirrored else resized
            logits = slide(
                lambda windows: pixel_logits(model, head, windows, protocol.blocks),
                seen,
                window=protocol.window,
                stride=protocol.stride,
                windows_per_pass=windows_per_pass,
            )
            full = functional.interpolate(logits[None], size=(height, width), mode="bilinear", align_corners=False)[0]
            probabilities = (full.flip(2) if mirrored else full).softmax(dim=0)
            total = probabilities if total is None else total.add_(probabilities)
    assert total is not None
    return total.argmax(dim=0).cpu()


def slide(
    logits_of: Callable[[Tensor], Tensor], image: Tensor, *, window: int, stride: int, windows_per_pass: int
) -> Tensor:
    """The mean logits (C, H, W) of the windows over (3, H, W); `logits_of`: (B, 3, h, w) to (B, C, h, w).

    The last window of a row or column ends where the picture does; one that is larger than the picture is as large.
    """
    height, width = image.shape[1:]
    corners = [(top, left) for top in _starts(height, window, stride) for left in _starts(width, window, stride)]
    tall, wide = min(height, window), min(width, window)
    total: Tensor | None = None
    counts = torch.zeros(height, width, device=image.device)
    for first in range(0, len(corners), windows_per_pass):
        part = corners[first : first + windows_per_pass]
        windows = torch.stack([image[:, top : top + tall, left : left + wide] for top, left in part])
        for (top, left), logits in zip(part, logits_of(windows), strict=True):
            if total is None:
                total = logits.new_zeros(len(logits), height, width)
            total[:, top : top + tall, left : left + wide] += logits
            counts[top : top + tall, left : left + wide] += 1
    assert total is not None
    return total / counts


def _starts(length: int, window: int, stride: int) -> list[int]:
    last = max(length - window, 0)
    return [min(start, last) for start in range(0, last + stride, stride)]


def confusion(predicted: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Pixels by their class (rows) and the predicted one (columns), (C, C) int64; IGNORED ones are left out."""
    counted = target != IGNORED
    pairs = target[counted].long() * num_classes + predicted[counted].long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


@dataclass(frozen=True)
class SegmentationScores:
    """Shares between 0 and 1. Classes that neither occur nor are predicted count in none of the means."""

    mean_iou: float
    mean_class_accuracy: float
    """Over the classes that occur."""
    pixel_accuracy: float
    ious: tuple[float | None, ...]
    """By class; None where it neither occurs nor is predicted."""


def scores_of(counts: Tensor) -> SegmentationScores:
    """The scores of a confusion matrix (C, C). Raises InputError where no pixel has a class."""
    counts = counts.double()
    hit, occurs, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    if not occurs.any():
        raise InputError("No pixel of the scored pictures has a class.")
    union = occurs + predicted - hit
    ious = [float(own / total) if total else None for own, total in zip(hit, union, strict=True)]
    present = [iou for iou in ious if iou is not None]
    return SegmentationScores(
        mean_iou=math.fsum(present) / len(present),
        mean_class_accuracy=float((hit[occurs > 0] / occurs[occurs > 0]).mean()),
        pixel_accuracy=float(hit.sum() / counts.sum()),
        ious=tuple(ious),
    )


def score(
    model: FrozenModel,
    head: LinearSegmentationHead,
    scenes: Scenes,
    protocol: Protocol,
    *,
    windows_per_pass: int = WINDOWS_PER_PASS,
) -> SegmentationScores:
    """The scores of `head` on `scenes`, one picture at a time; ranks share the pictures."""
    counts = torch.zeros(scenes.num_classes, scenes.num_classes, dtype=torch.int64)
    for scene in prefetch(scenes.read, model.world.share(len(scenes.names)), threads=READERS, ahead=READERS):
        predicted = predict(model, head, scene.image, protocol, windows_per_pass=windows_per_pass)
        counts += confusion(predicted, scene.target, scenes.num_classes)
    return scores_of(sum_over_ranks(counts.to(model.world.device)).cpu())


def run(config: SegmentationConfig, model: FrozenModel, output: str) -> list[Result]:
    """Train a head on the dataset's training pictures and score it on its others: mIoU and two accuracies.

    Raises InputError for bad data, and for a model without patch tokens or with fewer blocks than the protocol takes.
    """
    protocol = PROTOCOLS[config.protocol] if isinstance(config.protocol, str) else config.protocol
    if model.patch_size is None or model.num_blocks is None:
        raise InputError(f"{model.name} has no patch tokens. Segmentation needs a Vision Transformer.")
    if model.num_blocks < protocol.blocks:
        raise InputError(f"{model.name} has {model.num_blocks} blocks; the protocol takes the last {protocol.blocks}.")
    started = time.perf_counter()
    train, test = load_scenes(config.data)
    head = train_head(model, train, protocol, seed=config.seed)
    scores = score(model, head, test, protocol, windows_per_pass=WINDOWS_PER_PASS)
    seconds = time.perf_counter() - started
    settings = config.model_dump(mode="json") | {
        "protocol": protocol.model_dump(mode="json"),
        "train_pictures": len(train.names),
        "test_pictures": len(test.names),
        "ious": list(scores.ious),
    }
    found = {
        "mIoU": scores.mean_iou,
        "mean class accuracy": scores.mean_class_accuracy,
        "pixel accuracy": scores.pixel_accuracy,
    }
    return results.make(
        "segmentation",
        config.name,
        model,
        [Score(_protocol_name(protocol), metric, value) for metric, value in found.items()],
        data_hash=hash_json([train.hash, test.hash]),
        settings=settings,
        seconds=seconds,
    )


def _protocol_name(protocol: Protocol) -> str:
    """Its name where it is a published one, else what it is."""
    for name, published in PROTOCOLS.items():
        if protocol == published:
            return name
    many = f", {len(protocol.test_scales)} scales" if len(protocol.test_scales) > 1 else ""
    flip = ", flip" if protocol.flip else ""
    blocks = "last block" if protocol.blocks == 1 else f"last {protocol.blocks} blocks"
    return f"{blocks}, {protocol.image_side} px{many}{flip}, {protocol.steps} steps"
