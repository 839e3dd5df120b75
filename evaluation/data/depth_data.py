"""Reads images with depth maps: the published data sets in their released layouts, and any folder.

The layouts are drawn at the top of evaluation/depth.py.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from torch import Tensor

from curation.config import IsPath, Settings
from curation.errors import InputError, UserError
from curation.files import paths
from curation.files.hashes import sha256_of_files
from curation.images.decode import ImageLimits
from evaluation.data.image_files import read_bytes, read_rgb

LayoutName = Literal["nyu", "nyu_arrays", "kitti", "sun_rgbd", "folder"]
Crop = Literal["none", "eigen", "garg"]
# The image inside the white border of NYU's frames: rows, then columns. Cited: BTS and BinsFormer's toolbox.
NYU_INSIDE = (slice(45, 472), slice(43, 608))
KITTI_ROWS, KITTI_COLUMNS = 352, 1216  # the bottom rows and the middle columns; cited: the same ("KB crop")
# Layout "folder": subfolders of the images and of the depths. Ours.
FOLDER_IMAGES, FOLDER_DEPTHS = "rgb", "depth"


@dataclass(frozen=True)
class DepthLayout:
    """Facts of one published data set."""

    train_list: str | None
    test_list: str | None
    units_per_metre: float
    max_depth: float
    """Metres. Greater depths are neither trained on nor scored."""
    crop: Crop
    """The part of a test image that is scored. "eigen": rows 45 to 470 and columns 41 to 600, made for 480 x 640.
    "garg": shares of the sides, made for KITTI. Cited: Eigen et al. (arXiv 1406.2283), Garg et al. (arXiv 1603.04992),
    as in BinsFormer's toolbox."""


LAYOUTS: dict[LayoutName, DepthLayout] = {
    "nyu": DepthLayout("nyu_train.txt", "nyu_test.txt", 1000, 10, "eigen"),
    "nyu_arrays": DepthLayout(None, None, 1, 10, "eigen"),
    "kitti": DepthLayout("kitti_eigen_train.txt", "kitti_eigen_test.txt", 256, 80, "garg"),
    "sun_rgbd": DepthLayout(None, "SUNRGBD_val_splits.txt", 1000, 8, "eigen"),
    "folder": DepthLayout(None, None, 1000, 10, "none"),
}


class DepthDataConfig(Settings):
    """Images with their depths."""

    name: str
    """Name of the data in results. Published numbers exist for "nyu", "kitti" and "sun_rgbd"."""
    layout: LayoutName
    """How the files are arranged; see the top of evaluation/depth.py."""
    folder: Annotated[str, IsPath]
    """Folder of the files."""
    units_per_metre: float = Field(default=1000, gt=0)
    """Layout "folder": the PNG value of one metre."""


# ---- reading


@dataclass(frozen=True)
class DepthSample:
    """The files of an image and of its depth."""

    image: str
    depth: str
    row: int | None = None
    """The row in both files, where they are arrays of many images."""


def find_samples(data: DepthDataConfig, split: Literal["train", "test"]) -> list[DepthSample]:
    """The pairs of a data set, ordered by the names of the images. Raises InputError where there are none."""
    if data.layout == "folder":
        samples = _pairs_of_folder(data)
    elif data.layout == "nyu_arrays":
        files = [paths.join(data.folder, f"eigen_test_{kind}.npy") for kind in ("rgb", "depth")]
        lengths = [len(_array(file)) for file in files]
        if lengths[0] != lengths[1]:
            raise InputError(f"{files[0]} has {lengths[0]} images, and {files[1]} {lengths[1]} depths.")
        samples = [DepthSample(files[0], files[1], row) for row in range(lengths[0])]
    else:
        samples = _pairs_of_list(data, split)
    if not samples:
        raise InputError(f"{data.folder}: no image with a depth in layout '{data.layout}'. Check the folder.")
    return samples


def _pairs_of_list(data: DepthDataConfig, split: Literal["train", "test"]) -> list[DepthSample]:
    layout = LAYOUTS[data.layout]
    name = layout.train_list if split == "train" else layout.test_list
    assert name is not None
    path = paths.join(data.folder, name)
    try:
        lines = paths.read_bytes(path).decode().splitlines()
    except FileNotFoundError:
        raise InputError(
            f"No list of pairs at '{path}'. Layout '{data.layout}' needs it for its {split} split."
        ) from None
    subfolders = ("input", "gt_depth") if data.layout == "kitti" else ("", "")
    samples = []
    for number, line in enumerate(lines, 1):
        parts = line.split()
        if not parts or parts[1:2] == ["None"]:  # KITTI: 45 frames of the test have no ground truth
            continue
        if len(parts) < 2:
            raise InputError(f"{path}, line {number}: expected an image and its depth. Found: {line!r}.")
        image, depth = (
            paths.join(data.folder, subfolder, part.lstrip("/"))
            for subfolder, part in zip(subfolders, parts[:2], strict=True)
        )
        samples.append(DepthSample(image, depth))
    return sorted(samples, key=lambda sample: sample.image)


