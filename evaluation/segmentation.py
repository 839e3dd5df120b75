"""Semantic segmentation by a linear head on frozen patch tokens, scored by mean IoU.

Two protocols have names, "linear" and "multiscale": those of DINOv2's published configs for ADE20K and VOC 2012. Two
details differ: images are scaled with antialiasing, and logits are upsampled to the padded image that the model sees,
not stretched over the image without padding.

Legend: B images, C classes, D channels of a head, H W pixels, h w patches.
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
from evaluation.data.splits import abbreviated
from evaluation.features import FrozenModel
from evaluation.padding import pad, pad_to_patches
from evaluation.results import Result, Score

# Maximum draws for a crop with more than one class. Cited: mmsegmentation, RandomCrop.
CROP_TRIES = 10
# A crop is drawn again while one class covers a greater share of it. Cited: RandomCrop's cat_max_ratio in DINOv2's
# configs of mmsegmentation.
MAX_SHARE = 0.75
WEIGHT_DECAY = 1e-4  # of AdamW, on all parameters. Cited: DINOv2's configs, as the protocols below
# Windows a forward pass when images are scored; changes scores only by rounding. Assumed.
WINDOWS_PER_PASS = 4
READERS = 2  # threads that read and crop in advance. Assumed.


class Protocol(Settings):
    """How the head is built, trained and scored. The defaults are DINOv2's linear protocol."""

    blocks: int = Field(default=1, ge=1)
    """Number of last blocks whose patch tokens are concatenated."""
    image_side: int = Field(default=512, ge=1)
    """Length in pixels to which the shorter side of an image is scaled."""
    window: int = Field(default=512, ge=1)
    """Side in pixels of training crops and of the window that slides over scored images."""
    stride: int = Field(default=341, ge=1)
    """Pixels between neighbouring windows."""
    train_scales: tuple[float, float] = (0.5, 2.0)
    """Range of the factor on `image_side`, drawn for each crop."""
    test_scales: tuple[float, ...] = (1.0,)
    """Factors on `image_side` whose probabilities are averaged."""
    flip: bool = False
    """Whether the mirror image is averaged in too."""
    batch_size: int = Field(default=16, ge=2)
    """Crops of a step."""
    steps: int = Field(default=40_000, ge=1)
    """Steps of the optimizer."""
    warmup_steps: int = Field(default=1500, ge=0)
    """First steps, in which the learning rate is also multiplied by a factor that rises from 0 to 1."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Learning rate of AdamW; it falls linearly towards 0 at the last step."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        if not 0 < self.train_scales[0] <= self.train_scales[1]:
            problems.append(f"train_scales {self.train_scales}: expected 0 < minimum <= maximum")
        if not self.test_scales or min(self.test_scales) <= 0:
            problems.append(f"test_scales {self.test_scales}: expected one or more above 0")
        if self.stride > self.window:
            problems.append(f"stride {self.stride} is greater than window {self.window}: pixels would be left out")
        if problems:
            raise ValueError("; ".join(problems))
        return self


# Cited: DINOv2's published configs dinov2_*_{ade20k,voc2012}_{linear,ms}_config.py. Their learning rate of the first
# step (warmup_ratio 1e-6) is 0 here.
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
    """Segmentation of one dataset by one protocol."""

    name: str
    """Name of the dataset in results."""
    data: Annotated[SceneData, Field(discriminator="layout")]
    """Layout and location of the images and their masks."""
    protocol: Literal["linear", "multiscale"] | Protocol = "linear"
    """A published protocol by its name, or a complete protocol."""
    seed: int = 0
    """Draws the fresh head, the order of the images and the crops."""


# --------------------------------------------------------------------------------------------------- crops and order


def crop_of(scene: Scene, protocol: Protocol, random: np.random.Generator, *, distort: bool = True) -> Scene:
    """A training crop of `window` pixels a side: scaled, mirrored with probability 1/2, distorted and padded."""
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
    """An image (3, H, W) uint8 scaled to another shape."""
    if list(image.shape[1:]) == list(shape):
        return image
    resized = functional.interpolate(image[None].float(), size=tuple(shape), mode="bilinear", antialias=True)[0]
    return resized.round().clamp(0, 255).to(torch.uint8)


def _distorted(image: Tensor, random: np.random.Generator) -> Tensor:
    """The image with brightness, contrast, saturation and hue changed, each with probability 1/2.

    Cited: mmsegmentation's PhotoMetricDistortion, whose hue has steps of 2 degrees.
    """

    def draw() -> bool:
        return bool(random.random() < 0.5)

    pixels: np.ndarray = image.numpy().astype(np.float32)
    if draw():
        pixels = np.clip(pixels + random.uniform(-32, 32), 0, 255)
    contrast_first, contrast = draw(), draw()
    factor = random.uniform(0.5, 1.5)
    if contrast and contrast_first:
        pixels = np.clip(pixels * factor, 0, 255)
    saturate, turn = draw(), draw()
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
    """Batch normalisation and one linear layer for each patch: (B, D, h, w) to logits (B, C, h, w)."""

    def __init__(self, channels: int, num_classes: int, seed: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.classify = nn.utils.skip_init(nn.Conv2d, channels, num_classes, kernel_size=1)
        # Cited: mmsegmentation initialises decode heads with a standard deviation of 0.01.
        nn.init.normal_(self.classify.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.classify.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.classify(self.norm(tokens))


def pixel_logits(
    model: FrozenModel, head: LinearSegmentationHead, pixels: Tensor, num_blocks: int, *, all_rows: int | None = None
) -> Tensor:
    """Logits of every pixel: (B, 3, H, W) uint8 to (B, C, H, W) float32 on the model's device.

    all_rows: the number of images of all ranks, where `pixels` is this rank's share. The logits are of all images.
    Images are padded to whole patches on both sides; the logits of the padding are cut off again.
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
    """The learning rate at `step`: it falls linearly towards 0, times a factor that rises during warm-up."""
    warmup = min(1.0, step / protocol.warmup_steps) if protocol.warmup_steps else 1.0
    return protocol.learning_rate * (1 - step / protocol.steps) * warmup


