"""Pictures cut anew from a few real photographs, for the rows of gpu.py.

Crops lie anywhere in a photograph and overlap, or they are tiles of a grid and do not: overlapping crops are copies of
one another. The number of a crop and the seed decide where it lies, so the same photographs and the same Pillow give
the same bytes on every machine. This file imports neither torch nor curation: many processes cut at once, and each
imports it.
"""

import hashlib
import io
import math
import multiprocessing
import os
import tarfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# Limit of the photographs' bytes: they travel to the machine with the GPU.
MAX_BYTES = 50_000_000
# Longer sides are scaled down once, before the crops. Assumed: a twentieth of the area still has 500 x 400 pixels.
MAX_SIDE = 2400
# Share of a crop in the area of the largest possible one. Assumed.
MIN_AREA, MAX_AREA = 0.05, 0.7
JPEG_QUALITY = 90
IMAGES_PER_TAR = 1024
# Crops of one photograph that a process cuts at a time; fewer crops in all are cut in this process. Assumed.
CROPS_PER_TASK, MIN_CROPS_FOR_PROCESSES = 128, 64


def photographs(folder: str) -> list[Path]:
    """The photographs below `folder`, by path. Raises ValueError where there are none, or too many bytes."""
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    size = sum(path.stat().st_size for path in files)
    if not files:
        raise ValueError(f"'{folder}' holds no photograph ({', '.join(SUFFIXES)}). Give a folder of real photographs.")
    if size > MAX_BYTES:
        raise ValueError(f"The photographs in '{folder}' have {size:,} bytes; the limit is {MAX_BYTES:,}. Give fewer.")
    return files


def hash_photographs(folder: str) -> str:
    """The SHA-256 of all photographs below `folder` in hex, to tell whether two machines have the same ones."""
    return hashlib.sha256(
        b"".join(hashlib.sha256(path.read_bytes()).digest() for path in photographs(folder))
    ).hexdigest()


@dataclass(frozen=True)
class Cut:
    """How crops look."""

    width: int
    height: int
    format: Literal["JPEG", "PNG"]
    seed: int
    tiles: bool = False
    """Whether crops are tiles of a grid. Tiles smaller than the size keep their pixels; others are scaled to it."""


# A photograph, the numbers of some of its crops, how they look, the number of photographs and of all crops.
Task = tuple[Path, Sequence[int], Cut, int, int]
Box = tuple[float, float, float, float]


def crops(folder: str, count: int, cut: Cut) -> list[bytes]:
    """`count` encoded crops, from one photograph after another, in several processes where that is faster."""
    files = photographs(folder)
    # A task is one photograph with the numbers of some of its crops, so that it is decoded once.
    tasks: list[Task] = []
    for index, file in enumerate(files):
        numbers = range(index, count, len(files))
        tasks += [
            (file, numbers[start : start + CROPS_PER_TASK], cut, len(files), count)
            for start in range(0, len(numbers), CROPS_PER_TASK)
        ]
    num_processes = min(os.cpu_count() or 1, len(tasks))
    if num_processes < 2 or count < MIN_CROPS_FOR_PROCESSES:
        parts = [_cut_photograph(task) for task in tasks]
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(num_processes, mp_context=context) as pool:
            parts = list(pool.map(_cut_photograph, tasks))
    by_number = {
        number: data
        for (_, numbers, *_), part in zip(tasks, parts, strict=True)
        for number, data in zip(numbers, part, strict=True)
    }
    return [by_number[number] for number in range(count)]


def _cut_photograph(task: "Task") -> list[bytes]:
    """The encoded crops of one photograph with the given numbers."""
    file, numbers, cut, num_photographs, count = task
    with Image.open(file) as opened:
        # First, because a JPEG that is not decoded yet is then decoded at a fraction of its size.
        opened.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        photograph = ImageOps.exif_transpose(opened).convert("RGB")
    encoded = []
    for number in numbers:
        position, generator = number // num_photographs, np.random.default_rng([cut.seed, number])
        if cut.tiles:
            box = _tile(photograph.size, cut, position, -(-count // num_photographs))
        else:
            box = _anywhere(photograph.size, cut, generator)
        box = _inside(box, photograph.size)
        size = (cut.width, cut.height)
        if cut.tiles and box[2] - box[0] < cut.width:
            size = (max(1, int(box[2] - box[0])), max(1, int(box[3] - box[1])))
        crop = photograph.resize(size, Image.Resampling.BICUBIC, box=box)
        buffer = io.BytesIO()
        crop.save(buffer, cut.format, **({"quality": JPEG_QUALITY} if cut.format == "JPEG" else {"compress_level": 1}))
        encoded.append(buffer.getvalue())
    return encoded


def _anywhere(size: tuple[int, int], cut: Cut, generator: np.random.Generator) -> Box:
    """A box of the crop's shape anywhere in a photograph of that size."""
    largest = min(size[0] / cut.width, size[1] / cut.height)
    scale = largest * math.sqrt(generator.uniform(MIN_AREA, MAX_AREA))
    width, height = scale * cut.width, scale * cut.height
    left, top = generator.uniform(0, size[0] - width), generator.uniform(0, size[1] - height)
    return left, top, left + width, top + height


def _tile(size: tuple[int, int], cut: Cut, position: int, num_tiles: int) -> Box:
    """The box of the crop's shape in the middle of one cell of a grid with at least `num_tiles` cells."""
    columns = max(1, round(math.sqrt(num_tiles * size[0] * cut.height / (size[1] * cut.width))))
    rows = -(-num_tiles // columns)
    cell = size[0] / columns, size[1] / rows
    scale = min(cell[0] / cut.width, cell[1] / cut.height)
    width, height = scale * cut.width, scale * cut.height
    left = (position % columns) * cell[0] + (cell[0] - width) / 2
    top = (position // columns) * cell[1] + (cell[1] - height) / 2
    return left, top, left + width, top + height


def _inside(box: Box, size: tuple[int, int]) -> Box:
    """The box without the rounding errors that lie outside of the photograph, which Pillow refuses."""
    return max(0.0, box[0]), max(0.0, box[1]), min(float(size[0]), box[2]), min(float(size[1]), box[3])


@dataclass(frozen=True)
class Stored:
    """The place of an image's bytes in a tar."""

    uri: str
    offset: int
    data: bytes


def write_tars(folder: str, images: Sequence[bytes], suffix: str) -> list[list[Stored]]:
    """Write tars of at most IMAGES_PER_TAR images to `folder`; returns the places of the images of each tar."""
    tars = []
    for first in range(0, len(images), IMAGES_PER_TAR):
        path, places = Path(folder, f"{first:07d}.tar"), []
        with tarfile.open(path, "w") as tar:
            for number, data in enumerate(images[first : first + IMAGES_PER_TAR], start=first):
                header = tarfile.TarInfo(f"{number:07d}.{suffix}")
                header.size = len(data)
                places.append(Stored(str(path), tar.offset + tarfile.BLOCKSIZE, data))
                tar.addfile(header, io.BytesIO(data))
        tars.append(places)
    return tars


def write_files(folder: Path, images: Sequence[bytes], suffix: str) -> None:
    """Write one file for each image to `folder`."""
    folder.mkdir(parents=True)
    for number, data in enumerate(images):
        (folder / f"{number:05d}.{suffix}").write_bytes(data)
