"""The backbone and the transformers library give the same results and read each other's folders.

All weights are random and none has its initial value, so that LayerScale, registers, biases and the mask token affect
the result. Two blocks of every size; full depth of every kind of model, at the width of vit_tiny or vit_small.
docs/weights.md has the models that are not run here, and the measured differences. Measured: 49 s on one core, most of
it for the large sizes.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
    IJepaConfig,
    IJepaForImageClassification,
    IJepaModel,
    PretrainedConfig,
    PreTrainedModel,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
)

from curation import backbone, weights
from curation.errors import WeightsError
from tests.curation.test_backbone import interpolated

TOLERANCE = 1e-5  # of the largest activation


def randomize(module: nn.Module, seed: int) -> None:
    """Gives every parameter a random value: a deviation of 0.05, around 1 for factors and around 0 for others."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        with torch.no_grad():
            parameter.normal_(0, 0.05, generator=generator)
            if (
                name.endswith(("lambda1", "norm.weight", "norm1.weight", "norm2.weight", "gamma"))
                or "layernorm_" in name
            ):
                parameter.add_(1)


def images(height: int, width: int) -> Tensor:
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(height * width))


def filled(kind: type[PreTrainedModel], config: PretrainedConfig, seed: int, **options: object) -> PreTrainedModel:
    """A model of the library with random weights; its own initialisation is skipped."""
    with torch.device("meta"):
        model = kind(config, **options)
    model.to_empty(device="cpu")
    randomize(model, seed)
    return model.eval()


def dinov2(
    name: backbone.Name,
    *,
    registers: int = 0,
    gated: bool = False,
    patch_size: int = 14,
    image_size: int = 518,
    depth: int = 2,
) -> PreTrainedModel:
    """transformers' DINOv2 of that size."""
    size = backbone.SIZES[name]
    options = {
        "hidden_size": size.embed_dim,
        "num_hidden_layers": depth,
        "num_attention_heads": size.num_heads,
        "image_size": image_size,
        "patch_size": patch_size,
        "use_swiglu_ffn": gated or size.feed_forward == "swiglu",
    }
    if registers:
        config = Dinov2WithRegistersConfig(**options, num_register_tokens=registers)
        return filled(Dinov2WithRegistersModel, config, seed=1)
    return filled(Dinov2Model, Dinov2Config(**options), seed=2)


def vit(kind: str, name: backbone.Name, *, depth: int = 2, epsilon: float = 1e-6, **options: object) -> PreTrainedModel:
    """transformers' I-JEPA or MAE of that size, for 224 pixels in patches of 14."""
    size = backbone.SIZES[name]
    shape = {
        "hidden_size": size.embed_dim,
        "num_hidden_layers": depth,
        "num_attention_heads": size.num_heads,
        "intermediate_size": 4 * size.embed_dim,
        "image_size": 224,
        "patch_size": 14,
        "layer_norm_eps": epsilon,
    }
    if kind == "ijepa":
        return filled(IJepaModel, IJepaConfig(**shape), seed=3, **options)
    return filled(ViTMAEModel, ViTMAEConfig(**shape, mask_ratio=0.0), seed=4, **options)


def read_folder(folder: Path, name: backbone.Name, interpolation: str) -> backbone.VisionTransformer:
    """The backbone with the weights in a folder of transformers."""
    checkpoint = weights.read(str(folder))
    model = weights.build_like(
        weights.architecture(checkpoint.tensors, checkpoint.path),
        name,
        position_interpolation=interpolation,  # type: ignore[arg-type]  # one of the three
    )
    weights.fill(model, checkpoint)
    return model.eval().requires_grad_(False)


def converted(reference: PreTrainedModel, name: backbone.Name, tmp_path: Path) -> backbone.VisionTransformer:
    """The backbone with the reference's weights, written by transformers and read by `weights`.

    The reverse is checked too: transformers must read the folder of `weights.save` with equal bits.
    """
    reference.save_pretrained(tmp_path / "reference")
    interpolation = "antialias" if isinstance(reference, Dinov2WithRegistersModel) else "plain"
    model = read_folder(tmp_path / "reference", name, interpolation)
    weights.save(model, str(tmp_path / "saved"), "transformers")
    again, report = type(reference).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report.values()), report
    expected = reference.state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in again.state_dict().items())
    return model


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() < TOLERANCE * expected.abs().max()