def train_head(model: FrozenModel, scenes: Scenes, protocol: Protocol, *, seed: int = 0) -> LinearSegmentationHead:
    """A head trained on `scenes`, in evaluation mode.

    The same seed gives the same head on the same device; on a GPU, up to rounding.
    """
    head = LinearSegmentationHead(model.embed_dim * protocol.blocks, scenes.num_classes, seed).to(model.device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.0, weight_decay=WEIGHT_DECAY)
    for step, (pixels, targets) in enumerate(_batches(scenes, protocol, seed, model.world)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, protocol)
        logits = pixel_logits(model, head, pixels.to(model.device), protocol.blocks, all_rows=protocol.batch_size)
        targets = targets.to(model.device).long()
        loss = functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        # Pixels without a class count as 0 in the mean. Cited: mmsegmentation without avg_non_ignore.
        (loss / targets.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return head.eval()


def _batches(scenes: Scenes, protocol: Protocol, seed: int, world: World) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of the crops (., 3, H, W) of each step, and the targets (B, H, W) of all ranks."""
    size = protocol.batch_size
    num_crops = len(order.share_of_batch(size, world))

    def make(item: tuple[int, int]) -> Scene:
        position, row = item
        return crop_of(scenes.read(row), protocol, np.random.default_rng([seed, 1, position]))

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
    """The class (H, W) int64 of every pixel of (3, H, W) uint8, by the mean probability over scales and flips."""
    height, width = image.shape[1:]
    total: Tensor | None = None
    for scale in protocol.test_scales:
        factor = protocol.image_side * scale / min(height, width)
        resized = _resized(image, [max(1, round(length * factor)) for length in (height, width)]).to(model.device)
        for mirrored in (False, True) if protocol.flip else (False,):
            view = resized.flip(2) if mirrored else resized
            logits = slide(
                lambda windows: pixel_logits(model, head, windows, protocol.blocks),
                view,
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
    """The mean logits (C, H, W) of the windows over (3, H, W). logits_of: (B, 3, h, w) to (B, C, h, w).

    The last window of a row or column ends at the edge of the image. A window is never larger than the image.
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
    """Counts of pixels by true class (rows) and predicted class (columns), (C, C) int64, without IGNORED pixels."""
    counted = target != IGNORED
    pairs = target[counted].long() * num_classes + predicted[counted].long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


@dataclass(frozen=True)
class SegmentationScores:
    """Shares between 0 and 1. Means leave out classes that neither occur nor are predicted."""

    mean_iou: float
    mean_class_accuracy: float
    """The mean over the classes that occur."""
    pixel_accuracy: float
    ious: tuple[float | None, ...]
    """By class; None for a class that neither occurs nor is predicted."""


def scores_of(counts: Tensor) -> SegmentationScores:
    """The scores of a confusion matrix (C, C). Raises InputError where no pixel has a class."""
    counts = counts.double()
    hit, occurs, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    if not occurs.any():
        raise InputError("No pixel of the scored images has a class.")
    union = occurs + predicted - hit
    ious = [float(count / total) if total else None for count, total in zip(hit, union, strict=True)]
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
    """The scores of `head` on `scenes`, one image at a time. Ranks share the images."""
    counts = torch.zeros(scenes.num_classes, scenes.num_classes, dtype=torch.int64)
    for scene in prefetch(scenes.read, model.world.share(len(scenes.names)), threads=READERS, ahead=READERS):
        predicted = predict(model, head, scene.image, protocol, windows_per_pass=windows_per_pass)
        counts += confusion(predicted, scene.target, scenes.num_classes)
    return scores_of(sum_over_ranks(counts.to(model.world.device)).cpu())


def pixels_by_class(scenes: Scenes, world: World) -> Tensor:
    """The number of pixels of each class in all targets, (C,) int64.

    Decodes every image and target once, before hours of training: the training reads each some thirty times. Ranks
    share the images. Raises InputError that names a damaged file.
    """
    counts = torch.zeros(scenes.num_classes, dtype=torch.int64)
    for scene in prefetch(scenes.read, world.share(len(scenes.names)), threads=READERS, ahead=READERS):
        counts += torch.bincount(scene.target[scene.target != IGNORED].long(), minlength=scenes.num_classes)
    return sum_over_ranks(counts.to(world.device)).cpu()


def _require_classes(name: str, train: Scenes, test: Scenes, world: World) -> None:
    """Raises InputError unless every class occurs in the training targets, and one in the scored targets."""
    counts = pixels_by_class(train, world)
    absent = [str(number) for number in torch.nonzero(counts == 0).flatten().tolist()]
    if absent:
        what = "no class" if len(absent) == len(counts) else f"none of the classes {abbreviated(absent)}"
        raise InputError(
            f"{name}: the masks of the {len(train.names):,} training images have {what} of the {len(counts)}, numbered "
            "from 0. A head cannot learn a class without a pixel. Check the numbers in the masks, num_classes and "
            "ignored, and that all images are there."
        )
    if not pixels_by_class(test, world).any():
        raise InputError(f"{name}: no pixel of the {len(test.names):,} scored images has a class. Check their masks.")


def run(config: SegmentationConfig, model: FrozenModel, output: str) -> list[Result]:
    """Train a head on the training images and score it on the test images: mIoU and two accuracies.

    Raises InputError for bad data, and for a model without patch tokens or with fewer blocks than the protocol reads.
    """
    protocol = PROTOCOLS[config.protocol] if isinstance(config.protocol, str) else config.protocol
    if model.patch_size is None or model.num_blocks is None:
        raise InputError(f"{model.name} has no patch tokens. Segmentation needs a Vision Transformer.")
    if model.num_blocks < protocol.blocks:
        raise InputError(f"{model.name} has {model.num_blocks} blocks; the protocol reads the last {protocol.blocks}.")
    started = time.perf_counter()
    train, test = load_scenes(config.data)
    _require_classes(config.name, train, test, model.world)
    head = train_head(model, train, protocol, seed=config.seed)
    scores = score(model, head, test, protocol, windows_per_pass=WINDOWS_PER_PASS)
    seconds = time.perf_counter() - started
    settings = config.model_dump(mode="json") | {
        "protocol": protocol.model_dump(mode="json"),
        "train_pictures": len(train.names),
        "test_pictures": len(test.names),
        "ious": list(scores.ious),
    }
    values = {
        "mIoU": scores.mean_iou,
        "mean class accuracy": scores.mean_class_accuracy,
        "pixel accuracy": scores.pixel_accuracy,
    }
    return results.make(
        "segmentation",
        config.name,
        model,
        [Score(_protocol_name(protocol), metric, value) for metric, value in values.items()],
        data_hash=hash_json([train.hash, test.hash]),
        settings=settings,
        seconds=seconds,
    )


def _protocol_name(protocol: Protocol) -> str:
    """The name of a published protocol; for another, a description."""
    for name, published in PROTOCOLS.items():
        if protocol == published:
            return name
    many = f", {len(protocol.test_scales)} scales" if len(protocol.test_scales) > 1 else ""
    flip = ", flip" if protocol.flip else ""
    blocks = "last block" if protocol.blocks == 1 else f"last {protocol.blocks} blocks"
    return f"{blocks}, {protocol.image_side} px{many}{flip}, {protocol.steps} steps"


if __name__ == "__main__":
    from evaluation import without_command

    raise SystemExit(without_command("segmentation"))
