"""Reads images with a class for every pixel, the data of segmentation.

ade20k       <path>/images/{training,validation}/  <path>/annotations/{training,validation}/; 0 is no class
cityscapes   <path>/leftImg8bit/{train,val}/<city>/  <path>/gtFine/{train,val}/<city>/*_labelIds.png; 19 classes
voc2012      <path>/JPEGImages/  SegmentationClass/  ImageSets/Segmentation/{train,val}.txt; 255 is no class
folders      folders of images and of masks with the same names
stamps       cut-out images pasted on others; the alpha channel is the mask
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps
from pydantic import Field
from torch import Tensor

from curation.config import IsPath, Settings
from curation.errors import InputError
from curation.files import paths
from curation.files.hashes import hash_json, sha256_of_bytes
from curation.files.prefetch import prefetch
from curation.images.decode import ImageLimits, read_header
from curation.images.sources import SourceConfig, list_files
from evaluation.data.image_files import read_bytes, read_rgb, rejects_named
from evaluation.data.splits import abbreviated

IGNORED = 255  # a pixel without a class, in every target here
LIMITS = ImageLimits(min_side=1)  # an image of any size counts

# Cited: cityscapesScripts, labels.py: the 19 evaluated classes, in the order of their train ids.
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
ADE20K_CLASSES, VOC_CLASSES = 150, 21

# Images made of stamps; all assumed.
TEST_SHARE = 0.25  # of the stamps of each class and of the backgrounds: reserved for scored images
MAX_STAMPS = 3  # in one image, which has at least one
STAMP_SIDES = (0.3, 0.7)  # range of the longer side of a stamp, in sides of the image


class PublishedData(Settings):
    """A dataset in its published layout."""

    layout: Literal["ade20k", "cityscapes", "voc2012"]
    """Name of the dataset. ADE20K is ADEChallengeData2016, of its scene parsing benchmark."""
    path: Annotated[str, IsPath]
    """Its folder, local or any fsspec URL: ADEChallengeData2016, VOCdevkit/VOC2012, or the folder of leftImg8bit/."""


class FolderData(Settings):
    """Images, and masks with the same names. A mask has one grey (or palette) value a pixel: its class."""

    layout: Literal["folders"]
    """The kind of data; it decides which other keys the table has."""
    train_images: Annotated[str, IsPath]
    """Folder, local or any fsspec URL; its subfolders are searched too."""
    train_masks: Annotated[str, IsPath]
    """Folder with a mask for each of these, at the same path with another extension."""
    test_images: Annotated[str, IsPath]
    """The same for the scored images."""
    test_masks: Annotated[str, IsPath]
    """Folder with the masks of the scored images."""
    num_classes: int = Field(ge=2, le=IGNORED)
    """Classes are numbered from 0."""
    ignored: tuple[Annotated[int, Field(ge=0, le=255)], ...] = (IGNORED,)
    """Values of pixels that do not count."""


class StampData(Settings):
    """Images made by pasting cut-outs on backgrounds. Training and scored images share neither."""

    layout: Literal["stamps"]
    """The kind of data; it decides which other keys the table has."""
    stamps: Annotated[str, IsPath]
    """Folder of PNGs with an alpha channel; its subfolders are searched too. Opaque PNGs are left out."""
    backgrounds: Annotated[tuple[str, ...], IsPath] = Field(min_length=1)
    """Folders of images of any kind; their subfolders are searched too. All that they show counts as background, so
    there should be no animals behind stamps of animals."""
    classes: Literal["foreground", "folder"] = "folder"
    """"foreground": all stamps are one class. "folder": each folder directly below `stamps` is a class. The background
    is a further class."""
    side: int = Field(default=224, ge=16)
    """Side of the images in pixels."""
    train_pictures: int = Field(default=400, ge=1)
    """Number of images to train on."""
    test_pictures: int = Field(default=100, ge=1)
    """Number of scored images."""


SceneData = PublishedData | FolderData | StampData


@dataclass(frozen=True, eq=False)
class Scene:
    """An image, and the class of each of its pixels."""

    image: Tensor
    """(3, H, W) uint8."""
    target: Tensor
    """(H, W) uint8: the class, or IGNORED."""


@dataclass(frozen=True, eq=False)
class Scenes:
    """The images of one split."""

    names: tuple[str, ...]
    """For messages."""
    num_classes: int
    read: Callable[[int], Scene]
    """The image with that number. Raises InputError that names the file."""
    hash: str
    """64 hex digits: of all bytes that the images and targets are made from."""


def load_scenes(data: SceneData, *, stamp_seed: int = 0) -> tuple[Scenes, Scenes]:
    """The training images and the scored images. Raises InputError for a missing folder or mask.

    stamp_seed: draws which stamps are pasted where. It is the same for every model, so that scores can be compared.
    """
    if isinstance(data, StampData):
        return _stamp_scenes(data, stamp_seed)
    if isinstance(data, FolderData):
        lookup = _lookup(dict(zip(range(data.num_classes), range(data.num_classes), strict=True)), data.ignored)
        train, test = (data.train_images, data.train_masks), (data.test_images, data.test_masks)
        splits = [
            _pair_by_name(_paths_by_name(images), _paths_by_name(masks), masks) for images, masks in (train, test)
        ]
        num_classes = data.num_classes
    else:
        match data.layout:
            case "ade20k":
                num_classes, names = ADE20K_CLASSES, ("training", "validation")
                lookup = _lookup({value + 1: value for value in range(num_classes)}, (0,))
                splits = [_ade20k(data.path, name) for name in names]
            case "cityscapes":
                num_classes, names = len(CITYSCAPES_IDS), ("train", "val")
                lookup = np.full(256, IGNORED, np.int16)
                lookup[list(CITYSCAPES_IDS)] = range(num_classes)
                splits = [_cityscapes(data.path, name) for name in names]
            case "voc2012":
                num_classes, names = VOC_CLASSES, ("train", "val")
                lookup = _lookup({value: value for value in range(num_classes)}, (IGNORED,))
                splits = [_voc2012(data.path, name) for name in names]
    train_scenes, test_scenes = (_file_scenes(pairs, lookup, num_classes) for pairs in splits)
    return train_scenes, test_scenes


Pair = tuple[str, str]  # an image and its mask


def _ade20k(path: str, split: str) -> list[Pair]:
    masks = paths.join(path, "annotations", split)
    return _pair_by_name(_paths_by_name(paths.join(path, "images", split)), _paths_by_name(masks), masks)


def _cityscapes(path: str, split: str) -> list[Pair]:
    masks = paths.join(path, "gtFine", split)
    images = _paths_by_name(paths.join(path, "leftImg8bit", split), "_leftImg8bit")
    return _pair_by_name(images, _paths_by_name(masks, "_gtFine_labelIds"), masks)


def _voc2012(path: str, split: str) -> list[Pair]:
    listing = paths.join(path, "ImageSets", "Segmentation", f"{split}.txt")
    try:
        names = paths.read_bytes(listing).decode().split()
    except FileNotFoundError:
        raise InputError(f"No list of images at '{listing}'. Give the folder VOCdevkit/VOC2012.") from None
    if not names:
        raise InputError(f"{listing}: names no image.")
    return [
        (paths.join(path, "JPEGImages", f"{name}.jpg"), paths.join(path, "SegmentationClass", f"{name}.png"))
        for name in names
    ]


def _paths_by_name(folder: str, suffix: str = "") -> dict[str, str]:
    """Paths by their names below `folder`, without extension and suffix. Names that lack the suffix are left out."""
    if not paths.is_folder(folder):
        raise InputError(f"No folder '{folder}'. Check the path of the dataset.")
    path_by_name: dict[str, str] = {}
    for file in list_files(SourceConfig(name="segmentation", path=folder, role="holdout")):
        stem = file.path.rpartition(".")[0]
        if stem.endswith(suffix):
            name = stem.removesuffix(suffix)
            if name in path_by_name:
                raise InputError(f"{folder}: two files are called '{name}' but for their extension. Remove one.")
            path_by_name[name] = paths.join(folder, file.path)
    if not path_by_name:
        raise InputError(f"{folder}: no image files{f' that end in {suffix}' if suffix else ''}.")
    return path_by_name


def _pair_by_name(images: dict[str, str], masks: dict[str, str], mask_folder: str) -> list[Pair]:
    missing = sorted(images.keys() - masks.keys())
    if missing:
        raise InputError(f"{mask_folder}: no mask for {abbreviated(missing)}.")
    return [(path, masks[name]) for name, path in sorted(images.items())]


def _lookup(classes: dict[int, int], ignored: Sequence[int]) -> np.ndarray:
    """The class of each value of a mask, (256,); IGNORED, or -1 for a value that has no meaning."""
    lookup = np.full(256, -1, np.int16)
    lookup[list(classes)] = list(classes.values())
    lookup[list(ignored)] = IGNORED
    return lookup


def _file_scenes(pairs: Sequence[Pair], lookup: np.ndarray, num_classes: int) -> Scenes:
    def read(number: int) -> Scene:
        image_path, mask_path = pairs[number]
        image, target = read_rgb(image_path, LIMITS), read_mask(mask_path, lookup)
        _require_same(pairs[number], (image.shape[2], image.shape[1]), (target.shape[1], target.shape[0]))
        return Scene(image, target)

    hashes = prefetch(_checked_hashes, pairs)
    content_hash = hash_json([file_hash for pair in hashes for file_hash in pair])
    return Scenes(tuple(image for image, _ in pairs), num_classes, read, content_hash)


def _checked_hashes(pair: Pair) -> list[str]:
    """The hashes of an image and its mask. Raises InputError where their headers differ, before any training."""
    image, mask = (read_bytes(path) for path in pair)
    with rejects_named(pair[0]):
        header = read_header(image, LIMITS)
    mask_size = _open_picture(pair[1], mask).size
    # A PNG may state its rotation after its pixels, so width and height may be swapped here. `read` checks again.
    if {header.width, header.height} != set(mask_size):
        _require_same(pair, (header.width, header.height), mask_size)
    return [sha256_of_bytes(data) for data in (image, mask)]


def _require_same(pair: Pair, image_size: tuple[int, int], mask_size: tuple[int, int]) -> None:
    if image_size != mask_size:
        raise InputError(
            f"{pair[1]}: the mask has {mask_size[0]} x {mask_size[1]} pixels, and its image {pair[0]} "
            f"{image_size[0]} x {image_size[1]}. Give each image its own mask."
        )


def read_mask(path: str, lookup: np.ndarray) -> Tensor:
    """The classes (H, W) uint8 of a mask, by `lookup` (256,). Raises InputError that names the file."""
    data = read_bytes(path)
    scale = _scale_of_greys(_open_picture(path, data))
    picture = _open_picture(path, data, load=True)
    if picture.mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
        raise InputError(f"{path}: a mask has one class a pixel; this image has mode {picture.mode}.")
    values = np.asarray(picture).astype(np.int64) // scale
    known = (values >= 0) & (values < 256)
    classes = np.where(known, lookup[np.where(known, values, 0)], -1)
    if (classes < 0).any():
        raise InputError(f"{path}: the mask has the value {int(values[classes < 0][0])}, which is no class.")
    return torch.from_numpy(classes.astype(np.uint8))


def _scale_of_greys(picture: ImageFile.ImageFile) -> int:
    """The factor by which Pillow multiplies the values of a picture that is not loaded yet: greys of 2 and 4 bits."""
    arguments = picture.tile[0].args if picture.tile else ""
    raw_mode = arguments[0] if isinstance(arguments, tuple) else arguments
    return {"L;2": 0x55, "L;4": 0x11}.get(str(raw_mode).removesuffix("R"), 1)


def _loaded(path: str) -> Image.Image:
    """An image with its values as stored: they are classes, not colours."""
    return _open_picture(path, read_bytes(path), load=True)


def _open_picture(path: str, data: bytes, *, load: bool = False) -> ImageFile.ImageFile:
    try:
        picture = Image.open(io.BytesIO(data), formats=("PNG", "BMP", "TIFF", "GIF"))
        if load:
            picture.load()
    # Pillow's parsers raise many kinds of exceptions on malformed bytes and promise no list.
    except Exception as error:
        raise InputError(f"{path}: not a readable PNG, BMP, TIFF or GIF ({type(error).__name__}: {error}).") from None
    return picture


def _hash_of(path: str) -> str:
    return sha256_of_bytes(read_bytes(path))


# -------------------------------------------------------------------------------------------------- stamps on images


def _stamp_scenes(data: StampData, seed: int) -> tuple[Scenes, Scenes]:
    """Scenes that are made when they are read, as functions of the config, the seed and their number alone."""
    # Class and path by the hash of the bytes, so that no stamp is in both splits.
    stamps: dict[str, tuple[str, str]] = {}
    for name, path in _paths_by_name(data.stamps).items():
        alpha = np.asarray(_loaded(path).convert("RGBA"))[..., 3]
        if alpha.min() < 128 <= alpha.max():
            folder = name.partition("/")[0] if data.classes == "folder" and "/" in name else "stamp"
            stamps.setdefault(_hash_of(path), (folder, path))
    background_paths = [path for folder in data.backgrounds for path in _paths_by_name(folder).values()]
    backgrounds = {_hash_of(path): path for path in background_paths}
    classes = sorted({folder for folder, _ in stamps.values()})
    if not classes:
        raise InputError(f"{data.stamps}: no PNG with an alpha channel that is partly transparent.")
    if len(classes) >= IGNORED:
        raise InputError(
            f"{data.stamps}: {len(classes)} folders; at most {IGNORED - 1} classes of stamps are possible."
        )
    keys_by_class = [[key for key, (folder, _) in stamps.items() if folder == name] for name in classes]
    halves = [_train_and_test_keys(keys, seed) for keys in (*keys_by_class, list(backgrounds))]
    split: list[Scenes] = []
    for number, count in enumerate((data.train_pictures, data.test_pictures)):
        *class_keys, background_keys = [half[number] for half in halves]
        labelled = [(stamps[key][1], label) for label, keys in enumerate(class_keys, 1) for key in keys]
        if not labelled or not background_keys:
            raise InputError(
                f"{data.stamps}: {len(stamps)} stamps and {len(backgrounds)} backgrounds are too few to divide. Each "
                "class needs at least two stamps, and at least two backgrounds are needed."
            )
        drawn_by = {"test_share": TEST_SHARE, "max_stamps": MAX_STAMPS, "stamp_sides": STAMP_SIDES, "seed": seed}
        facts = [data.model_dump(mode="json") | drawn_by, number, [*class_keys, background_keys]]
        files = [backgrounds[key] for key in background_keys]
        split.append(_pasted_scenes(data, seed, number, count, labelled, files, len(classes) + 1, hash_json(facts)))
    return split[0], split[1]


def _train_and_test_keys(keys: list[str], seed: int) -> tuple[list[str], list[str]]:
    """The keys for training and those for scored images, in an order drawn by the seed."""
    ordered = sorted(keys, key=lambda key: sha256_of_bytes(f"{seed} {key}".encode()))
    num_test = max(1, round(TEST_SHARE * len(ordered))) if len(ordered) > 1 else 0
    return ordered[num_test:], ordered[:num_test]


def _pasted_scenes(
    data: StampData,
    seed: int,
    split: int,
    count: int,
    stamps: list[tuple[str, int]],
    backgrounds: list[str],
    num_classes: int,
    content_hash: str,
) -> Scenes:
    side = data.side

    def read(number: int) -> Scene:
        random = np.random.default_rng([seed, split, number])
        background_path = backgrounds[random.integers(len(backgrounds))]
        background = Image.fromarray(read_rgb(background_path, LIMITS).permute(1, 2, 0).numpy())
        canvas = ImageOps.fit(background, (side, side), Image.Resampling.BICUBIC)
        target = np.zeros((side, side), np.uint8)
        for _ in range(random.integers(1, MAX_STAMPS + 1)):
            path, label = stamps[random.integers(len(stamps))]
            stamp = _loaded(path).convert("RGBA")
            if random.random() < 0.5:
                stamp = stamp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            factor = random.uniform(*STAMP_SIDES) * side / max(stamp.size)
            width, height = (max(1, round(length * factor)) for length in stamp.size)
            stamp = stamp.resize((width, height), Image.Resampling.BICUBIC)
            left, top = int(random.integers(side - width + 1)), int(random.integers(side - height + 1))
            canvas.paste(stamp, (left, top), stamp)
            covered = np.asarray(stamp)[..., 3] >= 128
            target[top : top + height, left : left + width][covered] = label
        return Scene(torch.from_numpy(np.array(canvas)).permute(2, 0, 1), torch.from_numpy(target))

    names = tuple(f"image {number} of {data.stamps}" for number in range(count))
    return Scenes(names, num_classes, read, content_hash)
