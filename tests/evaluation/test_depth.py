"""Tests of depth: metrics by their definition, heads against their arithmetic, readers of the published layouts."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from curation import backbone, weights
from curation.errors import ConfigError, InputError
from curation.files import npy
from evaluation import depth, features
from evaluation.data import depth_data
from evaluation.data.depth_data import DepthDataConfig
from evaluation.depth import DepthConfig
from tests.evaluation.data.scene_builders import depth_scene


def write_picture(path: Path, height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Writes a PNG of smooth random colours and returns its pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)
    picture.save(path, "PNG")
    return np.asarray(picture)


def write_depth(path: Path, values: NDArray[np.uint16]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, "PNG")


def ramp(height: int, width: int, low: int, high: int) -> NDArray[np.uint16]:
    return np.linspace(low, high, height * width).astype(np.uint16).reshape(height, width)


def data(folder: Path, layout: depth_data.LayoutName = "folder", **settings: object) -> DepthDataConfig:
    return DepthDataConfig.model_validate({"name": layout, "layout": layout, "folder": str(folder), **settings})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> features.FrozenModel:
    network = backbone.build("vit_tiny", patch_size=8, image_size=32, depth=4, layer_scale=1.0, seed=3)
    path = str(tmp_path_factory.mktemp("weights") / "teacher.pth")
    weights.save(network, path)
    return features.load_model(features.FrozenModelConfig(weights=path))


# ---- metrics and loss


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_metrics_follow_their_definitions(seed: int) -> None:
    random = np.random.default_rng(seed)
    true, predicted = random.uniform(0.5, 9, (2, 12, 15)).astype(np.float32)
    mask = random.random((12, 15)) < 0.7
    values = depth.measure(*(torch.from_numpy(one) for one in (predicted, true, mask)))
    pairs = [(float(p), float(t)) for p, t in zip(predicted[mask], true[mask], strict=True)]
    n = len(pairs)
    logs = [math.log(p) - math.log(t) for p, t in pairs]
    expected = {
        "abs_rel": sum(abs(p - t) / t for p, t in pairs) / n,
        "sq_rel": sum((p - t) ** 2 / t for p, t in pairs) / n,
        "rmse": math.sqrt(sum((p - t) ** 2 for p, t in pairs) / n),
        "rmse_log": math.sqrt(sum(e * e for e in logs) / n),
        "log10": sum(abs(math.log10(p) - math.log10(t)) for p, t in pairs) / n,
        "silog": 100 * math.sqrt(sum(e * e for e in logs) / n - (sum(logs) / n) ** 2),
        "d1": sum(max(p / t, t / p) < 1.25 for p, t in pairs) / n,
        "d2": sum(max(p / t, t / p) < 1.25**2 for p, t in pairs) / n,
        "d3": sum(max(p / t, t / p) < 1.25**3 for p, t in pairs) / n,
        "mae": sum(abs(p - t) for p, t in pairs) / n,
    }
    assert tuple(values) == depth.METRICS
    assert values == pytest.approx(expected)
    assert 0 < values["d1"] < values["d2"] < values["d3"] < 1


def test_a_wrong_scale_affects_every_metric_but_silog() -> None:
    true = torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) + 1
    values = depth.measure(2 * true, true, torch.ones(8, 8, dtype=torch.bool))
    assert values["silog"] == pytest.approx(0, abs=1e-5)
    assert values["abs_rel"] == pytest.approx(1)
    assert values["rmse_log"] == pytest.approx(math.log(2))
    assert values["log10"] == pytest.approx(math.log10(2))
    assert (values["d1"], values["d2"], values["d3"]) == (0, 0, 0)  # 1.25 ** 3 is 1.953


def test_images_have_equal_weight_and_empty_ones_do_not_count() -> None:
    true, off = torch.full((4, 4), 2.0), torch.full((4, 4), 3.0)
    some, nothing = torch.zeros(4, 4, dtype=torch.bool), torch.zeros(4, 4, dtype=torch.bool)
    some[0, 0] = True
    measured = [depth.measure(off, true, some), depth.measure(true, true, ~nothing), depth.measure(off, true, nothing)]
    assert depth.mean_over_images(measured)["mae"] == pytest.approx(0.5)
    with pytest.raises(InputError, match="No pixel of any test image"):
        depth.mean_over_images(measured[2:])


def test_masks_hold_known_pixels_inside_the_crop() -> None:
    truth = torch.full((480, 640), 3.0)
    truth[50, 50], truth[60, 60], truth[70, 70] = 0, 10, 5e-4
    mask = depth.valid_mask(truth, max_depth=10, crop="eigen")
    assert mask.sum() == (471 - 45) * (601 - 41) - 3
    assert mask[45, 41] and mask[470, 600] and not mask[44, 41] and not mask[470, 601] and not mask[60, 60]
    assert depth.valid_mask(truth, max_depth=11).sum() == 480 * 640 - 2
    garg = depth.valid_mask(torch.ones(352, 1216), max_depth=80, crop="garg")
    rows, columns = garg.any(1).nonzero(), garg.any(0).nonzero()
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (143, 349, 43, 1172)


def test_the_loss_by_hand() -> None:
    predicted, true = torch.tensor([1.0, 2.0, 8.0, 9.0]), torch.tensor([2.0, 2.0, 2.0, 0.0])  # the last is unknown
    errors = [math.log(p + 1e-3) - math.log(2 + 1e-3) for p in (1, 2, 8)]
    mean = sum(errors) / 3
    variance = sum((e - mean) ** 2 for e in errors) / 2
    assert float(depth.sig_loss(predicted, true, max_depth=10)) == pytest.approx(math.sqrt(variance + 0.15 * mean**2))
    alone = depth.sig_loss(predicted, true, max_depth=10, mean_alone=True)
    assert float(alone) == pytest.approx(math.sqrt(0.15) * abs(mean), rel=1e-4)
    assert float(depth.sig_loss(predicted[:3], true[:3] * 20, max_depth=10)) == 0  # all above max_depth


@pytest.mark.parametrize("truth", [torch.full((1, 4, 4), 2.0), torch.zeros(1, 4, 4)])
def test_the_loss_has_a_finite_gradient_where_it_is_zero(truth: Tensor) -> None:
    predicted = torch.full((1, 4, 4), 2.0, requires_grad=True)
    (gradient,) = torch.autograd.grad(depth.sig_loss(predicted, truth, max_depth=10), predicted)
    assert gradient.isfinite().all()


# ---- heads


def test_bins_give_their_weighted_mean() -> None:
    logits = torch.zeros(1, 256, 2, 2)
    logits[0, :, 0, 0] = -5  # nearly 0
    logits[0, 255, 0, 1] = 1e6
    metres = depth.depth_of_bins(logits, 10)[0]
    assert metres[0, 0] == pytest.approx((1e-3 + 10) / 2) and metres[1, 1] == pytest.approx((1e-3 + 10) / 2)
    assert metres[0, 1] == pytest.approx(10, rel=1e-3)


def test_the_linear_head_is_one_linear_layer_on_upsampled_tokens() -> None:
    random = torch.Generator().manual_seed(0)
    tokens = [(torch.randn(2, 6, 3, 5, generator=random), torch.randn(2, 6, generator=random)) for _ in range(4)]
    head = depth.LinearDepthHead(6, 4, 10)
    head.load_state_dict(depth.make_head("linear_4", 6, 10, seed=1).state_dict())
    joined = torch.cat([torch.cat([p, c[:, :, None, None].expand_as(p)], 1) for p, c in tokens], 1)
    fine = functional.interpolate(joined, scale_factor=4, mode="bilinear")
    expected = depth.depth_of_bins(head.depth_bins(fine), 10)
    torch.testing.assert_close(head(tokens), expected)
    assert head(tokens).shape == (2, 12, 20)


def test_dpt_reads_every_block_and_token_and_starts_with_gradients() -> None:
    random = torch.Generator().manual_seed(0)
    tokens = [
        tuple(torch.randn(shape, generator=random, requires_grad=True) for shape in ((1, 16, 3, 5), (1, 16)))
        for _ in range(4)
    ]
    head = depth.make_head("dpt", 16, 10, seed=0)
    metres = head([(patches, cls) for patches, cls in tokens])
    assert metres.shape == (1, 64, 96) and (metres >= depth.MIN_DEPTH).all()
    gradients = torch.autograd.grad(metres.mean(), [one for pair in tokens for one in pair] + list(head.parameters()))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize("name", ["linear_1", "dpt"])
def test_fresh_heads_depend_on_the_seed(name: depth.HeadName) -> None:
    states = [depth.make_head(name, 16, 10, seed).state_dict() for seed in (5, 5, 6)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert any(not torch.equal(states[0][key], states[2][key]) for key in states[0])


def test_the_blocks_that_a_head_reads() -> None:
    assert depth.blocks_of("linear_1", 12) == (11,)
    assert depth.blocks_of("linear_4", 12) == (2, 5, 8, 11)
    assert depth.blocks_of("linear_4", 24) == (4, 11, 17, 23)
    assert depth.blocks_of("dpt", 40) == (9, 19, 29, 39)
    with pytest.raises(InputError, match="four blocks"):
        depth.blocks_of("dpt", 3)


# ---- readers


def test_reads_nyu(tmp_path: Path) -> None:
    for scene, number in (("kitchen_0028b", "00045"), ("bedroom_0060", "00081")):
        write_picture(tmp_path / scene / f"rgb_{number}.jpg", 480, 640)
        write_depth(tmp_path / scene / f"sync_depth_{number}.png", ramp(480, 640, 500, 9500))
    (tmp_path / "nyu_train.txt").write_text(
        "/kitchen_0028b/rgb_00045.jpg /kitchen_0028b/sync_depth_00045.png 518.8579\n"
        "/bedroom_0060/rgb_00081.jpg /bedroom_0060/sync_depth_00081.png 518.8579\n"
    )
    samples = depth_data.find_samples(data(tmp_path, "nyu"), "train")
    assert [Path(one.image).parent.name for one in samples] == ["bedroom_0060", "kitchen_0028b"]  # by name
    image, metres = depth_data.read_sample(samples[0], data(tmp_path, "nyu"))
    assert image.shape == (3, 480, 640) and image.dtype == torch.uint8
    assert metres[0, 0] == pytest.approx(0.5) and metres[-1, -1] == pytest.approx(9.5)
    with pytest.raises(InputError, match=r"nyu_test\.txt"):
        depth_data.find_samples(data(tmp_path, "nyu"), "test")


def test_reads_nyu_arrays(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    pictures = random.integers(0, 256, (2, 480, 640, 3), dtype=np.uint8)
    metres = random.uniform(1, 9, (2, 480, 640)).astype(np.float32)
    np.save(tmp_path / "eigen_test_rgb.npy", pictures)
    np.save(tmp_path / "eigen_test_depth.npy", metres)
    samples = depth_data.find_samples(data(tmp_path, "nyu_arrays"), "test")
    assert len(samples) == 2
    image, truth = depth_data.read_sample(samples[1], data(tmp_path, "nyu_arrays"))
    assert np.array_equal(image.permute(1, 2, 0), pictures[1]) and np.array_equal(truth, metres[1])


def test_reads_kitti(tmp_path: Path) -> None:
    drive, frame = "2011_09_26_drive_0002_sync", "0000000069.png"
    picture = write_picture(tmp_path / "input/2011_09_26" / drive / "image_02/data" / frame, 375, 1242)
    values = ramp(375, 1242, 256, 60 * 256)
    values[::2] = 0
    write_depth(tmp_path / "gt_depth" / drive / "proj_depth/groundtruth/image_02" / frame, values)
    (tmp_path / "kitti_eigen_test.txt").write_text(
        f"2011_09_26/{drive}/image_02/data/{frame} {drive}/proj_depth/groundtruth/image_02/{frame} 721.5377\n"
        f"2011_09_26/{drive}/image_02/data/0000000070.png None 721.5377\n"
    )
    (sample,) = depth_data.find_samples(data(tmp_path, "kitti"), "test")
    image, metres = depth_data.read_sample(sample, data(tmp_path, "kitti"))
    assert image.shape == (3, 352, 1216) and metres.shape == (352, 1216)
    assert np.array_equal(image.permute(1, 2, 0), picture[23:, 13:1229])
    assert np.array_equal(metres, values[23:, 13:1229] / np.float32(256))
    assert (metres == 0).float().mean() == 0.5


def test_reads_sun_rgbd(tmp_path: Path) -> None:
    folder = "SUNRGBD/kv2/kinect2data/000002_2014-05-26_14-23-37_260595134347_rgbf000103-resize"
    write_picture(tmp_path / folder / "image/0000103.jpg", 53, 73)
    millimetres = ramp(53, 73, 0, 12_000)
    rotated = (millimetres << 3) | (millimetres >> 13)  # as in the published files
    write_depth(tmp_path / folder / "depth/0000103.png", rotated)
    (tmp_path / "SUNRGBD_val_splits.txt").write_text(f"{folder}/image/0000103.jpg {folder}/depth/0000103.png\n")
    (sample,) = depth_data.find_samples(data(tmp_path, "sun_rgbd"), "test")
    _, metres = depth_data.read_sample(sample, data(tmp_path, "sun_rgbd"))
    assert np.array_equal(metres, np.minimum(millimetres / np.float32(1000), np.float32(8)))


def test_reads_a_folder_of_png_and_npy(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_picture(tmp_path / f"rgb/{name}.png", 20, 30)
    write_depth(tmp_path / "depth/a.png", ramp(20, 30, 100, 900))
    np.save(tmp_path / "depth/b.npy", np.full((20, 30), 2.5))
    settings = data(tmp_path, units_per_metre=100)
    first, second = (depth_data.read_sample(one, settings)[1] for one in depth_data.find_samples(settings, "test"))
    assert first[0, 0] == 1 and first[-1, -1] == 9 and (second == 2.5).all()


def test_errors_in_the_data_are_reported(tmp_path: Path) -> None:
    write_picture(tmp_path / "rgb/a.png", 20, 30)
    with pytest.raises(InputError, match="No files in"):
        depth_data.find_samples(data(tmp_path), "test")
    write_depth(tmp_path / "depth/a.png", ramp(20, 31, 100, 900))
    (sample,) = depth_data.find_samples(data(tmp_path), "test")
    with pytest.raises(InputError, match=r"20 x 31 pixels.*20 x 30"):
        depth_data.read_sample(sample, data(tmp_path))
    Image.new("L", (30, 20), 7).save(tmp_path / "depth/a.png")
    with pytest.raises(InputError, match="16 bits"):
        depth_data.read_sample(sample, data(tmp_path))
    (tmp_path / "depth/a.png").unlink()
    np.save(tmp_path / "depth/a.npy", np.full((20, 30), np.nan))
    (sample,) = depth_data.find_samples(data(tmp_path), "test")
    with pytest.raises(InputError, match="not finite"):
        depth_data.read_sample(sample, data(tmp_path))
    np.save(tmp_path / "depth/b.npy", np.ones((20, 30)))
    with pytest.raises(InputError, match="no partner of the same name, such as 'b'"):
        depth_data.find_samples(data(tmp_path), "test")
    (tmp_path / "nyu_test.txt").write_text("/a/rgb_1.jpg\n")
    with pytest.raises(InputError, match=r"nyu_test\.txt, line 1"):
        depth_data.find_samples(data(tmp_path, "nyu"), "test")


def test_inconsistent_configs_are_refused() -> None:
    folder = {"name": "x", "layout": "folder", "folder": "x"}
    with pytest.raises(ValueError, match="warmup_steps is 9"):
        DepthConfig.model_validate({"train": folder, "tests": [folder], "steps": 9, "warmup_steps": 9}, strict=False)
    with pytest.raises(ValueError, match="test split only"):
        DepthConfig.model_validate({"train": folder | {"layout": "sun_rgbd"}, "tests": [folder]}, strict=False)
    assert issubclass(ConfigError, ValueError)


# ---- training and prediction


def test_an_image_and_its_depth_are_rotated_together() -> None:
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(96), indexing="ij")
    metres = (1 + rows / 64 + 2 * columns / 96).float()
    image = (60 * metres).round().to(torch.uint8).expand(3, -1, -1).contiguous()
    moved = 0
    for seed in range(12):
        augmented, augmented_metres = depth.augment(image, metres, np.random.default_rng(seed), brightness=0.0)
        again, _ = depth.augment(image, metres, np.random.default_rng(seed), brightness=0.0)
        assert torch.equal(augmented, again)
        known = functional.max_pool2d((augmented_metres == 0).float()[None, None], 3, stride=1, padding=1)[0, 0] == 0
        assert known.float().mean() > 0.85
        # The changed colours still follow the depth.
        correlation = torch.corrcoef(torch.stack([augmented[0][known].float(), augmented_metres[known]]))[0, 1]
        assert correlation > 0.99
        moved += not torch.equal(augmented_metres, metres)
    assert 4 < moved < 12


def test_padding_and_mirroring_do_not_change_the_prediction(model: features.FrozenModel) -> None:
    head = depth.make_head("linear_1", model.embed_dim, 10, seed=0)
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (2, 3, 24, 40), generator=random, dtype=torch.uint8)
    blocks, options = depth.blocks_of("linear_1", 4), {"final_norm": False, "cap": 10.0}
    one = depth.predict_for_score(model, head, pixels, blocks, flip=True, **options)
    other = depth.predict_for_score(model, head, pixels.flip(-1), blocks, flip=True, **options)
    torch.testing.assert_close(one, other.flip(-1))
    alone = depth.predict_for_score(model, head, pixels[1:], blocks, flip=True, **options)
    torch.testing.assert_close(one[1:], alone)
    assert not torch.allclose(one, depth.predict_for_score(model, head, pixels, blocks, flip=False, **options))
    odd = depth.predict_for_score(model, head, pixels[:, :, :21, :37], blocks, flip=False, **options)
    assert odd.shape == (2, 21, 37) and odd.std() > 0


def test_a_head_learns_and_training_is_repeatable(tmp_path: Path, model: features.FrozenModel) -> None:
    depth_scene(tmp_path / "train", 12, seed=0)
    depth_scene(tmp_path / "test", 3, seed=1)
    settings = {
        "train": data(tmp_path / "train", name="scene"),
        "tests": (data(tmp_path / "test", name="scene"), data(tmp_path / "train", name="other")),
        "heads": ("linear_1",),
        "final_norm": True,
        "crop_size": (32, 32),
        "warmup_steps": 2,
        "batch_size": 4,
        "learning_rate": 3e-3,
    }
    config = DepthConfig(steps=40, **settings)
    samples = [depth_data.find_samples(one, "test") for one in config.tests]
    trained, barely_trained = (
        depth.train_head(
            model,
            "linear_1",
            config.model_copy(update={"steps": steps}),
            samples[1],
            augmented=False,
            loss_warmup_steps=2,
        )
        for steps in (40, 3)
    )
    for tested, pairs in zip(config.tests, samples, strict=True):
        after, before = (
            depth.score(model, one, (3,), config, tested, pairs)["silog"] for one in (trained, barely_trained)
        )
        assert after < 0.5 * before
    first, again = (depth.run(DepthConfig(steps=3, **settings), model, str(tmp_path)) for _ in range(2))
    assert [one.metric for one in first] == list(depth.METRICS) * 2
    assert {(one.protocol, one.dataset) for one in first} == {
        ("linear 1, 3 steps of 4, last norm", "scene"),
        ("linear 1, 3 steps of 4, last norm, trained on scene", "other"),
    }
    assert [one.value for one in again] == [one.value for one in first]
    assert {one.data_hash for one in again} == {one.data_hash for one in first}


def test_dpt_trains_to_finite_metrics(tmp_path: Path, model: features.FrozenModel) -> None:
    depth_scene(tmp_path, 2, seed=0)
    config = DepthConfig(
        train=data(tmp_path),
        tests=(data(tmp_path),),
        heads=("dpt",),
        crop_size=(24, 24),
        steps=3,
        warmup_steps=2,
        batch_size=2,
    )
    results = depth.run(config, model, str(tmp_path))
    assert len(results) == 10 and all(math.isfinite(one.value) for one in results)


def test_every_image_is_seen_before_any_is_repeated(tmp_path: Path) -> None:
    depth_scene(tmp_path, 6, seed=0)
    settings = data(tmp_path)
    config = DepthConfig(train=settings, tests=(settings,), steps=3, warmup_steps=2, batch_size=4, crop_size=(40, 48))
    samples = depth_data.find_samples(settings, "train")
    seen = torch.cat([truth for _, truth in depth.training_batches(samples, config, augmented=False)])
    for epoch in (seen[:6], seen[6:]):
        assert len({tuple(one.flatten().tolist()) for one in epoch}) == 6
    with pytest.raises(InputError, match="Set a smaller crop_size"):
        next(depth.training_batches(samples, config.model_copy(update={"crop_size": None})))


def million_steps(folder: Path, **settings: object) -> DepthConfig:
    """A config whose training would not end."""
    values = {"crop_size": (24, 24), "steps": 1_000_000, "warmup_steps": 2, "batch_size": 2, "heads": ("linear_1",)}
    return DepthConfig(train=data(folder / "train"), tests=(data(folder / "test"),), **values | settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("split", "factor", "message"),
    [
        (
            "train",
            0,
            r"^folder: no pixel of the 3 training depths is between 0.001 and 10 m: all are 0, which",
        ),
        ("train", 1000, r"training depths is between 0.001 and 10 m: the least is [0-9]{4} m\. Check units_per_metre"),
        ("test", 1000, r"^folder: no pixel of the 2 test depths is between 0.001 and 10 m: the least is"),
    ],
)
def test_depths_that_do_not_count_are_refused_before_training(
    split: str, factor: float, message: str, tmp_path: Path, model: features.FrozenModel
) -> None:
    for name, count in (("train", 3), ("test", 2)):
        depth_scene(tmp_path / name, count, seed=0)
    for file in (tmp_path / split / "depth").iterdir():
        np.save(file, npy.read_array(str(file)) * factor)
    with pytest.raises(InputError, match=message):
        depth.run(million_steps(tmp_path), model, str(tmp_path))


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_damaged_file_is_named_before_training(split: str, tmp_path: Path, model: features.FrozenModel) -> None:
    for name, count in (("train", 3), ("test", 2)):
        depth_scene(tmp_path / name, count, seed=0)
    depths = tmp_path / split / "depth"

    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message):
            depth.run(million_steps(tmp_path), model, str(tmp_path))

    whole = (depths / "1.npy").read_bytes()
    (depths / "1.npy").write_bytes(whole[:-40])
    refused(rf"{split}/depth/1\.npy: not a readable \.npy array of numbers \(ValueError: ")
    (depths / "1.npy").write_bytes(b"")
    refused(r"1\.npy: not a readable \.npy")
    np.save(depths / "1.npy", np.ones((40, 48, 3)))
    refused(r"1\.npy has the shape \(40, 48, 3\); a depth has \(H, W\) or \(H, W, 1\)")
    (depths / "1.npy").unlink()
    write_depth(depths / "1.png", ramp(40, 48, 1000, 9000))
    (depths / "1.png").write_bytes((depths / "1.png").read_bytes()[:-60])
    refused(r"1\.png: not a readable PNG")
    write_depth(depths / "1.png", ramp(40, 48, 1000, 9000))
    image = tmp_path / split / "rgb" / "0.png"
    image.write_bytes(image.read_bytes()[:-60])
    refused(r"rgb/0\.png: the image cannot be used")


@pytest.mark.parametrize("shape", [(20, 30, 1), (1, 20, 30)])
def test_an_axis_of_one_is_left_out(shape: tuple[int, ...], tmp_path: Path) -> None:
    write_picture(tmp_path / "rgb/a.png", 20, 30)
    (tmp_path / "depth").mkdir()
    metres = np.arange(600, dtype=np.float64).reshape(20, 30)
    np.save(tmp_path / "depth/a.npy", metres.reshape(shape))
    (sample,) = depth_data.find_samples(data(tmp_path), "test")
    assert (depth_data.read_sample(sample, data(tmp_path))[1].numpy() == metres).all()


def test_arrays_of_different_lengths_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "eigen_test_rgb.npy", np.zeros((2, 4, 5, 3), np.uint8))
    np.save(tmp_path / "eigen_test_depth.npy", np.zeros((3, 4, 5)))
    with pytest.raises(InputError, match=r"eigen_test_rgb\.npy has 2 images, and .*depth\.npy 3 depths"):
        depth_data.find_samples(data(tmp_path, "nyu_arrays"), "test")
