"""Plants copies of known originals, made by eight transforms, so that copy detection can be measured."""

import hashlib
import io
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps, ImageStat

from curation.engine import progress
from curation.errors import InputError
from curation.files import parquet
from curation.files.hashes import sha256_of_file
from curation.files.paths import FileRecord
from curation.images.decode import ImageLimits, ImageRejected, decode_rgb
from curation.images.hashing import image_id

TRANSFORMS = ("jpeg", "resize", "crop", "colour", "mirror", "border", "overlay", "rotation")

# A crop or a rotation of a smaller image leaves too little for a person to recognise. Assumed.
ORIGINAL_LIMITS = ImageLimits(min_side=64, max_pixels=4_000_000)
# Standard deviation of grey (0 to 255) on white; an original below it is nearly blank. Assumed.
MIN_ORIGINAL_CONTRAST = 12.0
# Correlation of grey before and after a change of colours. Measured on the thin grey lines of the star shapes: 0.97 to
# 0.99 where brightness and contrast grow by 5%; 0.3 to 0.8 where they have burnt out to white, hardly to be seen.
MIN_COLOUR_CORRELATION = 0.95
# Correlation of grey with its mirror image, in 32 x 32 pixels. Above it a mirrored copy looks like its original, and
# finding it proves nothing. Measured on this data: of 150 originals, 42 are above 0.9, most of them star shapes.
MAX_MIRROR_CORRELATION = 0.9
MIN_RESIZED_SIDE = 32  # pixels; assumed, two ViT patches

PLANTED = pa.schema(
    [
        ("copy", pa.string()),  # path below data/demo
        ("copy_image_id", pa.string()),
        ("original", pa.string()),  # path below data/demo
        ("original_image_id", pa.string()),
        ("original_role", pa.string()),  # 'pool' or 'holdout'
        ("transform", pa.string()),  # one of TRANSFORMS
        ("parameters", pa.string()),  # for people
    ]
)


class Original(NamedTuple):
    """An image to make copies of."""

    path: str
    """Below data/demo."""
    data: bytes
    picture: Image.Image


def plant(
    tree: Path, sources: Sequence[tuple[str, Iterator[Original]]], stickers: Iterator[Original], seed: int
) -> FileRecord:
    """Write one copy per transform and source below planted/, and planted.parquet; returns the table's record.

    A source is a role and the iterator that its next original comes from. `stickers` are pasted by `overlay`.
    """
    rows = []
    with progress.bar("demo data", total=len(TRANSFORMS) * len(sources), unit="copies") as advance:
        for transform in TRANSFORMS:
            for number, (role, candidates) in enumerate(sources):
                original = next(filter(_has_left_and_right, candidates) if transform == "mirror" else candidates)
                generator = make_generator(seed, transform, str(number))
                data, parameters = _transform(transform, original.picture, generator, stickers)
                suffix = "jpg" if transform == "jpeg" else "png"
                copy = f"planted/{transform}/{number:02d}-{PurePosixPath(original.path).stem}.{suffix}"
                write_file(tree / copy, data)
                rows.append(
                    {
                        "copy": copy,
                        "copy_image_id": image_id(data),
                        "original": original.path,
                        "original_image_id": image_id(original.data),
                        "original_role": role,
                        "transform": transform,
                        "parameters": parameters,
                    }
                )
                advance(1, "")
    return parquet.write_table(str(tree / "planted.parquet"), pa.Table.from_pylist(rows, PLANTED))


def unique_images(tree: Path) -> list[str]:
    """The paths below `tree` of the images that have no exact copy there, sorted."""
    hashes = {path.relative_to(tree).as_posix(): sha256_of_file(str(path)) for path in tree.rglob("*.png")}
    counts = Counter(hashes.values())
    return sorted(path for path, sha256 in hashes.items() if counts[sha256] == 1)


def originals(tree: Path, unique: Sequence[str], root: str, generator: np.random.Generator) -> Iterator[Original]:
    """The images of `root` that make good originals, each once, in random order.

    Small, huge and nearly blank images are left out. `unique` leaves out images with an exact copy, because a copy of
    such an image would have two originals. Raises InputError when there are no more.
    """
    candidates = [path for path in unique if path.startswith(root + "/")]
    for position in generator.permutation(len(candidates)):
        data = (tree / candidates[position]).read_bytes()
        try:
            picture = decode_rgb(data, ORIGINAL_LIMITS)
        except ImageRejected:
            continue
        if ImageStat.Stat(picture.convert("L")).stddev[0] >= MIN_ORIGINAL_CONTRAST:
            yield Original(candidates[position], data, picture)
    raise InputError(
        f"The {len(candidates)} images in {root}/ hold too few originals for the copies to plant. "
        f"Lower num_{root}_copies in DemoRecipe (pipelines/demo/dataset.py)."
    )


def make_generator(seed: int, *purpose: str) -> np.random.Generator:
    """A random generator that depends on the seed and the purpose alone."""
    digest = hashlib.sha256("/".join([str(seed), *purpose]).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest))


def correlation(one: Image.Image, other: Image.Image) -> float:
    """The correlation of the grey values of two pictures of one size; 0 where one of them is uniform."""
    x, y = (np.asarray(picture.convert("L"), dtype=np.float32).ravel() for picture in (one, other))
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / max(float(np.linalg.norm(x) * np.linalg.norm(y)), 1e-9))


