import itertools
from pathlib import Path
from typing import Any

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
from evaluation.features import Model, ModelConfig, load_model
from evaluation.segmentation import (
    CITYSCAPES_IDS,
    IGNORED,
    PROTOCOLS,
    FolderData,
    LinearHead,
    Protocol,
    PublishedData,
    Scene,
    Scenes,
    SegmentationConfig,
    StampData,
    confusion,
    crop_of,
    learning_rate,
    load_scenes,
    pixel_logits,
    predict,
    score,
    scores_of,
    slide,
    train_head,
)

SMALL = Protocol(
    image_side=32, window=32, stride=24, train_scales=(1.0, 1.5), batch_size=4, steps=20, warmup_steps=2, distort=False
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = str(tmp_path_factory.mktemp("model") / "tiny.pth")
    weights.save(backbone.build("vit_tiny", patch_size=8, image_size=32, depth=2, seed=0), path)
    return load_model(ModelConfig(weights=path))


def photograph(seed: int, size: tuple[int, int]) -> Image.Image:
    """Bands of colour with noise."""
    random = np.random.default_rng(seed)
    smooth = np.asarray(Image.fromarray(random.integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize(size), np.int16)
    return Image.fromarray((smooth + random.integers(-9, 10, smooth.shape)).clip(0, 255).astype(np.uint8))


def write(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def grey(values: Any) -> Image.Image:
    return Image.fromarray(np.array(values, np.uint8))


def two_halves(num_scenes: int) -> Scenes:
    """Pictures that are red and blue, the classes 0 and 1, with a border that does not count."""

    def read(place: int) -> Scene:
        image = Image.new("RGB", (40, 40), (40, 40, 230))
        target = Image.new("L", (40, 40), 1)
        box = (0, 0, 8 + 5 * place % 25, 40)
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
        (confusion(one, own, num_classes) for one, own in zip(predicted, target, strict=True)),
        torch.zeros(num_classes, num_classes, dtype=torch.int64),
    )
    assert torch.equal(counts, confusion(predicted, target, num_classes))
    found = scores_of(counts)
    known = target != IGNORED
    truth, guess = target[known].numpy(), predicted[known].numpy()
    assert found.mean_iou == pytest.approx(jaccard_score(truth, guess, average="macro"))
    by_class = jaccard_score(truth, guess, average=None, labels=range(6))
    assert found.ious == (*(pytest.approx(iou) for iou in by_class), None)
    assert found.pixel_accuracy == pytest.approx(accuracy_score(truth, guess))
    known_guess = np.where(guess == 5, 4, guess)  # scikit-learn warns of a class that is only predicted
    as_if = scores_of(confusion(torch.from_numpy(known_guess), torch.from_numpy(truth), num_classes))
    assert as_if.mean_class_accuracy == pytest.approx(balanced_accuracy_score(truth, known_guess))


def test_scores_by_hand() -> None:
    target = torch.tensor([[0, 0, 1], [1, 1, IGNORED]])
    found = scores_of(confusion(torch.tensor([[0, 1, 1], [1, 0, 2]]), target, 3))
    assert found.ious == (pytest.approx(1 / 3), pytest.approx(2 / 4), None)
    assert found.mean_iou == pytest.approx(5 / 12)
    assert found.pixel_accuracy == pytest.approx(3 / 5)
    assert found.mean_class_accuracy == pytest.approx((1 / 2 + 2 / 3) / 2)
    with pytest.raises(InputError, match="No pixel"):
        scores_of(confusion(target, torch.full_like(target, IGNORED), 3))


def test_ade20k_is_read_as_published(tmp_path: Path) -> None:
    for split in ("training", "validation"):
        for number in (2, 1):
            name = f"ADE_{split[:5]}_0000000{number}"
            write(tmp_path / "images" / split / f"{name}.jpg", photograph(number, (30, 20)))
            mask = np.full((20, 30), number)
            mask[0], mask[1] = 0, 150
            write(tmp_path / "annotations" / split / f"{name}.png", grey(mask))
    train, test = load_scenes(PublishedData(layout="ade20k", path=str(tmp_path)))
    assert [Path(name).name for name in test.names] == ["ADE_valid_00000001.jpg", "ADE_valid_00000002.jpg"]
    assert train.num_classes == 150
    scene = train.read(1)
    assert scene.image.shape == (3, 20, 30) and scene.image.dtype == torch.uint8
    assert scene.target[:3, 0].tolist() == [IGNORED, 149, 1]
    expected = Image.open(train.names[1]).convert("RGB")
    assert np.array_equal(scene.image.permute(1, 2, 0).numpy(), np.array(expected))


def test_cityscapes_is_read_as_published(tmp_path: Path) -> None:
    ids = np.zeros((20, 34), np.uint8)
    ids[:] = np.arange(34)
    for split, city in (("train", "aachen"), ("train", "zurich"), ("val", "lindau")):
        stem = f"{city}_000000_000019"
        write(tmp_path / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", photograph(1, (34, 20)))
        for kind in ("labelIds", "instanceIds", "color"):
            write(
                tmp_path / "gtFine" / split / city / f"{stem}_gtFine_{kind}.png", grey(ids if kind[0] == "l" else [[0]])
            )
    train, test = load_scenes(PublishedData(layout="cityscapes", path=str(tmp_path)))
    assert (len(train.names), len(test.names), train.num_classes) == (2, 1, 19)
    row = test.read(0).target[0].tolist()
    assert [row[value] for value in CITYSCAPES_IDS] == list(range(19))
    assert sum(value == IGNORED for value in row) == 34 - 19
    # Cited: cityscapesScripts, labels.py: road 7 -> 0, person 24 -> 11, bicycle 33 -> 18, caravan 29 -> none.
    assert [row[value] for value in (7, 24, 33, 29)] == [0, 11, 18, IGNORED]


def test_voc_is_read_as_published(tmp_path: Path) -> None:
    listing = tmp_path / "ImageSets" / "Segmentation"
    listing.mkdir(parents=True)
    (listing / "train.txt").write_text("2007_000032\n2007_000039\n")
    (listing / "val.txt").write_text("2007_000033\n")
    for name in ("2007_000032", "2007_000033", "2007_000039", "2007_999999"):
        write(tmp_path / "JPEGImages" / f"{name}.jpg", photograph(3, (24, 18)))
        mask = grey(np.full((18, 24), 20))
        mask.putpalette([7, 77, 177] * 256)  # as published: a palette, whose colours mean nothing
        mask.paste(IGNORED, (0, 0, 24, 1))
        write(tmp_path / "SegmentationClass" / f"{name}.png", mask)
    train, test = load_scenes(PublishedData(layout="voc2012", path=str(tmp_path)))
    assert [Path(name).stem for name in train.names] == ["2007_000032", "2007_000039"]
    assert test.read(0).target[:2, 0].tolist() == [IGNORED, 20]
    (listing / "val.txt").unlink()
    with pytest.raises(InputError, match=r"No list of images at .*val\.txt"):
        load_scenes(PublishedData(layout="voc2012", path=str(tmp_path)))


def folders(root: Path, *, size: tuple[int, int] = (20, 18)) -> FolderData:
    for split in ("train", "test"):
        for number in range(3):
            write(root / split / "images" / f"a/{number}.jpg", photograph(number, (20, 18)))
            write(root / split / "masks" / f"a/{number}.png", grey(np.full((18, 20), number % 2)))
    write(root / "test" / "masks" / "a" / "1.png", grey(np.full(size[::-1], 1)))
    places = {
        f"{split}_{kind}": str(root / split / kind) for split in ("train", "test") for kind in ("images", "masks")
    }
    return FolderData(layout="folders", num_classes=2, **places)


def test_folders_are_read_by_name(tmp_path: Path) -> None:
    train, test = load_scenes(folders(tmp_path))
    assert [train.read(place).target.unique().tolist() for place in range(3)] == [[0], [1], [0]]
    assert train.hash != test.hash or train.names != test.names
    before = load_scenes(folders(tmp_path))[0].hash
    assert before == train.hash
    write(tmp_path / "train" / "masks" / "a" / "2.png", grey(np.full((18, 20), 1)))
    config = folders(tmp_path / "other")
    assert load_scenes(config)[0].hash == before  # wherever it lies
    changed = config.model_copy(update={"train_masks": str(tmp_path / "train" / "masks")})
    assert load_scenes(changed)[0].hash != before


def test_a_mask_of_another_size_is_named(tmp_path: Path) -> None:
    _, test = load_scenes(folders(tmp_path, size=(18, 20)))
    test.read(0)
    with pytest.raises(InputError, match=r"test/masks/a/1\.png: the mask has 18 x 20 pixels, .*1\.jpg 20 x 18"):
        test.read(1)


def test_bad_masks_and_folders_are_told(tmp_path: Path) -> None:
    config = folders(tmp_path)
    mask = tmp_path / "test" / "masks" / "a" / "0.png"
    _, test = load_scenes(config)
    for image, message in (
        (grey(np.full((18, 20), 7)), "the value 7, which is no class"),
        (Image.new("RGB", (20, 18)), "mode RGB"),
        (Image.fromarray(np.full((18, 20), 999, np.uint16)), "the value 999"),
    ):
        image.save(mask)
        with pytest.raises(InputError, match=rf"0\.png: .*{message}"):
            test.read(0)
    mask.write_bytes(b"not a picture")
    with pytest.raises(InputError, match=r"0\.png: not a readable PNG"):
        test.read(0)
    mask.unlink()
    with pytest.raises(InputError, match=r"no mask for a/0\."):
        load_scenes(config)
    (tmp_path / "test" / "masks" / "a" / "2.bmp").write_bytes(b"")
    with pytest.raises(InputError, match="two files are called 'a/2'"):
        load_scenes(config)
    with pytest.raises(InputError, match=r"No folder '.*annotations/training'"):
        write(tmp_path / "images" / "training" / "x.jpg", photograph(0, (20, 20)))
        load_scenes(PublishedData(layout="ade20k", path=str(tmp_path)))


def stamps(root: Path) -> StampData:
    """Red animals and green plants, cut out as discs, and blue backgrounds."""
    for number in range(4):
        for folder, color in (("animals", (250, 0, 0)), ("plants", (0, 250, 0))):
            disc = Image.new("RGBA", (40, 30 + number), (9, 9, 9, 0))
            ImageDraw.Draw(disc).ellipse((2, 2, 36, 26), fill=(*color, 255 - number))
            write(root / "stamps" / folder / "deep" / f"{number}.png", disc)
        write(root / "backgrounds" / f"{number}.png", Image.new("RGB", (50, 40), (0, 0, 200 + 10 * number)))
    write(root / "stamps" / "opaque" / "square.png", Image.new("RGB", (20, 20), (250, 0, 0)))
    return StampData(
        layout="stamps",
        stamps=str(root / "stamps"),
        backgrounds=str(root / "backgrounds"),
        side=64,
        train_pictures=12,
        test_pictures=6,
    )


def test_the_alpha_of_a_stamp_is_its_mask(tmp_path: Path) -> None:
    train, test = load_scenes(stamps(tmp_path))
    assert (len(train.names), len(test.names), train.num_classes) == (12, 6, 3)  # none for what is opaque
    seen = set()
    for scenes in (train, test):
        for place in range(len(scenes.names)):
            scene = scenes.read(place)
            assert scene.image.shape == (3, 64, 64) and scene.target.shape == (64, 64)
            red, green, blue = (channel.long() for channel in scene.image)
            clearly = {0: blue > 190, 1: red > 240, 2: green > 240}
            for label, here in clearly.items():
                assert (scene.target[here] == label).all()
            assert sum(int(here.sum()) for here in clearly.values()) > 0.9 * 64 * 64
            seen |= set(scene.target.unique().tolist())
    assert seen == {0, 1, 2}


def test_stamps_depend_on_the_seed_alone_and_splits_share_none(tmp_path: Path) -> None:
    config = stamps(tmp_path)
    first, again = load_scenes(config), load_scenes(config)
    other = load_scenes(config.model_copy(update={"seed": 1}))
    for ours, same, different in zip(first, again, other, strict=True):
        assert ours.hash == same.hash != different.hash
        pictures = [torch.stack([one.read(place).image for place in (5, 1, 1)]) for one in (ours, same, different)]
        assert torch.equal(pictures[0], pictures[1]) and not torch.equal(pictures[0], pictures[2])
        assert torch.equal(pictures[0][1], pictures[0][2])

    def shades(scenes: Scenes) -> set[int]:  # each background has a blue of its own
        return {int(scenes.read(place).image[2].max()) for place in range(len(scenes.names))}

    assert not shades(first[0]) & shades(first[1])
    (both,) = {load_scenes(config.model_copy(update={"classes": "foreground"}))[0].num_classes}
    assert both == 2
    with pytest.raises(InputError, match="no PNG with an alpha channel"):
        load_scenes(config.model_copy(update={"stamps": config.backgrounds.replace("backgrounds", "stamps/opaque")}))


@pytest.mark.parametrize("seed", range(8))
def test_a_crop_keeps_pixels_and_classes_together(seed: int) -> None:
    scene = two_halves(1).read(0)
    protocol = SMALL.model_copy(update={"train_scales": (0.5, 2.0)})
    crop = crop_of(scene, protocol, np.random.default_rng(seed))
    again = crop_of(scene, protocol, np.random.default_rng(seed))
    assert torch.equal(crop.image, again.image) and torch.equal(crop.target, again.target)
    assert crop.image.shape == (3, 32, 32) and crop.image.dtype == torch.uint8
    red, blue = (crop.image[0] > 220) & (crop.image[2] < 50), (crop.image[2] > 220) & (crop.image[0] < 50)
    assert set(crop.target[red].tolist()) <= {0, IGNORED} and set(crop.target[blue].tolist()) <= {1, IGNORED}
    padding = (crop.image == torch.tensor(segmentation.PADDING, dtype=torch.uint8)[:, None, None]).all(0)
    assert (crop.target[padding] == IGNORED).all()
    distorted = crop_of(scene, protocol.model_copy(update={"distort": True}), np.random.default_rng(seed))
    assert torch.equal(distorted.target, crop.target)


def test_windows_cover_the_picture_and_are_averaged() -> None:
    image = torch.arange(2 * 3 * 50 * 70).view(2, 3, 50, 70)[0].float()
    for window, stride in ((32, 24), (32, 32), (20, 7), (64, 64), (100, 10)):
        starts = segmentation._starts(50, window, stride)
        assert starts[0] == 0 and starts[-1] == max(50 - window, 0)
        assert all(after - before <= stride for before, after in itertools.pairwise(starts))
        for per_pass in (1, 3, 100):
            found = slide(lambda part: part * 2, image, window=window, stride=stride, windows_per_pass=per_pass)
            torch.testing.assert_close(found, image * 2)
    assert segmentation._starts(600, 512, 341) == [0, 88]  # as mmsegmentation places them
    assert segmentation._starts(853, 512, 341) == [0, 341]
    assert segmentation._starts(854, 512, 341) == [0, 341, 342]

    def from_left(part: Tensor) -> Tensor:  # 0 to 3 in each window
        return torch.arange(4.0).expand(len(part), 1, 1, 4)

    row = slide(from_left, torch.zeros(3, 1, 6), window=4, stride=2, windows_per_pass=2)
    assert row[0, 0].tolist() == [0, 1, (2 + 0) / 2, (3 + 1) / 2, 2, 3]


def test_sides_that_are_no_multiple_of_the_patch_are_padded(model: Model) -> None:
    head = LinearHead(model.embed_dim, 3, seed=0).eval()
    pixels = torch.randint(256, (2, 3, 27, 34), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = pixel_logits(model, head, pixels, 1)
        by_hand = torch.tensor(segmentation.PADDING, dtype=torch.uint8)[:, None, None].repeat(2, 1, 32, 40)
        by_hand[:, :, 2:29, 3:37] = pixels
        expected = pixel_logits(model, head, by_hand, 1)[:, :, 2:29, 3:37]
    assert found.shape == (2, 3, 27, 34)
    torch.testing.assert_close(found, expected)


def test_the_learning_rate_warms_up_and_falls() -> None:
    protocol = PROTOCOLS["linear"]
    assert learning_rate(0, protocol) == 0
    assert learning_rate(750, protocol) == pytest.approx(1e-3 * (1 - 750 / 40_000) / 2)
    assert learning_rate(20_000, protocol) == pytest.approx(5e-4)
    assert learning_rate(39_999, protocol) == pytest.approx(1e-3 / 40_000)


def test_a_head_learns_and_the_seed_makes_it(model: Model) -> None:
    scenes = two_halves(6)
    untrained = LinearHead(model.embed_dim, 2, seed=0).eval()
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


def test_several_blocks_scales_and_the_mirror(model: Model) -> None:
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
    with torch.no_grad():  # two scales are the mean of their probabilities
        parts = []
        for scale in (32, 48):
            resized = segmentation._resized(scene.image, [scale, scale])
            logits = slide(
                lambda part: pixel_logits(model, head, part, 2), resized, window=32, stride=24, windows_per_pass=4
            )
            parts.append(torch.nn.functional.interpolate(logits[None], size=(40, 40), mode="bilinear")[0].softmax(0))
    assert torch.equal(predict(model, head, scene.image, no_flip), ((parts[0] + parts[1]) / 2).argmax(0))


def test_an_evaluation_end_to_end(tmp_path: Path, model: Model) -> None:
    config = SegmentationConfig(name="discs", data=stamps(tmp_path), protocol=SMALL)
    results = segmentation.run(config, model, str(tmp_path))
    assert [result.metric for result in results] == ["mIoU", "mean class accuracy", "pixel accuracy"]
    first = results[0]
    assert (first.evaluation, first.dataset, first.model_hash) == ("segmentation", "discs", model.hash)
    assert first.protocol == "1 blocks, 32 px, 20 steps" and 0.3 < first.value < 1
    assert len(first.settings["ious"]) == 3 and first.settings["protocol"]["window"] == 32
    assert segmentation.run(config, model, str(tmp_path))[0].value == first.value
    assert segmentation._protocol_name(PROTOCOLS["multiscale"]) == "multiscale"


def test_models_that_do_not_fit_are_told(tmp_path: Path, model: Model) -> None:
    config = SegmentationConfig(name="discs", data=stamps(tmp_path), protocol="multiscale")
    with pytest.raises(InputError, match="has 2 blocks; the protocol takes the last 4"):
        segmentation.run(config, model, str(tmp_path))
    with pytest.raises(InputError, match="pixels has no patch tokens"):
        segmentation.run(config, load_model(ModelConfig(name="pixels")), str(tmp_path))


def test_configs_are_closed() -> None:
    text = {"name": "x", "data": {"layout": "voc2012", "path": "p"}, "protocol": "linear"}
    assert parse(SegmentationConfig, text, origin="test").protocol == "linear"
    own = parse(SegmentationConfig, text | {"protocol": {"steps": 5, "test_scales": [1.0, 2.0]}}, origin="test")
    assert isinstance(own.protocol, Protocol) and own.protocol.test_scales == (1.0, 2.0)
    for change in (
        {"data": {"layout": "voc2013", "path": "p"}},
        {"data": {"layout": "stamps", "stamps": "a", "backgrounds": "b", "stamp_sides": [0.9, 0.2]}},
        {"protocol": "best"},
        {"protocol": {"stride": 600}},
    ):
        with pytest.raises(ConfigError):
            parse(SegmentationConfig, text | change, origin="test")
