"""Comparing thumbnails of photographs finds copies under each edit, and tells them from other pictures."""

import itertools

import numpy as np
import pytest
from PIL import Image, ImageFilter

from curation.copies.compare_photographs import PhotographComparer
from curation.copies.compare_thumbnails import Likeness, VerificationConfig
from curation.copies.edits import KINDS, edit
from curation.copies.photographs import FEATURES, Photograph
from curation.embed import encode_thumbnail

THRESHOLD = 0.5  # of the profile `photos`


@pytest.fixture(scope="module")
def comparer() -> PhotographComparer:
    return PhotographComparer(128)


def scene(seed: int, width: int = 360, height: int = 280) -> Image.Image:
    """A picture with the spectrum of a photograph, with some sharp edges."""
    generator = np.random.default_rng([seed, width, height])
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None]) + 2 / width
    channels = []
    for _ in range(3):
        phases = generator.normal(size=(2, height, width))
        values = np.fft.ifft2((phases[0] + 1j * phases[1]) / frequency**1.2).real
        channels.append((values - values.mean()) / values.std())
    brightness = channels[0]
    for level in generator.normal(size=3):
        brightness = brightness + 0.8 * (channels[1] > level)
    pixels = 128 + 45 * np.stack([brightness + 0.3 * channels[1], brightness, brightness + 0.3 * channels[2]], 2)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def prepare(comparer: PhotographComparer, image: Image.Image) -> Photograph:
    return comparer.prepare(encode_thumbnail(image, 128))


def compare(comparer: PhotographComparer, one: Image.Image, other: Image.Image) -> Likeness:
    return comparer.compare(prepare(comparer, one), [prepare(comparer, other)])[0]


@pytest.mark.parametrize("kind", KINDS)
def test_copy_is_found(comparer: PhotographComparer, kind: str) -> None:
    similarities = [
        compare(comparer, scene(seed), edit(scene(seed), kind, np.random.default_rng(seed))).similarity
        for seed in range(6)
    ]
    assert sum(similarity >= THRESHOLD for similarity in similarities) >= 5, similarities


def test_other_pictures_are_not_copies(comparer: PhotographComparer) -> None:
    pictures = [prepare(comparer, scene(seed)) for seed in range(10)]
    for one, other in itertools.combinations(pictures, 2):
        assert comparer.compare(one, [other])[0].similarity < 0.2


def test_parts_of_one_picture_that_hardly_overlap_are_not_copies(comparer: PhotographComparer) -> None:
    whole = scene(1, 600, 280)
    assert compare(comparer, whole.crop((0, 0, 360, 280)), whole.crop((240, 0, 600, 280))).similarity == 0


def test_one_sticker_on_two_pictures_makes_no_copy(comparer: PhotographComparer) -> None:
    sticker = scene(7, 110, 90)
    first, second = scene(1), scene(2)
    first.paste(sticker, (20, 30))
    second.paste(sticker, (200, 150))
    assert compare(comparer, first, second).similarity < 0.2


def test_overlay_differs_locally_and_a_resized_copy_does_not(comparer: PhotographComparer) -> None:
    covered = scene(3)
    covered.paste((0, 0, 0), (60, 100, 260, 180))
    likeness = compare(comparer, scene(3), covered)
    assert likeness.differs_locally
    assert THRESHOLD < likeness.similarity < 0.9
    assert not compare(comparer, scene(3), scene(3).resize((200, 156))).differs_locally


def test_forbidden_differences_tell_a_defect_from_a_copy() -> None:
    strict = PhotographComparer(128, forbid_differences=True)
    defect = scene(3)
    defect.paste((20, 20, 20), (100, 90, 130, 115))
    counting = PhotographComparer(128)
    assert compare(counting, scene(3), defect).similarity > THRESHOLD
    assert compare(strict, scene(3), defect).similarity == 0
    for kind in ("jpeg", "resize", "colour", "noise", "mirror", "crop"):
        copy = edit(scene(3), kind, np.random.default_rng(2))
        assert compare(strict, scene(3), copy).similarity > THRESHOLD, kind


