"""The content and the detail of pictures: borders, enlargement and blur add nothing; crops take away."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from curation.images.detail import content_and_detail


def photograph(seed: int, side: int = 240) -> Image.Image:
    """Noise with the power spectrum of natural images, and an edge."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)) + 1 / side
    pixels = np.fft.ifft2(
        np.fft.fft2(rng.normal(size=(side, side, 3)), axes=(0, 1)) / frequency[..., None], axes=(0, 1)
    )
    pixels = pixels.real / pixels.real.std() * 40 + 128
    pixels[: side // 3, : side // 2] += 40
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


@pytest.mark.parametrize("seed", range(3))
def test_a_border_is_no_content(seed: int) -> None:
    picture = photograph(seed)
    framed = ImageOps.expand(ImageOps.expand(picture, 20, (250, 250, 250)), (0, 30), (10, 20, 30))
    assert content_and_detail(framed) == content_and_detail(picture)
    assert content_and_detail(picture)[0] == 240 * 240


@pytest.mark.parametrize("seed", range(3))
def test_an_enlarged_or_blurred_copy_has_no_more_detail(seed: int) -> None:
    picture = photograph(seed)
    _, detail = content_and_detail(picture)
    for scale in (1.5, 2, 3):
        larger = picture.resize((round(240 * scale),) * 2, Image.Resampling.BICUBIC)
        content, of_larger = content_and_detail(larger)
        assert content == larger.width**2 and 0.7 * detail < of_larger < 1.5 * detail
    assert content_and_detail(picture.filter(ImageFilter.GaussianBlur(2)))[1] < 0.5 * detail
    assert content_and_detail(picture.resize((120, 120), Image.Resampling.BOX))[1] < 0.5 * detail
    assert content_and_detail(picture.crop((0, 0, 240, 150)))[1] < 0.8 * detail


@pytest.mark.parametrize("seed", range(3))
def test_a_caption_on_a_blurred_copy_adds_little_detail(seed: int) -> None:
    """Its sharp edges lie on a small part of the lines."""
    picture = photograph(seed)
    captioned = picture.filter(ImageFilter.GaussianBlur(2))
    for top in (200, 215):
        ImageDraw.Draw(captioned).text((10, top), "A caption of sharp letters, 1234", fill=(255, 255, 255))
    assert content_and_detail(captioned)[1] < 0.3 * content_and_detail(picture)[1]


def test_noise_is_no_detail() -> None:
    picture = photograph(0).filter(ImageFilter.GaussianBlur(2))
    noisy = np.asarray(picture) + np.random.default_rng(0).normal(0, 10, (240, 240, 3))
    noisy_picture = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
    assert content_and_detail(noisy_picture)[1] < 1.5 * content_and_detail(picture)[1]


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (31, 33), (40, 40)])
def test_any_picture_has_content_and_detail(size: tuple[int, int]) -> None:
    """Plain pictures are content, not border."""
    assert content_and_detail(Image.new("RGB", size, (9, 9, 9))) == (size[0] * size[1],) * 2
    pixels = np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), np.uint8)
    content, detail = content_and_detail(Image.fromarray(pixels))
    assert 1 <= detail <= content <= size[0] * size[1]
