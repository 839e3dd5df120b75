"""Tests of segmentation: scores against scikit-learn, crops, windows, heads and their training."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from sklearn.metrics import accuracy_score, balanced_accuracy_score, jaccard_score
from torch import Tensor

from curation import backbone, weights
from curation.config import parse
from curation.errors import ConfigError, InputError
from evaluation import segmentation
from evaluation.data.scenes import IGNORED, FolderData, Scene, Scenes
from evaluation.features import FrozenModel, FrozenModelConfig, load_model
from evaluation.padding import PADDING_COLOR
from evaluation.segmentation import (
    PROTOCOLS,
    LinearSegmentationHead,
    Protocol,
    SegmentationConfig,
    confusion,
    crop_of,
    learning_rate,
    pixel_logits,
    predict,
    score,
    scores_of,
    slide,
    train_head,
)
from tests.evaluation.data.scene_builders import grey, photograph, stamps, write

SMALL = Protocol(image_side=32, window=32, stride=24, train_scales=(1.0, 1.5), batch_size=4, steps=20, warmup_steps=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> FrozenModel:
    path = str(tmp_path_factory.mktemp("model") / "tiny.pth")
    weights.save(backbone.build("vit_tiny", patch_size=8, image_size=32, depth=2, seed=0), path)
    return load_model(FrozenModelConfig(weights=path))


def two_halves(num_scenes: int) -> Scenes:
    """Images with a red and a blue part, the classes 0 and 1, and a border that does not count."""

    def read(number: int) -> Scene:
        image = Image.new("RGB", (40, 40), (40, 40, 230))
        target = Image.new("L", (40, 40), 1)
        box = (0, 0, 8 + 5 * number % 25, 40)
        ImageDraw.Draw(image).rectangle(box, fill=(230, 30, 30))
        ImageDraw.Draw(target).rectangle(box, fill=0)
        ImageDraw.Draw(target).line((0, 0, 39, 0), fill=IGNORED)
        return Scene(torch.from_numpy(np.array(image)).permute(2, 0, 1), torch.from_numpy(np.array(target)))

    return Scenes(tuple(map(str, range(num_scenes))), 2, read, "0" * 64)


@pytest.mark.parametrize("seed", range(5))
def test_scores_agree_with_scikit_learn(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    num_classes = 7
    target = torch.randint(5, (6, 30, 20), generator=random)  # the classes 5 and 6 do not occur
    predicted = torch.where(
        torch.rand(target.shape, generator=random) < 0.6, target, torch.randint(6, target.shape, generator=random)
    )  # and 6 is never predicted
    target[torch.rand(target.shape, generator=random) < 0.1] = IGNORED
    counts = sum(
        (confusion(*pair, num_classes) for pair in zip(predicted, target, strict=True)),
        torch.zeros(num_classes, num_classes, dtype=torch.int64),
    )
    assert torch.equal(counts, confusion(predicted, target, num_classes))
    scores = scores_of(counts)
    known = target != IGNORED
    truth, guess = target[known].numpy(), predicted[known].numpy()
    assert scores.mean_iou == pytest.approx(jaccard_score(truth, guess, average="macro"))
    by_class = jaccard_score(truth, guess, average=None, labels=range(6))
    assert scores.ious == (*(pytest.approx(iou) for iou in by_class), None)
    assert scores.pixel_accuracy == pytest.approx(accuracy_score(truth, guess))
    known_guess = np.where(guess == 5, 4, guess)  # scikit-learn warns about a class that is only predicted
    guessed = scores_of(confusion(torch.from_numpy(known_guess), torch.from_numpy(truth), num_classes))
    assert guessed.mean_class_accuracy == pytest.approx(balanced_accuracy_score(truth, known_guess))


def test_scores_by_hand() -> None:
    target = torch.tensor([[0, 0, 1], [1, 1, IGNORED]])
    scores = scores_of(confusion(torch.tensor([[0, 1, 1], [1, 1, 2]]), target, 3))
    assert scores.ious == (1 / 2, 3 / 4, None)
    assert scores.mean_iou == pytest.approx(5 / 8)
    assert scores.pixel_accuracy == pytest.approx(4 / 5)
    assert scores.mean_class_accuracy == pytest.approx((1 / 2 + 3 / 3) / 2)
    with pytest.raises(InputError, match="No pixel"):
        scores_of(confusion(target, torch.full_like(target, IGNORED), 3))


@pytest.mark.parametrize("seed", range(8))
def test_a_crop_keeps_pixels_and_classes_aligned(seed: int) -> None:
    scene = two_halves(1).read(0)
    protocol = SMALL.model_copy(update={"train_scales": (0.5, 2.0)})
    crop = crop_of(scene, protocol, np.random.default_rng(seed), distort=False)
    again = crop_of(scene, protocol, np.random.default_rng(seed), distort=False)
    assert torch.equal(crop.image, again.image) and torch.equal(crop.target, again.target)
    assert crop.image.shape == (3, 32, 32) and crop.image.dtype == torch.uint8
    red, blue = (crop.image[0] > 220) & (crop.image[2] < 50), (crop.image[2] > 220) & (crop.image[0] < 50)
    assert set(crop.target[red].tolist()) <= {0, IGNORED} and set(crop.target[blue].tolist()) <= {1, IGNORED}
    padding = (crop.image == torch.tensor(PADDING_COLOR, dtype=torch.uint8)[:, None, None]).all(0)
    assert (crop.target[padding] == IGNORED).all()
    distorted = crop_of(scene, protocol, np.random.default_rng(seed))
    assert torch.equal(distorted.target, crop.target)


def test_windows_cover_the_image_and_are_averaged() -> None:
    image = torch.arange(2 * 3 * 50 * 70).view(2, 3, 50, 70)[0].float()
    for window, stride in ((32, 24), (20, 7), (64, 64)):
        starts = segmentation._starts(50, window, stride)
        assert starts[0] == 0 and starts[-1] == max(50 - window, 0)
        assert all(after - before <= stride for before, after in itertools.pairwise(starts))
        for per_pass in (2, 100):
            doubled = slide(lambda part: part * 2, image, window=window, stride=stride, windows_per_pass=per_pass)
            torch.testing.assert_close(doubled, image * 2)
    assert segmentation._starts(600, 512, 341) == [0, 88]  # as mmsegmentation places them
    assert segmentation._starts(853, 512, 341) == [0, 341]
    assert segmentation._starts(854, 512, 341) == [0, 341, 342]

    def columns(part: Tensor) -> Tensor:  # 0 to 3 in each window
        return torch.arange(4.0).expand(len(part), 1, 1, 4)

    row = slide(columns, torch.zeros(3, 1, 6), window=4, stride=2, windows_per_pass=2)
    assert row[0, 0].tolist() == [0, 1, (2 + 0) / 2, (3 + 1) / 2, 2, 3]


def test_images_are_padded_to_whole_patches(model: FrozenModel) -> None:
    head = LinearSegmentationHead(model.embed_dim, 3, seed=0).eval()
    pixels = torch.randint(256, (2, 3, 27, 34), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = pixel_logits(model, head, pixels, 1)
        by_hand = torch.tensor(PADDING_COLOR, dtype=torch.uint8)[:, None, None].repeat(2, 1, 32, 40)
        by_hand[:, :, 2:29, 3:37] = pixels
        expected = pixel_logits(model, head, by_hand, 1)[:, :, 2:29, 3:37]
    assert logits.shape == (2, 3, 27, 34)
    torch.testing.assert_close(logits, expected)


def test_the_learning_rate_warms_up_and_falls() -> None:
    protocol = PROTOCOLS["linear"]
    assert learning_rate(0, protocol) == 0
    assert learning_rate(750, protocol) == pytest.approx(1e-3 * (1 - 750 / 40_000) / 2)
    assert learning_rate(20_000, protocol) == pytest.approx(5e-4)
    assert learning_rate(39_999, protocol) == pytest.approx(1e-3 / 40_000)


def test_a_head_learns_and_depends_on_the_seed(model: FrozenModel) -> None:
    scenes = two_halves(6)
    untrained = LinearSegmentationHead(model.embed_dim, 2, seed=0).eval()
    head = train_head(model, scenes, SMALL, seed=3)
    before, after = (score(model, one, scenes, SMALL).mean_iou for one in (untrained, head))
    assert after > 0.85 > before + 0.1
    again, other = (train_head(model, scenes, SMALL, seed=seed) for seed in (3, 4))
    assert all(
        torch.equal(left, right)
        for left, right in zip(head.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert not torch.equal(head.classify.weight, other.classify.weight)
    assert all(score(model, head, scenes, SMALL, windows_per_pass=size).mean_iou == after for size in (1, 50))


def test_several_blocks_and_scales_and_the_mirror_image(model: FrozenModel) -> None:
    protocol = SMALL.model_copy(update={"blocks": 2, "test_scales": (1.0, 1.5), "flip": True})
    scenes = two_halves(6)
    head = train_head(model, scenes, protocol)
    assert head.classify.in_channels == 2 * model.embed_dim
    scene = scenes.read(2)
    straight, mirrored = (predict(model, head, image, protocol) for image in (scene.image, scene.image.flip(2)))
    assert straight.shape == scene.target.shape
    assert (straight == mirrored.flip(1)).double().mean() > 0.99
    assert score(model, head, scenes, protocol).mean_iou > 0.8
    no_flip = protocol.model_copy(update={"flip": False})
    with torch.no_grad():  # the probabilities of two scales are averaged
        parts = []
        for scale in (32, 48):
            resized = segmentation._resized(scene.image, [scale, scale])
            logits = slide(
                lambda part: pixel_logits(model, head, part, 2), resized, window=32, stride=24, windows_per_pass=4
            )
            parts.append(torch.nn.functional.interpolate(logits[None], size=(40, 40), mode="bilinear")[0].softmax(0))
    assert torch.equal(predict(model, head, scene.image, no_flip), ((parts[0] + parts[1]) / 2).argmax(0))


def test_an_evaluation_end_to_end(tmp_path: Path, model: FrozenModel) -> None:
    config = SegmentationConfig(name="discs", data=stamps(tmp_path), protocol=SMALL)
    results = segmentation.run(config, model, str(tmp_path))
    assert [result.metric for result in results] == ["mIoU", "mean class accuracy", "pixel accuracy"]
    first = results[0]
    assert (first.evaluation, first.dataset, first.model_hash) == ("segmentation", "discs", model.hash)
    assert first.protocol == "last block, 32 px, 20 steps" and 0.3 < first.value < 1
    assert len(first.settings["ious"]) == 3 and first.settings["protocol"]["window"] == 32
    assert segmentation.run(config, model, str(tmp_path))[0].value == first.value
    assert segmentation._protocol_name(PROTOCOLS["multiscale"]) == "multiscale"


def test_models_that_do_not_fit_are_refused(tmp_path: Path, model: FrozenModel) -> None:
    config = SegmentationConfig(name="discs", data=stamps(tmp_path), protocol="multiscale")
    with pytest.raises(InputError, match="has 2 blocks; the protocol reads the last 4"):
        segmentation.run(config, model, str(tmp_path))
    with pytest.raises(InputError, match="pixels has no patch tokens"):
        segmentation.run(config, load_model(FrozenModelConfig(name="pixels")), str(tmp_path))


def test_configs_are_closed() -> None:
    text = {"name": "x", "data": {"layout": "voc2012", "path": "p"}, "protocol": "linear"}
    assert parse(SegmentationConfig, text, origin="test").protocol == "linear"
    custom = parse(SegmentationConfig, text | {"protocol": {"steps": 5, "test_scales": [1.0, 2.0]}}, origin="test")
    assert isinstance(custom.protocol, Protocol) and custom.protocol.test_scales == (1.0, 2.0)
    for change in (
        {"data": {"layout": "voc2013", "path": "p"}},
        {"data": {"layout": "stamps", "stamps": "a", "backgrounds": []}},
        {"protocol": "best"},
        {"protocol": {"stride": 600}},
    ):
        with pytest.raises(ConfigError):
            parse(SegmentationConfig, text | change, origin="test")


def masked_folders(root: Path, values: dict[str, list[int]]) -> SegmentationConfig:
    """Three images a split; the upper half of each mask has the first of the split's values, the lower the second."""
    for split, (upper, lower) in values.items():
        for number in range(3):
            write(root / split / "images" / f"{number}.png", photograph(number, (40, 36)))
            write(root / split / "masks" / f"{number}.png", grey(np.repeat([upper, lower], 18)[:, None].repeat(40, 1)))
    folder_of_field = {f"{split}_{kind}": str(root / split / kind) for split in values for kind in ("images", "masks")}
    protocol = SMALL.model_copy(update={"steps": 3})
    data = FolderData(layout="folders", num_classes=2, **folder_of_field)
    return SegmentationConfig(name="halves", data=data, protocol=protocol)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        # 0 and 255, as many tools write two classes: 255 does not count, so one class is left and scores 1.
        ([0, 255], [0, 255], r"^halves: the masks of the 3 training images have none of the classes 1 of the 2"),
        ([255, 255], [0, 1], r"have no class of the 2, numbered from 0.* Check the numbers .* num_classes and ignored"),
        ([0, 1], [255, 255], r"^halves: no pixel of the 3 scored images has a class"),
    ],
)
def test_a_class_that_no_training_mask_has_is_refused_before_training(
    train: list[int], test: list[int], message: str, tmp_path: Path, model: FrozenModel
) -> None:
    config = masked_folders(tmp_path, {"train": train, "test": test})
    with pytest.raises(InputError, match=message):
        segmentation.run(config, model, str(tmp_path))
    works = masked_folders(tmp_path / "other", {"train": [0, 1], "test": [0, 0]})
    assert len(segmentation.run(works, model, str(tmp_path))) == 3


@pytest.mark.parametrize("damaged", ["train/masks/2.png", "test/masks/1.png", "test/images/1.png"])
def test_a_damaged_file_is_named_before_training(damaged: str, tmp_path: Path, model: FrozenModel) -> None:
    config = masked_folders(tmp_path, {"train": [0, 1], "test": [0, 1]})
    file = tmp_path / damaged
    file.write_bytes(file.read_bytes()[:-40])  # its header is whole
    # A million steps: the test ends only if the file is read before them.
    endless = config.model_copy(update={"protocol": SMALL.model_copy(update={"steps": 1_000_000})})
    with pytest.raises(InputError, match=damaged):
        segmentation.run(endless, model, str(tmp_path))
