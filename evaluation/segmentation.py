"""What a frozen model's patches say of every pixel: a linear head on patch tokens, and its mean IoU.

    ade20k       <path>/images/{training,validation}/  <path>/annotations/{training,validation}/; 0 is no class
    cityscapes   <path>/leftImg8bit/{train,val}/<city>/  <path>/gtFine/{train,val}/<city>/*_labelIds.png; 19 classes
    voc2012      <path>/JPEGImages/  SegmentationClass/  ImageSets/Segmentation/{train,val}.txt; 255 is no class
    folders      folders of images and of masks with the same names
    stamps       cut-out pictures pasted on others: the alpha channel is the mask

Two protocols have names, "linear" and "multiscale": those of DINOv2's published configs, with which its published
numbers were made. Two things differ: pictures are scaled with antialiasing, and logits are laid over the padded picture
that the model saw, not stretched over the one without its padding.

Legend: B pictures, C classes, D channels of a head, H W pixels, h w patches.
"""

# Calling a torch module is typed Any, and some of torch's functions are not typed.
# mypy: disable-error-code="no-any-return, no-untyped-call"

import hashlib
import io
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self, final

import numpy as np
import torch
from PIL import Image, ImageOps
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from curation import storage
from curation.config import Settings
from curation.errors import InputError
from curation.images import ImageLimits, ImageRejected, decode_rgb
from curation.prefetch import prefetch
from curation.sources import SourceConfig, list_files
from evaluation.features import Model
from evaluation.results import Result

IGNORED = 255  # a pixel without a class, in every target here
# What a picture is padded with: ImageNet's mean colour, which the model sees as 0.
PADDING = (124, 116, 104)
# Tries for a crop with more than one class. Cited: mmsegmentation, RandomCrop.
CROP_TRIES = 10
READERS = 2  # threads that read and crop ahead of the model. Assumed.
MAX_LISTED = 5  # assumed: as many names as a person reads

# Cited: cityscapesScripts, labels.py: the 19 classes that are evaluated, in the order of their train ids.
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
ADE20K_CLASSES, VOC_CLASSES = 150, 21

# ------------------------------------------------------------------------------------------------ what is configured


class PublishedData(Settings):
    """A dataset in its published layout."""

    layout: Literal["ade20k", "cityscapes", "voc2012"]
    """Which one. ADE20K is the ADEChallengeData2016 of its scene parsing benchmark."""
    path: str
    """Its folder, local or any fsspec URL: ADEChallengeData2016, VOCdevkit/VOC2012, or that with leftImg8bit/."""


class FolderData(Settings):
    """Images, and masks with the same names: one grey (or palette) value a pixel, the number of its class."""

    layout: Literal["folders"]
    train_images: str
    """Folder, local or any fsspec URL, searched through."""
    train_masks: str
    """Folder with a mask for each of these, of the same path but for the extension."""
    test_images: str
    """The same of the images that are scored."""
    test_masks: str
    num_classes: int = Field(ge=2, le=IGNORED)
    """Classes have the numbers from 0 below this."""
    ignored: int | None = Field(default=IGNORED, ge=0, le=255)
    """The number of pixels that do not count; none when null."""