def encode(picture: Image.Image, format: str, **options: Any) -> bytes:
    """The picture as a file of that format. `options` are Pillow's."""
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def write_file(path: Path, data: bytes) -> None:
    """Write `data`; makes the folder where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _has_left_and_right(original: Original) -> bool:
    """Whether its mirror image differs from it."""
    small = original.picture.resize((32, 32), Image.Resampling.BOX)
    return correlation(small, ImageOps.mirror(small)) <= MAX_MIRROR_CORRELATION


# The transforms: each gives the copy, and its parameters in words


def _transform(
    transform: str, picture: Image.Image, generator: np.random.Generator, stickers: Iterator[Original]
) -> tuple[bytes, str]:
    """An encoded copy of `picture`, and its parameters in words."""
    match transform:
        case "jpeg":
            quality = int(generator.integers(30, 90, endpoint=True))
            return encode(picture, "JPEG", quality=quality), f"quality {quality}"
        case "resize":
            copy, parameters = _resize(picture, generator)
        case "crop":
            copy, parameters = _crop(picture, generator)
        case "colour":
            copy, parameters = _change_colours(picture, generator)
        case "mirror":
            copy, parameters = ImageOps.mirror(picture), "left to right"
        case "border":
            copy, parameters = _add_border(picture, generator)
        case "overlay" if generator.random() < 0.5:
            copy, parameters = _write_text(picture, generator)
        case "overlay":
            copy, parameters = _paste(picture, next(stickers), generator)
        case "rotation":
            degrees = generator.uniform(2, 10) * generator.choice([-1, 1])
            # The size stays, so corners are lost; the new corners are white, like the background of drawings.
            copy = picture.rotate(degrees, Image.Resampling.BICUBIC, fillcolor="white")
            parameters = f"{degrees:+.2f} degrees counterclockwise"
        case _:
            raise AssertionError(transform)
    return encode(copy, "PNG"), parameters


def _resize(picture: Image.Image, generator: np.random.Generator) -> tuple[Image.Image, str]:
    smallest = max(0.3, MIN_RESIZED_SIDE / min(picture.size))
    factor = math.exp(generator.uniform(math.log(smallest), math.log(2)))  # halving is as likely as doubling
    size = (round(picture.width * factor), round(picture.height * factor))
    return picture.resize(size, Image.Resampling.LANCZOS), f"factor {factor:.3f}"


def _crop(picture: Image.Image, generator: np.random.Generator) -> tuple[Image.Image, str]:
    area = generator.uniform(0.60, 0.95)
    width, height = round(picture.width * math.sqrt(area)), round(picture.height * math.sqrt(area))
    left = int(generator.integers(0, picture.width - width, endpoint=True))
    top = int(generator.integers(0, picture.height - height, endpoint=True))
    box = (left, top, left + width, top + height)
    return picture.crop(box), f"{area:.3f} of the area kept, box {box}"


def _change_colours(picture: Image.Image, generator: np.random.Generator) -> tuple[Image.Image, str]:
    while True:  # ends: draws that lower brightness and contrast burn out nothing
        brightness, contrast, saturation = (float(factor) for factor in generator.uniform(0.7, 1.3, size=3))
        copy = ImageEnhance.Brightness(picture).enhance(brightness)
        copy = ImageEnhance.Contrast(copy).enhance(contrast)
        copy = ImageEnhance.Color(copy).enhance(saturation)
        if correlation(picture, copy) >= MIN_COLOUR_CORRELATION:
            return copy, f"brightness {brightness:.2f}, contrast {contrast:.2f}, saturation {saturation:.2f}"


def _add_border(picture: Image.Image, generator: np.random.Generator) -> tuple[Image.Image, str]:
    pixels = max(1, round(generator.uniform(0.03, 0.15) * min(picture.size)))
    red, green, blue = (int(value) for value in generator.integers(0, 256, size=3))
    return ImageOps.expand(picture, pixels, (red, green, blue)), f"{pixels} pixels of rgb({red}, {green}, {blue})"


def _write_text(picture: Image.Image, generator: np.random.Generator) -> tuple[Image.Image, str]:
    """White text with a black rim, 0.4 to 0.8 of the width wide; inside the picture where its height allows."""
    text = str(generator.choice(["SAMPLE", "example.org", "Look at this!", "NEW"]))
    share = generator.uniform(0.4, 0.8)
    left, _, right, _ = ImageFont.load_default(100).getbbox(text)
    size = 100 * share * picture.width / (right - left)
    font = ImageFont.load_default(size)
    left, top, right, bottom = font.getbbox(text)
    x = generator.uniform(0, max(0, picture.width - (right - left))) - left
    y = generator.uniform(0, max(0, picture.height - (bottom - top))) - top
    copy = picture.copy()
    ImageDraw.Draw(copy).text((x, y), text, "white", font, stroke_width=max(1, size / 15), stroke_fill="black")
    return copy, f"text {text!r}, {share:.2f} of the width"


def _paste(picture: Image.Image, sticker: Original, generator: np.random.Generator) -> tuple[Image.Image, str]:
    """Paste another picture, on its white background, inside a box of 0.25 to 0.4 of each side."""
    share = generator.uniform(0.25, 0.4)
    small = ImageOps.contain(sticker.picture, (round(picture.width * share), round(picture.height * share)))
    x = int(generator.integers(0, picture.width - small.width, endpoint=True))
    y = int(generator.integers(0, picture.height - small.height, endpoint=True))
    copy = picture.copy()
    copy.paste(small, (x, y))
    return copy, f"{sticker.path} in {small.width} x {small.height} pixels at ({x}, {y})"
