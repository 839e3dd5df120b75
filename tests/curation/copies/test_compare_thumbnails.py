"""Verification finds copies under each common edit, and tells other pictures and other symbols in one frame apart."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from curation.copies.compare_thumbnails import Likeness, PairVerifier, VerifyConfig
from curation.embed import encode_thumbnail

THRESHOLD = 0.67  # of pipelines/configs/demo.toml


@pytest.fixture(scope="module")
def verifier() -> PairVerifier:
    return PairVerifier(VerifyConfig())


def scene(seed: int) -> Image.Image:
    """A drawing of 300 x 260 pixels with a few shapes, lines and dots on a plain ground."""
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


def compare(verifier: PairVerifier, one: Image.Image, other: Image.Image) -> Likeness:
    views = [verifier.describe(encode_thumbnail(image, 128)) for image in (one, other)]
    return verifier.compare(*views)


@pytest.mark.parametrize("edit", EDITS)
def test_copy_is_found(verifier: PairVerifier, edit: str) -> None:
    found = [compare(verifier, scene(seed), EDITS[edit](scene(seed))).similarity for seed in range(5)]
    assert sum(similarity >= THRESHOLD for similarity in found) >= 4, found


def test_picture_is_a_copy_of_itself(verifier: PairVerifier) -> None:
    for seed in range(5):
        assert compare(verifier, scene(seed), scene(seed)).similarity > 0.99


def test_other_pictures_are_no_copies(verifier: PairVerifier) -> None:
    for seed in range(10):
        assert compare(verifier, scene(seed), scene(seed + 100)).similarity < 0.3


def test_other_symbol_in_one_frame_differs_locally(verifier: PairVerifier) -> None:
    for symbol in range(5):
        likeness = compare(verifier, sign(symbol), sign(symbol + 50))
        assert likeness.similarity < THRESHOLD or likeness.differs_locally


def test_stamp_differs_locally_and_jpeg_does_not(verifier: PairVerifier) -> None:
    assert compare(verifier, scene(1), stamped(scene(1))).differs_locally
    assert not compare(verifier, scene(1), jpeg(scene(1), 60)).differs_locally


def test_result_does_not_depend_on_pairs_before(verifier: PairVerifier) -> None:
    pair = scene(2), EDITS["turned"](scene(2))
    first = compare(verifier, *pair)
    for seed in range(5):
        compare(verifier, scene(seed), scene(seed + 1))
    assert compare(verifier, *pair) == first == compare(PairVerifier(VerifyConfig()), *pair)


@pytest.mark.parametrize("size", [(1, 1), (200, 3), (3, 200), (17, 16)])
def test_blank_and_thin_pictures_compare(verifier: PairVerifier, size: tuple[int, int]) -> None:
    blank = Image.new("RGB", size, (90, 90, 90))
    for other in (blank, scene(0)):
        likeness = compare(verifier, blank, other)
        assert 0 <= likeness.similarity <= 1