class StampData(Settings):
    """Pictures made of cut-out ones on others. Those for training and those for scoring share neither."""

    layout: Literal["stamps"]
    stamps: str
    """Folder of PNGs with an alpha channel, searched through; those that are opaque throughout are left out."""
    backgrounds: str
    """Folder of images of any kind, searched through."""
    classes: Literal["foreground", "folder"] = "folder"
    """Whether all stamps are one class, or those in each first folder below `stamps` are. The background is another."""
    side: int = Field(default=224, ge=16)
    """Of the pictures, in pixels."""
    train_pictures: int = Field(default=400, ge=1)
    """Pictures to train on."""
    test_pictures: int = Field(default=100, ge=1)
    """Pictures to score."""
    test_share: float = Field(default=0.25, gt=0, lt=1)
    """Share of the stamps of each class, and of the backgrounds, that only scored pictures are made of."""
    max_stamps: int = Field(default=3, ge=1)
    """Each picture has one to so many."""
    stamp_sides: tuple[float, float] = (0.3, 0.7)
    """Least and greatest longer side of a stamp, in sides of the picture."""
    seed: int = 0
    """Of which stamps go where."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        least, greatest = self.stamp_sides
        if not 0 < least <= greatest <= 1:
            raise ValueError(f"stamp_sides {self.stamp_sides}: expected 0 < least <= greatest <= 1")
        return self


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
    max_share: float = Field(default=0.75, gt=0, le=1)
    """A crop is drawn again, some times, while one class has more of it."""
    distort: bool = True
    """Whether brightness, contrast, saturation and hue of crops vary."""
    batch_size: int = Field(default=16, ge=2)
    """Crops a step."""
    steps: int = Field(default=40_000, ge=1)
    """Of the optimizer."""
    warmup_steps: int = Field(default=1500, ge=0)
    """In which the learning rate rises from 0; all the while it falls to 0 at the end."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Of AdamW."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """Of AdamW, on all parameters."""

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
    data: Annotated[PublishedData | FolderData | StampData, Field(discriminator="layout")]
    """Where the pictures and their masks are."""
    protocol: Literal["linear", "multiscale"] | Protocol = "linear"
    """A published one by its name, or all of one's own."""
    seed: int = 0
    """Of the head, the order of pictures and the crops."""
    windows_per_pass: int = Field(default=4, ge=1)
    """Windows that the model sees at a time when pictures are scored; changes no score but for rounding."""


