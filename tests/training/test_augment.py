"""Crops: published windows and probabilities, pixels that agree with Pillow, equal results for equal seeds."""

import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from curation.config import parse, resolved_toml
from curation.errors import ConfigError
from curation.images.decode import ImageLimits, ImageRejected
from pipelines.bench import crops, decoding
from training.augment import (
    EFFECTIVE_BLUR,
    NOMINAL_BLUR,
    AugmentConfig,
    Crop,
    CropGroup,
    CropView,
    cut_crops,
    decode_reduction,
    draw_crops,
    make_crops,
    released_crops,
)

LIMITS = ImageLimits()
PLAIN = Crop(0, 0, 0, 0, False, (), 1.0, 1.0, 1.0, 0.0, False, 0.0, False)


def encoded(picture: Image.Image, format: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def drawn(config: AugmentConfig, count: int, width: int = 500, height: int = 400) -> list[tuple[tuple[Crop, ...], ...]]:
    return [draw_crops(config, width, height, np.random.default_rng([7, n])) for n in range(count)]


def near(share: float, expected: float, count: int) -> bool:
    """Within four standard deviations of a share of `count` draws."""
    return abs(share - expected) <= 4 * np.sqrt(max(expected * (1 - expected), 1e-9) / count)


def test_the_defaults_are_the_published_ones() -> None:
    config = AugmentConfig()
    assert [(group.name, group.num, group.size, group.scale) for group in config.crops] == [
        ("global", 2, 224, (0.32, 1.0)),
        ("local", 8, 96, (0.05, 0.32)),
    ]
    text = resolved_toml(config)
    assert "blur = 0.9" in text and "solarize = 0.2" in text, "the config shows its numbers"
    nominal = released_crops(blur=NOMINAL_BLUR)
    assert [view.blur for group in nominal for view in group.views] == [1.0, 0.1, 0.5]
    assert [group.name for group in released_crops(num_local=0)] == ["global"]


def test_probability_of_every_augmentation() -> None:
    count = 3000
    first, second, local = [], [], []
    for (one, two), others in drawn(AugmentConfig(), count):
        first.append(one)
        second.append(two)
        local += others
    for group, blur, solarize in ((first, EFFECTIVE_BLUR[0], 0.0), (second, EFFECTIVE_BLUR[1], 0.2), (local, 0.5, 0.0)):
        share = {
            "flip": np.mean([crop.flip for crop in group]),
            "jitter": np.mean([bool(crop.order) for crop in group]),
            "grayscale": np.mean([crop.grayscale for crop in group]),
            "blur": np.mean([crop.sigma > 0 for crop in group]),
            "solarize": np.mean([crop.solarize for crop in group]),
        }
        expected = {"flip": 0.5, "jitter": 0.8, "grayscale": 0.2, "blur": blur, "solarize": solarize}
        assert all(near(share[name], expected[name], len(group)) for name in share), share
    orders = Counter(crop.order for crop in local if crop.order)
    assert len(orders) == 24 and min(orders.values()) > 0.7 * max(orders.values())


def test_factors_are_uniform_in_their_ranges() -> None:
    crops = [crop for _, local in drawn(AugmentConfig(), 1000) for crop in local]
    for name, low, high in (
        ("brightness", 0.6, 1.4),
        ("contrast", 0.6, 1.4),
        ("saturation", 0.8, 1.2),
        ("hue", -0.1, 0.1),
        ("sigma", 0.1, 2.0),
    ):
        values = np.array([getattr(crop, name) for crop in crops if name != "sigma" or crop.sigma])
        assert low <= values.min() and values.max() <= high
        quarters = np.histogram(values, 4, (low, high))[0] / len(values)
        assert all(near(share, 0.25, len(values)) for share in quarters), name


def test_windows_have_the_published_area_aspect_and_position() -> None:
    config = AugmentConfig()
    for width, height in ((500, 400), (301, 999), (16, 16)):
        for group, images in zip(config.crops, zip(*drawn(config, 600, width, height), strict=True), strict=True):
            windows = [crop for crops_of_image in images for crop in crops_of_image]
            assert all(0 <= c.left <= width - c.width and 0 <= c.top <= height - c.height for c in windows)
            if width < 300:
                continue
            area = np.array([c.width * c.height / (width * height) for c in windows])
            ratio = np.array([c.width / c.height for c in windows])
            low, high = group.scale
            assert low * 0.97 <= area.min() and area.max() <= high * 1.03
            assert 0.74 <= ratio.min() and ratio.max() <= 1.35
            if group.name == "local" and width == 500:  # every window fits, so none is drawn twice
                assert np.mean(area) == pytest.approx((low + high) / 2, rel=0.03)
                assert np.mean(np.log(ratio)) == pytest.approx(0, abs=0.02)
                assert np.std(area) == pytest.approx((high - low) / np.sqrt(12), rel=0.05)
                assert np.std(np.log(ratio)) == pytest.approx(2 * np.log(4 / 3) / np.sqrt(12), rel=0.05)
                assert min(c.left for c in windows) == 0 and max(c.left + c.width for c in windows) >= width - 1


@pytest.mark.parametrize(("size", "window"), [((1000, 100), (433, 0, 133, 100)), ((100, 1000), (0, 433, 100, 133))])
def test_the_middle_is_taken_if_no_window_fits(size: tuple[int, int], window: tuple[int, int, int, int]) -> None:
    whole = (CropGroup(name="global", size=32, scale=(1.0, 1.0), views=(CropView(num=2, blur=0.0),)),)
    for ((crop, _),) in drawn(AugmentConfig(crops=whole), 5, *size):
        assert (crop.left, crop.top, crop.width, crop.height) == window


def test_equal_seeds_give_equal_bytes_and_others_differ() -> None:
    data = encoded(decoding.draw(300, 260, np.random.default_rng(0)), quality=90)
    config = AugmentConfig()
    one, two, other = (make_crops(data, LIMITS, config, np.random.default_rng([3, n])) for n in (1, 1, 2))
    assert [group.shape for group in one] == [(2, 3, 224, 224), (8, 3, 96, 96)]
    assert all(group.dtype == np.uint8 for group in one)
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_crop_does_not_depend_on_the_settings_of_other_crops() -> None:
    """Every crop draws the same number of values, so its probabilities do not change the next crop."""
    for effective, nominal in zip(
        drawn(AugmentConfig(), 20), drawn(AugmentConfig(crops=released_crops(blur=NOMINAL_BLUR)), 20), strict=True
    ):
        assert [crop.left for group in effective for crop in group] == [c.left for group in nominal for c in group]
        assert effective[1] == nominal[1]


CHANGES = {
    "window and mirror": ({}, 50),
    "brightness": ({"order": ("brightness",), "brightness": 1.35}, 46),
    "contrast": ({"order": ("contrast",), "contrast": 1.4}, 46),
    "little contrast": ({"order": ("contrast",), "contrast": 0.6}, 46),
    "saturation": ({"order": ("saturation",), "saturation": 0.8}, 46),
    "hue": ({"order": ("hue",), "hue": 0.07}, 40),
    "hue back": ({"order": ("hue",), "hue": -0.1}, 40),
    "grey": ({"grayscale": True}, 50),
    "solarize": ({"solarize": True}, 30),
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_augmentation_agrees_with_pillow(name: str) -> None:
    changes, min_psnr = CHANGES[name]
    pixels = np.array(decoding.draw(320, 260, np.random.default_rng(4)))
    crop = Crop(**{**vars(PLAIN), "left": 31, "top": 17, "width": 200, "height": 170, "flip": True, **changes})
    group = CropGroup(name="global", size=112, scale=(0.3, 1.0), views=(CropView(num=2, blur=0.0),))
    ratios = crops.agreement(pixels, ((crop, crop),), AugmentConfig(crops=(group,)))
    assert min(ratios) > min_psnr, ratios


def test_blur_is_the_gaussian_of_nine_pixels() -> None:
    """Compares with the sum over the kernel, because Pillow approximates a Gaussian by boxes."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    config = AugmentConfig(
        crops=(CropGroup(name="global", size=64, scale=(1.0, 1.0), views=(CropView(num=2, blur=1.0),)),)
    )
    for sigma in (0.1, 0.8, 2.0):
        crop = Crop(**{**vars(PLAIN), "width": 64, "height": 64, "sigma": sigma})
        (group,) = cut_crops(pixels, ((crop, crop),), config, full_width=64)
        kernel = np.exp(-0.5 * (np.arange(-4, 5) / sigma) ** 2)
        kernel /= kernel.sum()
        padded = np.pad(pixels.astype(float), ((4, 4), (4, 4), (0, 0)), mode="reflect")
        rows = sum(weight * padded[n : n + 64] for n, weight in enumerate(kernel))
        expected = sum(weight * rows[:, n : n + 64] for n, weight in enumerate(kernel))
        assert np.abs(group[0].transpose(1, 2, 0) - expected).max() <= 1


def test_random_crops_agree_with_pillow() -> None:
    config = AugmentConfig()
    ratios = []
    for n, groups in enumerate(drawn(config, 6)):
        ratios += crops.agreement(np.array(decoding.draw(500, 400, np.random.default_rng(n))), groups, config)
    assert np.mean(ratios) > 42 and min(ratios) > 30, (np.mean(ratios), min(ratios))


def test_a_large_jpeg_is_decoded_smaller_if_no_crop_is_enlarged() -> None:
    sizes = released_crops(global_size=64, local_size=32, num_local=2, blur=(0.0, 0.0, 0.0))
    small = AugmentConfig(crops=sizes, jitter=0.0, solarize_threshold=256)
    picture = decoding.draw(1200, 1000, np.random.default_rng(1))
    data, same = encoded(picture, quality=95, subsampling=0), encoded(picture, "PNG")
    reductions = [decode_reduction(small, groups) for groups in drawn(small, 30, *picture.size)]
    for groups, reduction in zip(drawn(small, 30, *picture.size), reductions, strict=True):
        max_reduction = min(
            min(c.width, c.height) / side for side, group in zip((64, 32), groups, strict=True) for c in group
        )
        assert reduction <= max_reduction < 2 * reduction
    assert set(reductions) == {4, 8}, "both occur"
    for n in range(3):
        scaled, whole = (make_crops(each, LIMITS, small, np.random.default_rng([5, n])) for each in (data, same))
        ratios = [
            decoding.psnr(a, b) for one, two in zip(scaled, whole, strict=True) for a, b in zip(one, two, strict=True)
        ]
        assert min(ratios) > 26, ratios


def test_pictures_are_turned_upright_first() -> None:
    picture = decoding.draw(200, 120, np.random.default_rng(2))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored rotated by 90 degrees
    rotated = encoded(picture.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)
    for one, two in zip(
        *(
            make_crops(data, LIMITS, AugmentConfig(), np.random.default_rng(0))
            for data in (rotated, encoded(picture, "PNG"))
        ),
        strict=True,
    ):
        assert np.array_equal(one, two)


def test_a_truncated_image_is_rejected() -> None:
    with pytest.raises(ImageRejected, match=r"truncated|corrupt"):
        make_crops(
            encoded(decoding.draw(200, 120, np.random.default_rng(2)))[:900],
            LIMITS,
            AugmentConfig(),
            np.random.default_rng(0),
        )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"crops": [{"name": "local", "size": 96, "scale": [0.1, 0.3], "views": [{"blur": 0.5}]}]}, "'global' of two"),
        (
            {"crops": [{"name": "global", "size": 96, "scale": [0.0, 0.3], "views": [{"num": 2, "blur": 0.5}]}]},
            "not a range within",
        ),
        ({"ratio": [2.0, 1.0]}, "not a range above 0"),
        ({"flip": 1.5}, "flip"),
    ],
)
def test_invalid_configs_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(AugmentConfig, values, origin="test")
