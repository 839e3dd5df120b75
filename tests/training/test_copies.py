"""Training of a copy head: it learns, gives the same bytes twice, and refuses too few images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from curation.errors import InputError
from curation.models import copy_head
from training import copies
from training.copies import Options, copy_loss, edited_view, may_be_copies, mixed, share_found

NUM_FEATURES = copy_head.NUM_INPUTS


def features_with_noise(num_images: int, num_views: int, seed: int) -> np.ndarray:
    """Features (N, V, F): of the first 100, a picture determines 40, and 60 are strong noise of each view."""
    generator = np.random.default_rng(seed)
    features = np.zeros((num_images, num_views, NUM_FEATURES))
    of_picture = generator.normal(0, 1, (num_images, 1, 40))
    features[..., :40] = of_picture + generator.normal(0, 0.5, (num_images, num_views, 40))
    features[..., 40:100] = generator.normal(0, 3, (num_images, num_views, 60))
    return features.astype(np.float16)


def hashes_apart(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2**63, count, dtype=np.uint64)


def pictures(folder: Path, count: int) -> str:
    folder.mkdir()
    for number in range(count):
        coarse = np.random.default_rng(number).integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((72, 60), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return str(folder)


def test_training_finds_more_copies_of_pictures_that_it_did_not_see() -> None:
    seen, unseen = features_with_noise(250, 4, seed=1), features_with_noise(60, 4, seed=2)
    head = copies.train(seen, hashes_apart(250), Options(num_steps=80))
    before = share_found(torch.from_numpy(unseen).float())
    after = share_found(head(torch.from_numpy(unseen).float()))
    assert before < 0.3 and after > 0.9, (before, after)


def test_the_same_images_and_options_give_the_same_bytes(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures", copies.MIN_IMAGES)
    outputs = []
    for name, threads in (("one", 1), ("two", 2)):
        options = Options(num_views=1, num_steps=3, threads=threads, image_size=64)
        measured = copies.run(folder, str(tmp_path / name), options)
        outputs.append((tmp_path / name / copies.HEAD_FILE).read_bytes())
        assert measured.images == copies.MIN_IMAGES and measured.tested_images == copies.MIN_IMAGES // copies.TEST_EVERY
    assert outputs[0] == outputs[1]
    other = Options(num_views=1, num_steps=3, seed=1, image_size=64)
    copies.run(str(tmp_path / "one" / "ingest"), str(tmp_path / "three"), other)  # a finished ingest
    assert (tmp_path / "three" / copies.HEAD_FILE).read_bytes() != outputs[0]
    head = copy_head.load(str(tmp_path / "one" / copies.HEAD_FILE), sha256=None)
    assert head(torch.zeros(3, NUM_FEATURES)).shape == (3, copy_head.NUM_OUTPUTS)


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures", 4)
    with pytest.raises(InputError, match="lists 4 different images; a copy head needs at least 40"):
        copies.run(folder, str(tmp_path / "output"), Options(image_size=64))


def test_the_loss_is_that_of_the_paper() -> None:
    """Against the sums of SSCD, equations 2 to 5, one view at a time."""
    count = 5
    descriptors = torch.randn(2 * count, 8, generator=torch.Generator().manual_seed(0))
    excluded = torch.zeros(count, count, dtype=torch.bool)
    excluded[0, 3] = excluded[3, 0] = True
    unit = functional.normalize(descriptors, dim=1).double()
    contrastive, entropy = 0.0, 0.0
    for row in range(2 * count):
        others = [o for o in range(2 * count) if o % count != row % count and not excluded[row % count, o % count]]
        positive = (unit[row] @ unit[(row + count) % (2 * count)] / copies.TEMPERATURE).exp()
        negative = sum((unit[row] @ unit[other] / copies.TEMPERATURE).exp() for other in others)
        contrastive -= float((positive / (positive + negative)).log()) / (2 * count)
        entropy -= float(min((unit[row] - unit[other]).norm() for other in others).log()) / (2 * count)
    expected = contrastive + copies.ENTROPY_WEIGHT * entropy
    assert float(copy_loss(descriptors, excluded)) == pytest.approx(expected, rel=1e-4)


def test_equal_descriptors_have_a_finite_gradient() -> None:
    descriptors = torch.ones(8, 4, requires_grad=True)
    torch.autograd.backward(copy_loss(descriptors, torch.eye(4, dtype=torch.bool)))
    assert descriptors.grad is not None and descriptors.grad.isfinite().all()


def test_pictures_with_near_hashes_are_not_taken_for_different() -> None:
    hashes = np.array([0, 2**copies.MAX_COPY_BITS - 1, 2 ** (copies.MAX_COPY_BITS + 1) - 1], np.uint64)
    assert may_be_copies(hashes).tolist() == [[True, True, False], [True, True, True], [False, True, True]]


def test_views_are_pictures_that_depend_on_the_generator_alone() -> None:
    one, other = (Image.new("RGB", (60, 33 + 20 * side), color) for side, color in enumerate(("red", "blue")))
    for seed in range(30):
        first, again = (edited_view(one, other, np.random.default_rng(seed)) for _ in range(2))
        assert first.mode == "RGB" and first.tobytes() == again.tobytes()
        # Both pictures are there, whichever way they are mixed.
        red, _, blue = np.asarray(mixed(one, other, np.random.default_rng(seed))).reshape(-1, 3).astype(int).sum(0)
        assert red > 0 and blue > 0