# ---------------------------------------------------------------------------------------------------------- pictures


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture, and the class of each of its pixels."""

    image: Tensor
    """(3, H, W) uint8."""
    target: Tensor
    """(H, W) uint8: the class, or IGNORED."""


@dataclass(frozen=True, eq=False)
class Scenes:
    """The pictures of one split."""

    names: tuple[str, ...]
    """For messages."""
    num_classes: int
    read: Callable[[int], Scene]
    """The picture of that place. Raises InputError that names the file."""
    hash: str
    """64 hex digits: of all bytes that the pictures and targets are made of."""


def load_scenes(data: PublishedData | FolderData | StampData) -> tuple[Scenes, Scenes]:
    """The pictures to train on, and those to score. Raises InputError for a folder or a mask that is missing."""
    if isinstance(data, StampData):
        return _stamp_scenes(data)
    if isinstance(data, FolderData):
        lookup = _lookup(dict(zip(range(data.num_classes), range(data.num_classes), strict=True)), data.ignored)
        train, test = (data.train_images, data.train_masks), (data.test_images, data.test_masks)
        splits = [_same_names(_by_stem(images), _by_stem(masks), masks) for images, masks in (train, test)]
        num_classes = data.num_classes
    else:
        match data.layout:
            case "ade20k":
                num_classes, names = ADE20K_CLASSES, ("training", "validation")
                lookup = _lookup({value + 1: value for value in range(num_classes)}, 0)
                splits = [_ade20k(data.path, name) for name in names]
            case "cityscapes":
                num_classes, names = len(CITYSCAPES_IDS), ("train", "val")
                lookup = np.full(256, IGNORED, np.int16)
                lookup[list(CITYSCAPES_IDS)] = range(num_classes)
                splits = [_cityscapes(data.path, name) for name in names]
            case "voc2012":
                num_classes, names = VOC_CLASSES, ("train", "val")
                lookup = _lookup({value: value for value in range(num_classes)}, IGNORED)
                splits = [_voc2012(data.path, name) for name in names]
    train_scenes, test_scenes = (_file_scenes(pairs, lookup, num_classes) for pairs in splits)
    return train_scenes, test_scenes


Pair = tuple[str, str]  # an image and its mask


def _ade20k(path: str, split: str) -> list[Pair]:
    masks = storage.join(path, "annotations", split)
    return _same_names(_by_stem(storage.join(path, "images", split)), _by_stem(masks), masks)


def _cityscapes(path: str, split: str) -> list[Pair]:
    masks = storage.join(path, "gtFine", split)
    images = _by_stem(storage.join(path, "leftImg8bit", split), "_leftImg8bit")
    return _same_names(images, _by_stem(masks, "_gtFine_labelIds"), masks)


def _voc2012(path: str, split: str) -> list[Pair]:
    listing = storage.join(path, "ImageSets", "Segmentation", f"{split}.txt")
    try:
        names = storage.read_bytes(listing).decode().split()
    except FileNotFoundError:
        raise InputError(f"No list of images at '{listing}'. Give the folder VOCdevkit/VOC2012.") from None
    if not names:
        raise InputError(f"{listing}: names no image.")
    return [
        (storage.join(path, "JPEGImages", f"{name}.jpg"), storage.join(path, "SegmentationClass", f"{name}.png"))
        for name in names
    ]


def _by_stem(folder: str, suffix: str = "") -> dict[str, str]:
    """Paths by what they are called below `folder`, without the extension and the suffix, which they must have."""
    if not storage.is_folder(folder):
        raise InputError(f"No folder '{folder}'. Check the path of the dataset.")
    found: dict[str, str] = {}
    for file in list_files(SourceConfig(name="segmentation", path=folder, role="holdout")):
        stem = file.path.rpartition(".")[0]
        if stem.endswith(suffix):
            name = stem.removesuffix(suffix)
            if name in found:
                raise InputError(f"{folder}: two files are called '{name}' but for their extension. Remove one.")
            found[name] = storage.join(folder, file.path)
    if not found:
        raise InputError(f"{folder}: no image files{f' that end in {suffix}' if suffix else ''}.")
    return found


def _same_names(images: dict[str, str], masks: dict[str, str], where: str) -> list[Pair]:
    missing = sorted(images.keys() - masks.keys())
    if missing:
        more = f" and {len(missing) - MAX_LISTED} more" if len(missing) > MAX_LISTED else ""
        raise InputError(f"{where}: no mask for {', '.join(missing[:MAX_LISTED])}{more}.")
    return [(path, masks[name]) for name, path in sorted(images.items())]


def _lookup(classes: dict[int, int], ignored: int | None) -> np.ndarray:
    """What each value of a mask means, (256,): a class, IGNORED, or -1 where it means nothing."""
    lookup = np.full(256, -1, np.int16)
    lookup[list(classes)] = list(classes.values())
    if ignored is not None:
        lookup[ignored] = IGNORED
    return lookup


def _file_scenes(pairs: Sequence[Pair], lookup: np.ndarray, num_classes: int) -> Scenes:
    def read(place: int) -> Scene:
        image_path, mask_path = pairs[place]
        image, target = _read_image(image_path), read_mask(mask_path, lookup)
        if image.shape[1:] != target.shape:
            raise InputError(
                f"{mask_path}: the mask has {target.shape[1]} x {target.shape[0]} pixels, and its image {image_path} "
                f"{image.shape[2]} x {image.shape[1]}. Give each image the mask that was made for it."
            )
        return Scene(image, target)

    hashed = storage.hash_json([_hash_of(path) for pair in pairs for path in pair])
    return Scenes(tuple(image for image, _ in pairs), num_classes, read, hashed)


def read_mask(path: str, lookup: np.ndarray) -> Tensor:
    """(H, W) uint8 classes of a mask's values through `lookup` (256,). Raises InputError that names the file."""
    picture = _open_picture(path)
    if picture.mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
        raise InputError(f"{path}: a mask holds one class a pixel; this is a picture of mode {picture.mode}.")
    values = np.asarray(picture).astype(np.int64)
    known = (values >= 0) & (values < 256)
    classes = np.where(known, lookup[np.where(known, values, 0)], -1)
    if (classes < 0).any():
        raise InputError(f"{path}: the mask holds the value {int(values[classes < 0][0])}, which is no class here.")
    return torch.from_numpy(classes.astype(np.uint8))


