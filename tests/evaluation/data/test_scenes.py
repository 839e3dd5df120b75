from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from curation.errors import InputError
from evaluation.data.scenes import CITYSCAPES_IDS, IGNORED, FolderData, PublishedData, Scenes, load_scenes, read_mask
from tests.curation.images.odd_files import tiff, tiff_page
from tests.curation.images.test_decode import png
from tests.evaluation.data.scene_builders import grey, photograph, stamps, write


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
        mask.putpalette([7, 77, 177] * 256)  # as published: a palette, whose colours have no meaning
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
    folder_of_field = {
        f"{split}_{kind}": str(root / split / kind) for split in ("train", "test") for kind in ("images", "masks")
    }
    return FolderData(layout="folders", num_classes=2, **folder_of_field)


def test_folders_are_read_by_name(tmp_path: Path) -> None:
    train, test = load_scenes(folders(tmp_path))
    assert [train.read(number).target.unique().tolist() for number in range(3)] == [[0], [1], [0]]
    assert train.hash != test.hash or train.names != test.names
    before = load_scenes(folders(tmp_path))[0].hash
    assert before == train.hash
    write(tmp_path / "train" / "masks" / "a" / "2.png", grey(np.full((18, 20), 1)))
    config = folders(tmp_path / "other")
    assert load_scenes(config)[0].hash == before  # the folder does not matter
    changed = config.model_copy(update={"train_masks": str(tmp_path / "train" / "masks")})
    assert load_scenes(changed)[0].hash != before


def test_a_mask_of_another_size_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"test/masks/a/1\.png: the mask has 9 x 20 pixels, .*1\.jpg 20 x 18"):
        load_scenes(folders(tmp_path / "small", size=(9, 20)))  # before any training
    _, test = load_scenes(folders(tmp_path / "turned", size=(18, 20)))
    test.read(0)
    with pytest.raises(InputError, match=r"test/masks/a/1\.png: the mask has 18 x 20 pixels, .*1\.jpg 20 x 18"):
        test.read(1)


def test_errors_in_masks_and_folders_are_reported(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["grey PNG", "palette PNG", "grey TIFF"])
def test_masks_of_few_bits_keep_their_class_numbers(tmp_path: Path, depth: int, kind: str) -> None:
    values = np.arange(1 << depth).repeat(8)[: 8 * 16][None]  # up to class 15
    bits = np.unpackbits(values.astype(np.uint8)[..., None], axis=-1)[..., -depth:]
    row = np.packbits(bits.reshape(1, -1), axis=1)
    path = tmp_path / "mask"
    width = values.shape[1]
    match kind:
        case "grey PNG":
            path.write_bytes(png(width, 1, depth, 0, row.tobytes()))
        case "palette PNG":
            path.write_bytes(png(width, 1, depth, 3, row.tobytes(), PLTE=bytes(range(100, 100 + 3 * 16))[: 3 << depth]))
        case "grey TIFF":
            path.write_bytes(tiff(tiff_page(row, 1, t256=width, t258=depth)))
    target = read_mask(str(path), np.arange(256, dtype=np.int16))
    assert target.tolist() == values.tolist()


def test_the_alpha_channel_of_a_stamp_is_its_mask(tmp_path: Path) -> None:
    train, test = load_scenes(stamps(tmp_path))
    assert (len(train.names), len(test.names), train.num_classes) == (12, 6, 3)  # the opaque image has none
    seen = set()
    for scenes in (train, test):
        for number in range(len(scenes.names)):
            scene = scenes.read(number)
            assert scene.image.shape == (3, 64, 64) and scene.target.shape == (64, 64)
            red, green, blue = (channel.long() for channel in scene.image)
            clearly = {0: blue > 190, 1: red > 240, 2: green > 240}
            for label, here in clearly.items():
                assert (scene.target[here] == label).all()
            assert sum(int(here.sum()) for here in clearly.values()) > 0.9 * 64 * 64
            seen |= set(scene.target.unique().tolist())
    assert seen == {0, 1, 2}


def test_stamps_depend_only_on_the_seed_and_splits_share_none(tmp_path: Path) -> None:
    config = stamps(tmp_path)
    first, again = load_scenes(config), load_scenes(config)
    other = load_scenes(config, stamp_seed=1)
    for scenes, same, different in zip(first, again, other, strict=True):
        assert scenes.hash == same.hash != different.hash
        pictures = [torch.stack([one.read(number).image for number in (5, 1, 1)]) for one in (scenes, same, different)]
        assert torch.equal(pictures[0], pictures[1]) and not torch.equal(pictures[0], pictures[2])
        assert torch.equal(pictures[0][1], pictures[0][2])

    def shades(scenes: Scenes) -> set[int]:  # each background has a different blue
        return {int(scenes.read(number).image[2].max()) for number in range(len(scenes.names))}

    assert not shades(first[0]) & shades(first[1])
    (both,) = {load_scenes(config.model_copy(update={"classes": "foreground"}))[0].num_classes}
    assert both == 2
    with pytest.raises(InputError, match="no PNG with an alpha channel"):
        load_scenes(config.model_copy(update={"stamps": str(tmp_path / "stamps" / "opaque")}))