@torch.inference_mode()
def assert_parity(
    model: backbone.VisionTransformer, reference: PreTrainedModel, x: Tensor, masks: Tensor | None = None
) -> None:
    expected = reference(x, bool_masked_pos=masks).last_hidden_state
    assert_close(model.norm(model.forward_features(x, masks)["x_prenorm"]), expected)


# Each patch size occurs at several widths.
PATCH_SIZES: dict[backbone.Name, int] = {
    "vit_tiny": 16,
    "vit_small": 14,
    "vit_base": 8,
    "vit_large": 14,
    "vit_huge": 16,
    "vit_giant": 14,
}


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("name", backbone.SIZES)
def test_every_size_with_two_blocks(name: backbone.Name, registers: int, tmp_path: Path) -> None:
    patch_size = PATCH_SIZES[name]
    reference = dinov2(name, registers=registers, patch_size=patch_size, image_size=518 if patch_size == 14 else 224)
    model = converted(reference, name, tmp_path)
    assert_parity(model, reference, images(224, 224))
    assert_parity(model, reference, images(7 * patch_size, 11 * patch_size), torch.arange(77)[None] % 3 == 0)


@pytest.mark.parametrize("registers", [0, 4])
def test_full_depth_at_every_shape(registers: int, tmp_path: Path) -> None:
    reference = dinov2("vit_small", registers=registers, depth=12)
    model = converted(reference, "vit_small", tmp_path)
    for height, width in ((224, 224), (518, 518), (98, 266)):
        x = images(height, width)
        assert_parity(model, reference, x, torch.arange(height * width // 196)[None] % 4 == 0)


@pytest.mark.parametrize("registers", [0, 4])
def test_full_depth_of_swiglu(registers: int, tmp_path: Path) -> None:
    """The 40 blocks of vit_giant, 192 wide."""
    reference = dinov2("vit_tiny", registers=registers, gated=True, depth=40)
    model = converted(reference, "vit_tiny", tmp_path)
    assert_parity(model, reference, images(224, 98))


@torch.inference_mode()
def test_the_offset_equals_that_of_torch_hub(tmp_path: Path) -> None:
    """At 224 pixels, a backbone for 518 equals a reference with positions for 224 by the rule written in NumPy."""
    model, at_224 = (
        backbone.build("vit_tiny", patch_size=14, image_size=size, depth=2, position_interpolation="offset")
        for size in (518, 224)
    )
    randomize(model, seed=1)
    grid = interpolated(model.pos_embed[0, 1:].reshape(37, 37, 192).double().numpy(), 16, 16, offset=0.1)
    positions = torch.cat([model.pos_embed[:, :1], torch.from_numpy(grid).float().reshape(1, 256, 192)], dim=1)
    at_224.load_state_dict({**model.state_dict(), "pos_embed": positions})
    weights.save(at_224, str(tmp_path / "hf"), "transformers")
    reference = Dinov2Model.from_pretrained(tmp_path / "hf")
    assert_parity(model, reference, images(224, 224))
    model.position_interpolation = "plain"
    with pytest.raises(AssertionError):  # the two rules differ by more than the tolerance
        assert_parity(model, reference, images(224, 224))


# --- I-JEPA and MAE -----------------------------------------------------------------------------------------------


@torch.inference_mode()
def assert_vit_parity(kind: str, model: backbone.VisionTransformer, reference: PreTrainedModel, x: Tensor) -> None:
    features = model.forward_features(x)
    if kind == "ijepa":
        expected = reference(x, interpolate_pos_encoding=True).last_hidden_state
        assert_close(features["x_norm_patchtokens"], expected)
        return
    num_patches = features["x_norm_patchtokens"].shape[1]
    noise = torch.rand(len(x), num_patches, generator=torch.Generator().manual_seed(1))
    answer = reference(x, noise=noise, interpolate_pos_encoding=True)
    # ViTMAE shuffles the patches, also with a mask_ratio of 0.
    order = answer.ids_restore[:, :, None].expand(-1, -1, model.embed_dim)
    assert_close(features["x_norm_patchtokens"], answer.last_hidden_state[:, 1:].gather(1, order))
    assert_close(features["x_norm_clstoken"], answer.last_hidden_state[:, 0])


@pytest.mark.parametrize("kind", ["ijepa", "mae"])
@pytest.mark.parametrize(("name", "depth"), [("vit_huge", 2), ("vit_tiny", 32)])  # ViT-H's width, then its depth
def test_ijepa_and_mae(kind: str, name: backbone.Name, depth: int, tmp_path: Path) -> None:
    reference = vit(kind, name, depth=depth)
    model = converted(reference, name, tmp_path)
    for shape in ((224, 224), (98, 266)):
        assert_vit_parity(kind, model, reference, images(*shape))


@pytest.mark.parametrize("kind", ["ijepa", "mae"])
def test_the_librarys_default_epsilon_is_within_the_tolerance(kind: str, tmp_path: Path) -> None:
    reference = vit(kind, "vit_tiny", epsilon=1e-12)
    reference.save_pretrained(tmp_path / "reference")
    assert_vit_parity(kind, read_folder(tmp_path / "reference", "vit_tiny", "plain"), reference, images(224, 224))


def test_ijepa_with_a_mask_token(tmp_path: Path) -> None:
    reference = vit("ijepa", "vit_tiny", use_mask_token=True)
    reference.save_pretrained(tmp_path / "reference")
    model = read_folder(tmp_path / "reference", "vit_tiny", "plain")
    assert torch.equal(model.mask_token, reference.embeddings.mask_token[0])
    assert_parity(model, reference, images(224, 224), torch.arange(256)[None] % 5 == 0)


# --- other folders written by transformers ------------------------------------------------------------------------


def state_of(reference: PreTrainedModel, tmp_path: Path, **options: object) -> dict[str, Tensor]:
    reference.save_pretrained(tmp_path / "hf", **options)
    return dict(weights.read(str(tmp_path / "hf")).tensors)


@pytest.mark.parametrize("kind", ["dinov2", "registers", "giant", "ijepa", "mae"])
@pytest.mark.parametrize("options", [{"save_original_format": False}, {"max_shard_size": "1MB"}])
def test_other_formats_of_the_library(kind: str, options: dict[str, object], tmp_path: Path) -> None:
    """With the current names of its modules, and in several files."""
    match kind:
        case "ijepa" | "mae":
            reference = vit(kind, "vit_tiny")
        case _:
            reference = dinov2("vit_tiny", registers=4 * (kind == "registers"), gated=kind == "giant")
    plain = state_of(reference, tmp_path)
    other = state_of(reference, tmp_path / "other", **options)
    assert ("max_shard_size" in options) == (tmp_path / "other/hf/model.safetensors.index.json").exists()
    assert plain.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in plain.items())


SMALL = {"hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 28, "patch_size": 14}
WITH_HEADS = {
    "dinov2": (Dinov2ForImageClassification, Dinov2Config(**SMALL), "dinov2"),
    "registers": (
        Dinov2WithRegistersForImageClassification,
        Dinov2WithRegistersConfig(**SMALL),
        "dinov2_with_registers",
    ),
    "ijepa": (IJepaForImageClassification, IJepaConfig(**SMALL, intermediate_size=768), "ijepa"),
    "mae": (
        ViTMAEForPreTraining,
        ViTMAEConfig(**SMALL, intermediate_size=768, decoder_hidden_size=64, decoder_num_hidden_layers=1),
        "vit",
    ),
}


@pytest.mark.parametrize("kind", WITH_HEADS)
def test_a_model_with_a_head_gives_its_backbone(kind: str, tmp_path: Path) -> None:
    cls, config, attribute = WITH_HEADS[kind]
    whole = cls(config)
    randomize(whole, seed=2)
    bare = state_of(getattr(whole, attribute), tmp_path / "bare")
    full = state_of(whole, tmp_path)
    assert bare.keys() == full.keys() and all(torch.equal(value, full[name]) for name, value in bare.items())
    aside = weights.read(str(tmp_path / "hf")).left_aside
    assert aside and all(name.startswith("decoder." if kind == "mae" else "classifier.") for name in aside)


def test_a_model_without_its_mask_token(tmp_path: Path) -> None:
    reference = Dinov2Model(Dinov2Config(**SMALL, use_mask_token=False))
    assert not state_of(reference, tmp_path)["mask_token"].any()
    config = tmp_path / "hf/config.json"
    config.write_text(config.read_text().replace('"use_mask_token": false', '"use_mask_token": true'))
    with pytest.raises(WeightsError, match="1 missing: mask_token"):
        weights.load(backbone.build("vit_tiny", patch_size=14, image_size=28, depth=2), str(tmp_path / "hf"))