def _open_picture(path: str) -> Image.Image:
    """A picture with its values as stored: no class is a colour."""
    try:
        picture = Image.open(io.BytesIO(_read_bytes(path)), formats=("PNG", "BMP", "TIFF", "GIF"))
        picture.load()
    # Pillow's parsers raise a dozen kinds on malformed bytes and promise no list.
    except Exception as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a readable PNG, BMP, TIFF or GIF ({type(error).__name__}: {error}).") from None
    return picture


def _read_image(path: str) -> Tensor:
    """(3, H, W) uint8."""
    try:
        picture = decode_rgb(_read_bytes(path), ImageLimits(min_side=1))
    except ImageRejected as error:
        raise InputError(f"{path}: the image cannot be used: {error}.") from None
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _read_bytes(path: str) -> bytes:
    try:
        return storage.read_bytes(path)
    except FileNotFoundError:
        raise InputError(f"No file at '{path}'.") from None
    except OSError as error:
        raise InputError(f"Cannot read '{path}': {error}.") from None


def _hash_of(path: str) -> str:
    return hashlib.sha256(_read_bytes(path)).hexdigest()


# ------------------------------------------------------------------------------------------------ stamps on pictures


def _stamp_scenes(data: StampData) -> tuple[Scenes, Scenes]:
    """Scenes that are made when they are read: of the config and their place alone."""
    stamps: dict[str, tuple[str, str]] = {}  # by the hash of the bytes, so that none is in both splits: class and path
    for name, path in _by_stem(data.stamps).items():
        alpha = np.asarray(_open_picture(path).convert("RGBA"))[..., 3]
        if alpha.min() < 128 <= alpha.max():
            folder = name.partition("/")[0] if data.classes == "folder" and "/" in name else "stamp"
            stamps.setdefault(_hash_of(path), (folder, path))
    backgrounds = {_hash_of(path): path for path in _by_stem(data.backgrounds).values()}
    classes = sorted({folder for folder, _ in stamps.values()})
    if not classes:
        raise InputError(f"{data.stamps}: no PNG with an alpha channel that is partly transparent.")
    if len(classes) >= IGNORED:
        raise InputError(
            f"{data.stamps}: {len(classes)} folders; at most {IGNORED - 1} classes of stamps are possible."
        )
    own = [[key for key, (folder, _) in stamps.items() if folder == one] for one in classes]
    halves = [_divide(keys, data) for keys in (*own, list(backgrounds))]
    split: list[Scenes] = []
    for number, count in enumerate((data.train_pictures, data.test_pictures)):
        *of_class, behind = [half[number] for half in halves]
        chosen = [(stamps[key][1], label) for label, keys in enumerate(of_class, 1) for key in keys]
        if not chosen or not behind:
            raise InputError(
                f"{data.stamps}: {len(stamps)} stamps and {len(backgrounds)} backgrounds are too few to divide; a "
                "class needs two, and so do the backgrounds."
            )
        facts = [data.model_dump(mode="json"), number, [*of_class, behind]]
        paths = [backgrounds[key] for key in behind]
        split.append(_pasted_scenes(data, number, count, chosen, paths, len(classes) + 1, storage.hash_json(facts)))
    return split[0], split[1]


def _divide(keys: list[str], data: StampData) -> tuple[list[str], list[str]]:
    """Those to train on and those to score, in an order of the seed."""
    ordered = sorted(keys, key=lambda key: hashlib.sha256(f"{data.seed} {key}".encode()).digest())
    num_test = max(1, round(data.test_share * len(ordered))) if len(ordered) > 1 else 0
    return ordered[num_test:], ordered[:num_test]


