"""Tests of the view of labelled images, against torchvision's published formulas and Pillow's bicubic filter."""

import numpy as np
import pytest
from PIL import Image

from curation.images.decode import Picture
from evaluation.data.views import PicturesConfig, preprocess
from tests.curation.builders import picture_of
from tests.evaluation.data.scene_builders import photograph


def by_torchvision(image: Image.Image, resize_size: int, side: int) -> np.ndarray:
    """Resize(resize_size, BICUBIC) and CenterCrop(side) of torchvision, on an image of Pillow."""
    width, height = image.size
    short, long = (width, height) if width <= height else (height, width)
    new_short, new_long = resize_size, int(resize_size * long / short)
    size = (new_short, new_long) if width <= height else (new_long, new_short)
    resized = image.resize(size, Image.Resampling.BICUBIC)
    top, left = round((size[1] - side) / 2.0), round((size[0] - side) / 2.0)
    return np.asarray(resized.crop((left, top, left + side, top + side))).transpose(2, 0, 1)


# Longer sides of 341.33 and 341 pixels after scaling; odd and even margins; portrait; very long images.
SIZES = [(500, 375), (640, 480), (375, 500), (333, 250), (257, 300), (300, 301), (41, 40), (2000, 40), (3, 700)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("resize_size", "side"), [(256, 224), (255, 224), (224, 224), (40, 32)])
def test_the_view_is_that_of_torchvision(size: tuple[int, int], resize_size: int, side: int) -> None:
    image = photograph(sum(size), size)
    config = PicturesConfig(resize_size=resize_size, image_size=side)
    seen = preprocess(picture_of(image), config).numpy()
    expected = by_torchvision(image, resize_size, side)
    assert seen.shape == expected.shape == (3, side, side)
    difference = np.abs(seen.astype(int) - expected)
    assert difference.mean() < 0.25 and difference.max() <= 4  # 4 only where 3 pixels become 256


def test_the_view_of_an_image_that_is_stored_turned() -> None:
    upright = photograph(5, (333, 250))
    stored = np.array(upright.transpose(Image.Transpose.ROTATE_90))  # EXIF 6: turn it by 90 degrees clockwise
    turned = Picture(stored, stored.shape[1], stored.shape[0], orientation=6)
    seen = preprocess(turned, PicturesConfig()).numpy()
    assert np.abs(seen.astype(int) - by_torchvision(upright, 256, 224)).mean() < 0.25
