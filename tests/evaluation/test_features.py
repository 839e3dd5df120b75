"""Tests of features: how models load, and that the cache gives only features of the same model, images and view."""

from pathlib import Path

import numpy as np
import pytest
import torch

from curation import backbone, weights
from curation.engine import progress
from curation.engine.runner import InlineRunner
from curation.errors import InputError, WeightsError
from evaluation.data import splits
from evaluation.data.splits import Split, SplitConfig
from evaluation.data.views import PicturesConfig
from evaluation.features import FeatureFiles, FrozenModelConfig, extract, load_model
from tests.evaluation.builders import checkpoint, image_folder, model_config

SMALL = PicturesConfig(resize_size=40, image_size=32)


def split_of(tmp_path: Path) -> Split:
    return splits.load(SplitConfig(path=image_folder(tmp_path / "images", 4)), str(tmp_path / "cache"), InlineRunner())


def pixels(count: int = 3, side: int = 32) -> torch.Tensor:
    return torch.randint(256, (count, 3, side, side), generator=torch.Generator().manual_seed(0)).byte()


def test_a_backbone_loads_by_its_path_alone(tmp_path: Path) -> None:
    for layout, name in (("released", "one.pth"), ("transformers", "folder"), ("timm", "one.safetensors")):
        network = backbone.build("vit_tiny", patch_size=8, image_size=32, depth=3, layer_scale=1.0)
        weights.save(network, str(tmp_path / name), layout)  # type: ignore[arg-type]  # a SavedLayout
        model = load_model(FrozenModelConfig(weights=str(tmp_path / name)))
        assert (model.embed_dim, model.patch_size, model.num_blocks) == (192, 8, 3)
        normal = (pixels().float() - model.mean) / model.deviation
        torch.testing.assert_close(model.image_features(pixels()), network(normal).detach())
        (first, _), (last, cls) = model.intermediate(pixels(), [0, 2])
        assert first.shape == last.shape == (3, 192, 4, 4)
        torch.testing.assert_close(cls, model.image_features(pixels()))


def test_hashes_differ_where_features_differ(tmp_path: Path) -> None:
    one, other = checkpoint(tmp_path / "one.pth", 0), checkpoint(tmp_path / "other.pth", 1)
    config = FrozenModelConfig(weights=one)
    changed = [
        FrozenModelConfig(weights=other),
        FrozenModelConfig(weights=one, pooling="patch_mean"),
        FrozenModelConfig(weights=one, precision="bfloat16"),
        FrozenModelConfig(weights=one, untrained_seed=5),
        FrozenModelConfig(weights=one, position_interpolation="plain"),
        FrozenModelConfig(name="pixels"),
    ]
    hashes = [load_model(one).hash for one in (config, *changed)]
    assert len(set(hashes)) == len(hashes)
    assert load_model(FrozenModelConfig(weights=one, label="another name")).hash == hashes[0]


def test_fresh_weights_have_the_same_architecture(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "one.pth", 3, registers=2)
    model = load_model(FrozenModelConfig(weights=path, untrained_seed=3))
    assert model.backbone is not None and model.backbone.num_register_tokens == 2 and "untrained" in model.name


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"holds a vit_tiny_patch8; the config says vit_small_patch16"):
        load_model(FrozenModelConfig(name="vit_small_patch16", weights=checkpoint(tmp_path / "one.pth")))
    with pytest.raises(ValueError, match="needs weights"):
        FrozenModelConfig()
    with pytest.raises(ValueError, match="untrained_seed 1 is for Vision Transformers"):
        FrozenModelConfig(name="pixels", untrained_seed=1)
    with pytest.raises(InputError, match="pixels has no patch tokens"):
        load_model(FrozenModelConfig(name="pixels")).intermediate(pixels(), [0])


def test_features_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    network = backbone.build("vit_tiny", patch_size=8, image_size=32, depth=1)
    network.norm.weight.data[3] = torch.finfo(torch.float32).max
    weights.save(network, str(tmp_path / "broken.pth"))
    with pytest.raises(InputError, match="not finite"):
        load_model(FrozenModelConfig(weights=str(tmp_path / "broken.pth"))).image_features(pixels())


def test_features_do_not_depend_on_batch_or_cache(tmp_path: Path) -> None:
    split, model = split_of(tmp_path), load_model(model_config(tmp_path))
    matrices = [
        extract(model, split, SMALL.model_copy(update={"batch_size": size}), str(tmp_path / f"cache-{size}")).matrix()
        for size in (1, 5, 64)
    ]
    for matrix in matrices:
        torch.testing.assert_close(matrix, matrices[0], atol=1e-4, rtol=1e-4)
    assert matrices[0].shape == (12, 192) and len(torch.unique(matrices[0], dim=0)) == 12
    again = extract(model, split, SMALL.model_copy(update={"batch_size": 7}), str(tmp_path / "cache-64"))
    assert torch.equal(again.matrix(), matrices[2]), "the cache must be read"


def test_a_cached_feature_of_another_model_or_view_is_never_used(tmp_path: Path) -> None:
    split, cache = split_of(tmp_path), str(tmp_path / "cache")
    models = [load_model(model_config(tmp_path, seed)) for seed in (0, 1)]
    first, second = (extract(model, split, SMALL, cache).matrix() for model in models)
    assert not torch.allclose(first, second)
    # The same path, other weights.
    (tmp_path / "vit-0.pth").write_bytes((tmp_path / "vit-1.pth").read_bytes())
    assert torch.equal(extract(load_model(models[0].config), split, SMALL, cache).matrix(), second)
    other = extract(models[1], split, PicturesConfig(resize_size=32, image_size=32), cache).matrix()
    assert not torch.allclose(other, second)
    reversed_rows = torch.arange(len(split)).flip(0)
    turned = extract(models[1], split.take(reversed_rows), SMALL, cache).matrix()
    torch.testing.assert_close(turned, second[reversed_rows], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("damage", ["cut", "nan", "deleted"])
def test_damaged_features_are_computed_again(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rich keeps the standard error of its import, so the test makes a new console."""
    monkeypatch.setattr(progress, "_console", progress.Console(stderr=True, highlight=False, width=400))
    split, model, cache = split_of(tmp_path), load_model(FrozenModelConfig(name="pixels")), tmp_path / "cache"
    whole = extract(model, split, SMALL, str(cache)).matrix()
    (part,) = cache.glob("features/*/features-00000.npy")
    data = part.read_bytes()
    if damage == "deleted":
        part.unlink()
    else:
        nan = np.float32(np.nan).tobytes()
        part.write_bytes(data[:1000] if damage == "cut" else data[:-4] + nan)
    capsys.readouterr()
    assert torch.equal(extract(model, split, SMALL, str(cache)).matrix(), whole)
    assert "features-00000.npy" in (said := capsys.readouterr().err) and "done again" in said
    assert part.read_bytes() == data


def test_rows_are_taken_across_files(tmp_path: Path) -> None:
    whole = np.arange(24, dtype=np.float32).reshape(8, 3)
    files = [str(tmp_path / f"{number}.npy") for number in range(3)]
    for file, part in zip(files, (whole[:3], whole[3:4], whole[4:]), strict=True):
        np.save(file, part)
    features = FeatureFiles(tuple(files))
    rows = torch.tensor([7, 0, 3, 3, 4])
    assert np.array_equal(features.take(rows), whole[rows])
    assert np.array_equal(features.matrix(), whole) and len(list(features.blocks())) == 3
