"""Edits: every kind gives a picture that differs, and the same one for the same generator."""

import numpy as np
import pytest
from PIL import Image

from curation.copies.edits import KINDS, MIN_SIDE, edit


def photograph(width: int, height: int) -> Image.Image:
    """Smooth random colours with some detail."""
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 256, (9, 9, 3)).astype(np.uint8)).resize((width, height))
    fine = generator.normal(0, 12, (height, width, 1))
    return Image.fromarray(np.clip(np.asarray(coarse) + fine, 0, 255).astype(np.uint8))


@pytest.mark.parametrize("size", [(200, 150), (40, 33), (900, 60)])
@pytest.mark.parametrize("kind", KINDS)
def test_edit_changes_the_picture_and_depends_on_the_generator_alone(kind: str, size: tuple[int, int]) -> None:
    picture = photograph(*size)
    before = picture.tobytes()
    for seed in range(4):
        copies = [edit(picture, kind, np.random.default_rng(seed)) for _ in range(2)]
        assert copies[0].mode == "RGB" and min(copies[0].size) >= min(MIN_SIDE, *size) * 0.5
        assert copies[0].tobytes() == copies[1].tobytes()
        assert copies[0].size != size or copies[0].tobytes() != before
    assert picture.tobytes() == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_of_one_pixel_has_copies_too(kind: str) -> None:
    for seed in range(20):
        assert min(edit(Image.new("RGB", (1, 1)), kind, np.random.default_rng(seed)).size) >= 1


def test_crops_keep_the_stated_share_of_the_area() -> None:
    picture = photograph(300, 200)
    for kind, least, most in (("crop", 0.7, 0.95), ("strong_crop", 0.4, 0.7)):
        copies = [edit(picture, kind, np.random.default_rng(seed)) for seed in range(30)]
        shares = [copy.width * copy.height / 60_000 for copy in copies]
        assert least - 0.02 < min(shares) < max(shares) < most + 0.02
