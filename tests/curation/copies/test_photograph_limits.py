"""The similarities and limits that docs/own-images.md states for the profile `photos`, on synthetic photographs."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from curation.copies.compare_photographs import PhotographComparer
from tests.curation.copies.test_compare_photographs import compare, scene

DOC = (Path(__file__).parents[3] / "docs/own-images.md").read_text()
SIZE = WIDTH, HEIGHT = 480, 360
Two = Callable[[int], tuple[Image.Image, Image.Image]]


def crop(picture: Image.Image, share: float) -> Image.Image:
    """The part of a picture that has this share of its area."""
    width, height = (round(length * share**0.5) for length in picture.size)
    left, top = round(0.3 * (picture.width - width)), round(0.3 * (picture.height - height))
    return picture.crop((left, top, left + width, top + height))


def cropped(share: float) -> Two:
    return lambda seed: (scene(seed, *SIZE), crop(scene(seed, *SIZE), share))


def smooth(share: float) -> Two:
    def two(seed: int) -> tuple[Image.Image, Image.Image]:
        fog = scene(seed, *SIZE).filter(ImageFilter.GaussianBlur(20))
        return fog, crop(fog, share)

    return two


def covered(share: float) -> Two:
    def two(seed: int) -> tuple[Image.Image, Image.Image]:
        copy = scene(seed, *SIZE)
        copy.paste((30, 30, 30), (0, 0, WIDTH, round(HEIGHT * share)))
        return scene(seed, *SIZE), copy

    return two


def within(share: float) -> Two:
    """A picture, and another one of which it fills that share."""

    def two(seed: int) -> tuple[Image.Image, Image.Image]:
        small = scene(seed, *(round(length * share**0.5) for length in SIZE))
        large = scene(seed + 50, *SIZE)
        large.paste(small, (20, 20))
        return small, large

    return two


def in_common(share: float) -> Two:
    """Two crops of one picture."""

    def two(seed: int) -> tuple[Image.Image, Image.Image]:
        whole, side = scene(seed, 600, 300), 300
        start = round(side * (1 - share))
        return whole.crop((0, 0, side, side)), whole.crop((start, 0, start + side, side))

    return two


def stretched(factor: float) -> Two:
    return lambda seed: (scene(seed, *SIZE), scene(seed, *SIZE).resize((round(WIDTH * factor), HEIGHT)))


def similarities(two: Two) -> np.ndarray:
    comparer = PhotographComparer(128)
    return np.array([compare(comparer, *two(seed)).similarity for seed in range(3)])


@pytest.mark.parametrize(
    ("row", "edits"),
    [
        ("a caption over 20, 40 or 60% of the picture", [covered(0.2), covered(0.4), covered(0.6)]),
        ("cropped to half, a quarter, a sixth of the area", [cropped(1 / 2), cropped(1 / 4), cropped(1 / 6)]),
        ("cropped to an eighth of the area, or a part of a picture that fills less", [cropped(1 / 9)]),
        ("two crops of one picture that have 80%, and 70% of each in common", [in_common(0.8), in_common(0.7)]),
        ("the sides stretched against each other by 10, 20 and 30%", [stretched(f) for f in (1.1, 1.2, 1.3)]),
    ],
    ids=("caption", "crop", "small", "crops", "stretch"),
)
def test_similarity_is_that_of_the_documentation(row: str, edits: list[Two]) -> None:
    (stated,) = (line.split(" | ")[1].rstrip(" |") for line in DOC.splitlines() if line.startswith(f"| {row} |"))
    median = [float(np.median(similarities(edit))) for edit in edits]
    assert median == pytest.approx([float(value) for value in stated.split(", ")], abs=0.06)


def test_copy_within_another_picture_is_found_from_a_seventh_of_its_area() -> None:
    assert "fills less than about a seventh of another picture" in DOC
    assert similarities(within(0.2)).min() > 0.8
    assert similarities(within(0.1)).max() == 0


def test_smooth_picture_is_found_when_half_of_it_is_left() -> None:
    assert "cropped to less than half of its area" in DOC
    assert np.median(similarities(smooth(0.6))) > 0.8
    assert np.median(similarities(smooth(0.25))) == 0


def test_inverted_colours_are_no_copy() -> None:
    assert similarities(lambda seed: (scene(seed), ImageOps.invert(scene(seed)))).max() == 0