def test_smooth_picture_is_found_by_its_brightness_and_colour(comparer: PhotographComparer) -> None:
    across, down = np.meshgrid(np.linspace(0, 1, 300), np.linspace(0, 1, 200))
    sky = Image.fromarray(np.stack([90 + 80 * down, 110 + 70 * down, 180 + 40 * across], 2).astype(np.uint8))
    assert compare(comparer, sky, sky.filter(ImageFilter.GaussianBlur(3)).resize((150, 100))).similarity > 0.9
    darker = Image.fromarray((np.asarray(sky) * 0.6).astype(np.uint8))
    assert compare(comparer, sky, darker).similarity == 0


def test_plain_pictures_of_one_colour_are_copies_and_others_are_not(comparer: PhotographComparer) -> None:
    grey, red = (Image.new("RGB", (200, 100), colour) for colour in ((120, 120, 120), (160, 60, 60)))
    assert compare(comparer, grey, grey.resize((400, 220))).similarity == 1
    assert compare(comparer, grey, red).similarity == 0
    assert compare(comparer, grey, scene(0)).similarity == 0


@pytest.mark.parametrize("size", [(1, 1), (200, 3), (3, 200), (17, 16)])
def test_tiny_and_thin_pictures_can_be_compared(comparer: PhotographComparer, size: tuple[int, int]) -> None:
    tiny = scene(0).resize(size)
    assert compare(comparer, tiny, tiny.copy()) == Likeness(1.0, False)
    assert 0 <= compare(comparer, tiny, scene(0)).similarity <= 1


@pytest.mark.parametrize("size", [(1000, 105), (1400, 100), (3000, 100), (100, 1400)])
def test_copy_of_a_long_narrow_picture_is_found(comparer: PhotographComparer, size: tuple[int, int]) -> None:
    for seed in range(3):
        panorama = scene(seed, *size)
        copy = edit(panorama, "jpeg", np.random.default_rng(seed)).resize((size[0] // 2, size[1] // 2))
        assert compare(comparer, panorama, copy).similarity >= THRESHOLD
        assert compare(comparer, panorama, scene(seed + 10, *size)).similarity < 0.2


@pytest.mark.parametrize("size", [(320, 180), (180, 320), (300, 100)])
def test_copy_is_found_at_the_least_working_side(size: tuple[int, int]) -> None:
    (least,) = (bound.ge for bound in VerificationConfig.model_fields["working_side"].metadata if hasattr(bound, "ge"))
    small = PhotographComparer(int(least))
    for seed in range(3):
        copy = edit(scene(seed, *size), "jpeg", np.random.default_rng(seed))
        assert compare(small, scene(seed, *size), copy).similarity >= THRESHOLD


def test_order_of_two_and_company_change_nothing(comparer: PhotographComparer) -> None:
    pictures = [scene(4), *(edit(scene(4), kind, np.random.default_rng(1)) for kind in ("rotation", "text", "crop"))]
    photographs = [prepare(comparer, picture) for picture in [*pictures, scene(5)]]
    together = comparer.compare(photographs[0], photographs[1:])
    assert together == [comparer.compare(photographs[0], [other])[0] for other in photographs[1:]]
    assert together == [comparer.compare(other, [photographs[0]])[0] for other in photographs[1:]]


def test_stored_features_give_the_same_result(comparer: PhotographComparer) -> None:
    thumbnails = [encode_thumbnail(picture, 128) for picture in (scene(6), scene(6).rotate(8))]
    stored = np.zeros(2, FEATURES)
    for row, thumbnail in enumerate(thumbnails):
        stored[row] = comparer.prepare(thumbnail).features
    one, other = (comparer.prepare(thumbnail, stored[row]) for row, thumbnail in enumerate(thumbnails))
    assert comparer.compare(one, [other]) == comparer.compare(
        *(first if index == 0 else [first] for index, first in enumerate(map(comparer.prepare, thumbnails)))
    )
