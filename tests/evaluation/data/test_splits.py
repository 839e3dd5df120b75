"""Tests of splits: every layout gives the same images and labels, and errors name the split."""

from pathlib import Path

import pytest
import torch

from curation.engine.runner import InlineRunner
from curation.errors import InputError, RejectBudgetError, UserError
from curation.images.sources import SourceConfig
from curation.ingest import IngestConfig
from curation.ingest import run as run_ingest
from evaluation.data import splits
from evaluation.data.splits import SplitConfig, few_shot, hold_out, load, load_pair
from tests.evaluation.builders import CLASSES, image_folder, parquet_of, tar_of


def labels_of(split: splits.Split) -> dict[str, str]:
    return dict(zip(split.table["image_id"].to_pylist(), (split.classes[label] for label in split.labels), strict=True))


def test_every_layout_gives_the_same_images_and_labels(tmp_path: Path) -> None:
    folder, runner, cache = image_folder(tmp_path / "folder", 3), InlineRunner(), str(tmp_path / "cache")
    plain = load(SplitConfig(path=folder), cache, runner)
    assert plain.classes == CLASSES and len(plain) == 9 and plain.labels.bincount().tolist() == [3, 3, 3]
    source = SourceConfig(name="all", path=folder, role="seed")
    run_ingest(IngestConfig(sources=(source,)), str(tmp_path / "ingest"), runner)
    named = [
        SplitConfig(path=tar_of(tmp_path / "named.tar", 3, "json"), layout="webdataset"),
        SplitConfig(path=str(tmp_path / "ingest"), layout="ingest", roles=("seed",), sources=("all",)),
    ]
    for config in named:
        assert labels_of(load(config, cache, runner)) == labels_of(plain)
    numbered = [
        SplitConfig(path=tar_of(tmp_path / "numbered.tar", 3, "cls"), layout="webdataset"),
        SplitConfig(path=parquet_of(tmp_path / "images.parquet", 3), layout="parquet", label_column="label"),
    ]
    for config in numbered:
        split = load(config, cache, runner)
        assert split.classes == ("0", "1", "2")
        assert {image: CLASSES[int(label)] for image, label in labels_of(split).items()} == labels_of(plain)


def test_hashes_depend_on_images_and_labels(tmp_path: Path) -> None:
    runner, cache = InlineRunner(), str(tmp_path / "cache")
    tar, numbered = (tar_of(tmp_path / f"{kind}.tar", 3, kind) for kind in ("json", "cls"))
    first, second = (load(SplitConfig(path=path, layout="webdataset"), cache, runner) for path in (tar, numbered))
    assert first.images_hash == second.images_hash and first.data_hash != second.data_hash
    fewer = first.take(torch.tensor([0, 2]))
    assert len(fewer) == 2 and fewer.images_hash != first.images_hash and fewer.classes == first.classes


def test_classes_can_be_selected_and_must_agree(tmp_path: Path) -> None:
    runner, cache = InlineRunner(), str(tmp_path / "cache")
    train = SplitConfig(path=image_folder(tmp_path / "train", 3))
    fewer = SplitConfig(path=image_folder(tmp_path / "fewer", 2, first=9, classes=("disc", "ring")))
    with pytest.raises(InputError, match=r"fewer has no images of 1 of its classes \(bars\)"):
        load_pair(train, fewer, cache, runner)
    with pytest.raises(InputError, match=r"train has 1 classes that .*fewer lacks \(bars\)"):
        load_pair(fewer, train, cache, runner, subset=True)
    _, test = load_pair(train, fewer, cache, runner, subset=True)
    assert test.labels.tolist() == [1, 1, 2, 2] and test.classes == CLASSES
    chosen = SplitConfig(path=train.path, classes=("disc", "ring"))
    assert load_pair(chosen, fewer, cache, runner)[0].classes == ("disc", "ring")
    with pytest.raises(InputError, match="no images of the classes cat"):
        load(SplitConfig(path=train.path, classes=("disc", "cat")), cache, runner)
    with pytest.raises(InputError, match="has one class, disc"):
        load_pair(SplitConfig(path=train.path, classes=("disc",)), fewer, cache, runner)


def test_deeper_folders_make_finer_classes(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "deep" / "a", 2)
    path, cache = str(Path(folder).parent), str(tmp_path / "cache")
    for depth, classes in ((1, ("a",)), (2, tuple(f"a/{name}" for name in CLASSES)), (0, ("a/bars",))):
        split = load(SplitConfig(path=path, label_folders=depth), cache, InlineRunner())
        assert split.classes[: len(classes)] == classes


def test_errors_in_splits_are_reported(tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    with pytest.raises(UserError, match="there is nothing at"):
        load(SplitConfig(path=str(tmp_path / "absent")), cache, InlineRunner())
    folder = Path(image_folder(tmp_path / "damaged", 2))
    (folder / "disc" / "broken.png").write_bytes(b"<html>")
    with pytest.raises(RejectBudgetError, match="1 of 7 images were rejected"):
        load(SplitConfig(path=str(folder)), cache, InlineRunner())
    (folder / "disc" / "broken.png").rename(folder / "stray.png")
    (folder / "stray.png").write_bytes((folder / "disc" / "000.png").read_bytes())
    with pytest.raises(InputError, match="1 of 7 images have no label"):
        load(SplitConfig(path=str(folder)), cache, InlineRunner())
    with pytest.raises(ValueError, match="label_column"):
        SplitConfig(path="x", layout="parquet")


@pytest.mark.parametrize("seed", range(5))
def test_few_shot_and_hold_out_draw_from_every_class(seed: int) -> None:
    labels = torch.randint(4, (200,), generator=torch.Generator().manual_seed(seed))
    rows = few_shot(labels, 7, seed)
    assert labels[rows].bincount().tolist() == [7] * 4 and rows.tolist() == sorted(set(rows.tolist()))
    assert torch.equal(few_shot(labels, 7, seed), rows) and not torch.equal(few_shot(labels, 7, seed + 1), rows)
    assert len(few_shot(labels, 1000, seed)) == 200
    trained, held = hold_out(labels, 0.25, seed)
    assert sorted(trained.tolist() + held.tolist()) == list(range(200))
    shares = labels[held].bincount() / labels.bincount()
    assert (shares - 0.25).abs().max() < 0.02


def test_the_only_image_of_a_class_is_not_held_out() -> None:
    trained, held = hold_out(torch.tensor([0, 1, 1, 1, 1]), 0.9, 0)
    assert 0 in trained and len(held) == 3
    with pytest.raises(InputError, match="holds out none to select by"):
        hold_out(torch.tensor([0, 1]), 0.5, 0)
