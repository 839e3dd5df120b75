"""Comparing thumbnails of drawings finds copies under each edit, and tells them from other pictures and symbols."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from curation.copies.compare_drawings import DrawingComparer
from curation.copies.compare_thumbnails import Likeness
from curation.embed import encode_thumbnail

THRESHOLD = 0.67  # of pipelines/configs/demo.toml


@pytest.fixture(scope="module")
def comparer() -> DrawingComparer:
    return DrawingComparer(128)


def scene(seed: int) -> Image.Image:
    """A drawing of 300 x 260 pixels: a few shapes on a plain background."""
    generator = np.random.default_rng(seed)
    image = Image.new("RGB", (300, 260), (250, 248, 240))
    draw = ImageDraw.Draw(image)
    for index in range(14):
        x, y = (int(value) for value in generator.integers(20, 220, 2))
        w, h = (int(value) for value in generator.integers(15, 70, 2))
        colour = tuple(int(value) for value in generator.integers(0, 220, 3))
        if index % 3 == 0:
            draw.ellipse((x, y, x + w, y + h), colour)
        elif index % 3 == 1:
            draw.rectangle((x, y, x + w, y + h), colour)
        else:
            draw.polygon([(x, y), (x + w, y + h // 2), (x + w // 3, y + h)], colour)
    return image


def sign(symbol: int) -> Image.Image:
    """A road sign: one frame, many symbols."""
    image = Image.new("RGB", (200, 200), "white")
    draw = ImageDraw.Draw(image)
    draw.polygon([(100, 10), (190, 180), (10, 180)], "white", "red", 14)
    generator = np.random.default_rng(symbol)
    points = [(x, y + 30) for x, y in generator.integers(70, 135, (5, 2)).tolist()]
    draw.line(points, "black", 8)
    return image


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def stamped(image: Image.Image) -> Image.Image:
    copy = image.copy()
    ImageDraw.Draw(copy).rectangle((30, 190, 150, 220), "black")
    return copy


EDITS = {
    "jpeg": lambda image: jpeg(image, 40),
    "smaller": lambda image: image.resize((140, 121)),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.75),
    "paler": lambda image: ImageEnhance.Color(image).enhance(0.6),
    "mirrored": ImageOps.mirror,
    "cropped": lambda image: image.crop((20, 15, 280, 245)),
    "bordered": lambda image: ImageOps.expand(image, 20, (20, 60, 160)),
    "turned": lambda image: image.rotate(5, Image.Resampling.BICUBIC, fillcolor="white"),
    "stamped": stamped,
}


def compare(comparer: DrawingComparer, one: Image.Image, other: Image.Image) -> Likeness:
    first, second = (comparer.prepare(encode_thumbnail(image, 128)) for image in (one, other))
    return comparer.compare(first, [second])[0]


@pytest.mark.parametrize("edit", EDITS)
def test_copy_is_found(comparer: DrawingComparer, edit: str) -> None:
    similarities = [compare(comparer, scene(seed), EDITS[edit](scene(seed))).similarity for seed in range(5)]
    assert sum(similarity >= THRESHOLD for similarity in similarities) >= 4, similarities


def test_picture_is_a_copy_of_itself(comparer: DrawingComparer) -> None:
    for seed in range(5):
        assert compare(comparer, scene(seed), scene(seed)).similarity > 0.99


@pytest.mark.parametrize("size", [(128, 8), (8, 128), (300, 24), (400, 400)])
@pytest.mark.parametrize("kind", ["plain", "dot", "noise"])
def test_equal_pictures_that_cannot_be_aligned_are_copies(
    comparer: DrawingComparer, size: tuple[int, int], kind: str
) -> None:
    image = Image.new("RGB", size, "white")
    if kind == "dot":
        image.putpixel((size[0] // 2, size[1] // 2), (0, 0, 0))
    elif kind == "noise":
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))
    assert compare(comparer, image, image.copy()) == Likeness(1.0, False)


def test_other_pictures_are_not_copies(comparer: DrawingComparer) -> None:
    for seed in range(10):
        assert compare(comparer, scene(seed), scene(seed + 100)).similarity < 0.3


def test_other_symbol_in_one_frame_differs_locally(comparer: DrawingComparer) -> None:
    for symbol in range(5):
        likeness = compare(comparer, sign(symbol), sign(symbol + 50))
        assert likeness.similarity < THRESHOLD or likeness.differs_locally


def test_stamp_differs_locally_and_jpeg_does_not(comparer: DrawingComparer) -> None:
    assert compare(comparer, scene(1), stamped(scene(1))).differs_locally
    assert not compare(comparer, scene(1), jpeg(scene(1), 60)).differs_locally


def test_result_does_not_depend_on_earlier_pairs(comparer: DrawingComparer) -> None:
    pair = scene(2), EDITS["turned"](scene(2))
    first = compare(comparer, *pair)
    for seed in range(5):
        compare(comparer, scene(seed), scene(seed + 1))
    assert compare(comparer, *pair) == first == compare(DrawingComparer(128), *pair)


@pytest.mark.parametrize("size", [(1, 1), (200, 3), (3, 200), (17, 16)])
def test_blank_and_thin_pictures_can_be_compared(comparer: DrawingComparer, size: tuple[int, int]) -> None:
    blank = Image.new("RGB", size, (90, 90, 90))
    for other in (blank, scene(0)):
        likeness = compare(comparer, blank, other)
        assert 0 <= likeness.similarity <= 1