def _pairs_of_folder(data: DepthDataConfig) -> list[DepthSample]:
    files_by_stem: list[dict[str, str]] = []
    for subfolder in (FOLDER_IMAGES, FOLDER_DEPTHS):
        folder = paths.join(data.folder, subfolder)
        names = [name for name in paths.list_names(folder) if not name.startswith(".")]
        if not names:
            raise InputError(f"No files in '{folder}'. Layout 'folder' has {FOLDER_IMAGES}/ and {FOLDER_DEPTHS}/.")
        files_by_stem.append({PurePosixPath(name).stem: paths.join(folder, name) for name in names})
    images, depths = files_by_stem
    if unpaired := sorted(images.keys() ^ depths.keys()):
        raise InputError(
            f"{data.folder}: {len(unpaired)} of the images and depths have no partner of the same name, such as "
            f"'{unpaired[0]}'. Remove them."
        )
    return [DepthSample(images[name], depths[name]) for name in sorted(images)]


def read_sample(sample: DepthSample, data: DepthDataConfig) -> tuple[Tensor, Tensor]:
    """An image (3, H, W) uint8 and its depth (H, W) float32 in metres, 0 where unknown. KITTI's are cropped.

    Raises InputError.
    """
    image, depth = _read_image(sample), _read_depth(sample, data)
    if image.shape[1:] != depth.shape:
        raise InputError(
            f"{sample.depth} has {depth.shape[0]} x {depth.shape[1]} pixels, its image {sample.image} has "
            f"{image.shape[1]} x {image.shape[2]}. They must have the same size."
        )
    if not np.isfinite(depth).all() or depth.min() < 0:
        raise InputError(f"{sample.depth}: depths that are negative or not finite. Write 0 for an unknown depth.")
    if data.layout.startswith("nyu") and depth.shape != (480, 640):
        raise InputError(f"{sample.image} has {depth.shape[0]} x {depth.shape[1]} pixels; NYU's have 480 x 640.")
    if data.layout == "kitti":
        rows, columns = depth.shape
        if rows < KITTI_ROWS or columns < KITTI_COLUMNS:
            raise InputError(f"{sample.image} has {rows} x {columns} pixels; KITTI's have at least 352 x 1216.")
        left = (columns - KITTI_COLUMNS) // 2
        inside = (slice(rows - KITTI_ROWS, None), slice(left, left + KITTI_COLUMNS))
        image, depth = image[:, *inside], depth[inside]
    return torch.from_numpy(image.copy()), torch.from_numpy(depth.copy())


def _read_image(sample: DepthSample) -> NDArray[np.uint8]:
    if sample.row is not None:
        return np.asarray(_array(sample.image)[sample.row], np.uint8).transpose(2, 0, 1)
    pixels: NDArray[np.uint8] = read_rgb(sample.image, ImageLimits()).numpy()
    return pixels


def _read_depth(sample: DepthSample, data: DepthDataConfig) -> NDArray[np.float32]:
    if sample.row is not None:
        return _two_axes(np.asarray(_array(sample.depth)[sample.row], np.float32), sample.depth)
    content = read_bytes(sample.depth)
    if sample.depth.endswith(".npy"):
        with _named(sample.depth, ".npy array of numbers"):
            depths: NDArray[np.float32] = np.load(io.BytesIO(content), allow_pickle=False).astype(np.float32)
        return _two_axes(depths, sample.depth)
    with _named(sample.depth, "PNG"), Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
        if not picture.mode.startswith("I"):  # I;16, or I in older versions of Pillow
            raise InputError(f"{sample.depth} is a PNG of mode {picture.mode}; a depth has one channel of 16 bits.")
        values = np.asarray(picture).astype(np.uint16)
    if data.layout == "sun_rgbd":
        metres = (values >> 3 | values << 13).astype(np.float32) / 1000
        return np.minimum(metres, np.float32(LAYOUTS["sun_rgbd"].max_depth))
    unit = data.units_per_metre if data.layout == "folder" else LAYOUTS[data.layout].units_per_metre
    return values.astype(np.float32) / np.float32(unit)


@contextmanager
def _named(path: str, kind: str) -> Iterator[None]:
    """Turns the exceptions of Pillow and NumPy for malformed bytes, of many kinds, into an InputError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise InputError(f"{path}: not a readable {kind} ({type(error).__name__}: {error}). Copy it again.") from None


def _two_axes(depths: NDArray[np.float32], path: str) -> NDArray[np.float32]:
    """(H, W) of (H, W), (H, W, 1) or (1, H, W)."""
    for axis in (-1, 0):
        if depths.ndim == 3 and depths.shape[axis] == 1:
            return depths.squeeze(axis)
    if depths.ndim != 2:
        raise InputError(f"{path} has the shape {depths.shape}; a depth has (H, W) or (H, W, 1).")
    return depths


def _array(path: str) -> NDArray[np.generic]:
    if not Path(path).is_file():
        raise InputError(f"No array at '{path}'. Layout 'nyu_arrays' has eigen_test_rgb.npy and eigen_test_depth.npy.")
    with _named(path, ".npy array"):
        array: NDArray[np.generic] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def hash_samples(samples: Sequence[DepthSample]) -> str:
    """64 hex digits of the bytes of all files, in order."""
    return sha256_of_files(dict.fromkeys(path for sample in samples for path in (sample.image, sample.depth)))