def _pasted_scenes(
    data: StampData,
    split: int,
    count: int,
    stamps: list[tuple[str, int]],
    backgrounds: list[str],
    num_classes: int,
    content_hash: str,
) -> Scenes:
    side = data.side

    def read(place: int) -> Scene:
        random = np.random.default_rng([data.seed, split, place])
        behind = Image.fromarray(_read_image(backgrounds[random.integers(len(backgrounds))]).permute(1, 2, 0).numpy())
        canvas = ImageOps.fit(behind, (side, side), Image.Resampling.BICUBIC)
        target = np.zeros((side, side), np.uint8)
        for _ in range(random.integers(1, data.max_stamps + 1)):
            path, label = stamps[random.integers(len(stamps))]
            stamp = _open_picture(path).convert("RGBA")
            if random.random() < 0.5:
                stamp = stamp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            factor = random.uniform(*data.stamp_sides) * side / max(stamp.size)
            width, height = (max(1, round(length * factor)) for length in stamp.size)
            stamp = stamp.resize((width, height), Image.Resampling.BICUBIC)
            left, top = int(random.integers(side - width + 1)), int(random.integers(side - height + 1))
            canvas.paste(stamp, (left, top), stamp)
            covered = np.asarray(stamp)[..., 3] >= 128
            target[top : top + height, left : left + width][covered] = label
        return Scene(torch.from_numpy(np.array(canvas)).permute(2, 0, 1), torch.from_numpy(target))

    names = tuple(f"{data.stamps} on {data.backgrounds}, {place}" for place in range(count))
    return Scenes(names, num_classes, read, content_hash)


# --------------------------------------------------------------------------------------------------- crops and order


def crop_of(scene: Scene, protocol: Protocol, random: np.random.Generator) -> Scene:
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
        if (counts > 0).sum() > 1 and counts.max() < protocol.max_share * counts.sum():
            break
    image = scaled.image[:, top : top + height, left : left + width]
    if random.random() < 0.5:
        image, target = image.flip(2), target.flip(1)
    if protocol.distort:
        image = _distorted(image, random)
    beyond = (0, protocol.window - width, 0, protocol.window - height)
    return Scene(_pad(image, beyond), functional.pad(target, beyond, value=IGNORED))


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


def _pad(image: Tensor, beyond: tuple[int, int, int, int]) -> Tensor:
    """(..., 3, H, W) uint8 with `beyond` pixels of the mean colour left, right, above and below."""
    if not any(beyond):
        return image
    left, right, above, below = beyond
    height, width = image.shape[-2:]
    color = torch.tensor(PADDING, dtype=torch.uint8, device=image.device)[:, None, None]
    padded = color.expand(*image.shape[:-2], height + above + below, width + left + right).clone()
    padded[..., above : above + height, left : left + width] = image
    return padded


def _order(num_scenes: int, seed: int) -> Iterator[int]:
    """Which picture comes next, without end: permutations of all, one after another."""
    for epoch in itertools.count():
        yield from np.random.default_rng([seed, 0, epoch]).permutation(num_scenes).tolist()


# ---------------------------------------------------------------------------------------------------------- the head


@final
class LinearHead(nn.Module):
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


def pixel_logits(model: Model, head: LinearHead, pixels: Tensor, num_blocks: int) -> Tensor:
    """Logits of every pixel: (B, 3, H, W) uint8 to (B, C, H, W) float32 on the model's device.

    Sides that are no multiple of the patch are padded on both sides; the padding's logits are cut off again.
    """
    assert model.patch_size is not None and model.num_blocks is not None
    height, width = pixels.shape[-2:]
    down, across = -height % model.patch_size, -width % model.patch_size
    padded = _pad(pixels, (across // 2, across - across // 2, down // 2, down - down // 2))
    blocks = range(model.num_blocks - num_blocks, model.num_blocks)
    tokens = torch.cat([patches for patches, _ in model.intermediate(padded, blocks)], dim=1)
    logits = functional.interpolate(head(tokens), size=padded.shape[-2:], mode="bilinear", align_corners=False)
    return logits[..., down // 2 : down // 2 + height, across // 2 : across // 2 + width]


def learning_rate(step: int, protocol: Protocol) -> float:
    """It falls in a line to 0 at the last step, and rises in a line from 0 meanwhile at the start."""
    warmup = min(1.0, step / protocol.warmup_steps) if protocol.warmup_steps else 1.0
    return protocol.learning_rate * (1 - step / protocol.steps) * warmup


def train_head(model: Model, scenes: Scenes, protocol: Protocol, *, seed: int = 0) -> LinearHead:
    """A head trained on `scenes`, in evaluation mode. The same seed gives the same head on the same device; on a GPU
    but for rounding."""
    head = LinearHead(model.embed_dim * protocol.blocks, scenes.num_classes, seed).to(model.device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.0, weight_decay=protocol.weight_decay)
    for step, (pixels, targets) in enumerate(_batches(scenes, protocol, seed)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, protocol)
        logits = pixel_logits(model, head, pixels.to(model.device), protocol.blocks)
        targets = targets.to(model.device).long()
        loss = functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        # All pixels count in the mean, those without a class as 0. Cited: mmsegmentation's avg_non_ignore, off.
        (loss / targets.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return head.eval()


def _batches(scenes: Scenes, protocol: Protocol, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    size = protocol.batch_size

    def make(item: tuple[int, int]) -> Scene:
        position, place = item
        return crop_of(scenes.read(place), protocol, np.random.default_rng([seed, 1, position]))

    places = zip(range(protocol.steps * size), _order(len(scenes.names), seed), strict=False)
    crops = prefetch(make, places, threads=READERS, ahead=2 * size)
    for _ in range(protocol.steps):
        batch = [next(crops) for _ in range(size)]
        yield torch.stack([crop.image for crop in batch]), torch.stack([crop.target for crop in batch])


# ------------------------------------------------------------------------------------------------------------- scores


@torch.no_grad()
def predict(model: Model, head: LinearHead, image: Tensor, protocol: Protocol, *, windows_per_pass: int = 4) -> Tensor:
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


class Scores(Settings):
    """Shares between 0 and 1. Classes that neither occur nor are predicted count in none of the means."""

    mean_iou: float
    mean_class_accuracy: float
    """Over the classes that occur."""
    pixel_accuracy: float
    ious: tuple[float | None, ...]
    """By class; None where it neither occurs nor is predicted."""


def scores_of(counts: Tensor) -> Scores:
    """The scores of a confusion matrix (C, C). Raises InputError where no pixel has a class."""
    counts = counts.double()
    hit, occurs, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    if not occurs.any():
        raise InputError("No pixel of the scored pictures has a class.")
    union = occurs + predicted - hit
    ious = [float(own / total) if total else None for own, total in zip(hit, union, strict=True)]
    present = [iou for iou in ious if iou is not None]
    return Scores(
        mean_iou=math.fsum(present) / len(present),
        mean_class_accuracy=float((hit[occurs > 0] / occurs[occurs > 0]).mean()),
        pixel_accuracy=float(hit.sum() / counts.sum()),
        ious=tuple(ious),
    )


def score(model: Model, head: LinearHead, scenes: Scenes, protocol: Protocol, *, windows_per_pass: int = 4) -> Scores:
    """The scores of `head` on `scenes`, one picture at a time."""
    counts = torch.zeros(scenes.num_classes, scenes.num_classes, dtype=torch.int64)
    for scene in prefetch(scenes.read, range(len(scenes.names)), threads=READERS, ahead=READERS):
        predicted = predict(model, head, scene.image, protocol, windows_per_pass=windows_per_pass)
        counts += confusion(predicted, scene.target, scenes.num_classes)
    return scores_of(counts)


def run(config: SegmentationConfig, model: Model, output: str) -> list[Result]:
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
    scores = score(model, head, test, protocol, windows_per_pass=config.windows_per_pass)
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
    return [
        Result(
            evaluation="segmentation",
            dataset=config.name,
            model=model.name,
            model_hash=model.hash,
            data_hash=storage.hash_json([train.hash, test.hash]),
            protocol=_protocol_name(protocol),
            settings=settings,
            metric=metric,
            value=value,
            seconds=seconds,
        )
        for metric, value in found.items()
    ]


def _protocol_name(protocol: Protocol) -> str:
    """Its name where it is a published one, else what it is."""
    for name, published in PROTOCOLS.items():
        if protocol == published:
            return name
    many = f", {len(protocol.test_scales)} scales" if len(protocol.test_scales) > 1 else ""
    flip = ", flip" if protocol.flip else ""
    return f"{protocol.blocks} blocks, {protocol.image_side} px{many}{flip}, {protocol.steps} steps"
