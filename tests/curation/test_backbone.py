"""The Vision Transformer has the released key layout and calling conventions of DINOv2."""

import pytest
import torch
from torch import Tensor

from curation.backbone import VisionTransformer, build
from curation.errors import ConfigError


def model(**options: object) -> VisionTransformer:
    settings = {"patch_size": 14, "image_size": 56, "depth": 2} | options
    return build("vit_tiny", **settings).eval()  # type: ignore[arg-type]


def images(height: int = 56, width: int = 56, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(0))


def test_keys_are_those_of_the_released_weights() -> None:
    block = ["norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias"]
    block += ["ls1.gamma", "norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias"]
    block += ["mlp.fc2.weight", "mlp.fc2.bias", "ls2.gamma"]
    expected = {"cls_token", "pos_embed", "mask_token", "register_tokens", "norm.weight", "norm.bias"}
    expected |= {"patch_embed.proj.weight", "patch_embed.proj.bias"}
    expected |= {f"blocks.{index}.{name}" for index in range(2) for name in block}
    assert set(model(num_register_tokens=4).state_dict()) == expected


@pytest.mark.parametrize(
    ("name", "parameters"), [("vit_small", 22_056_576), ("vit_base", 86_580_480), ("vit_large", 304_368_640)]
)
def test_sizes_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    built = build(name, patch_size=14, image_size=518)  # type: ignore[arg-type]
    assert sum(parameter.numel() for parameter in built.parameters()) == parameters


@torch.inference_mode()
def test_features_have_the_names_and_shapes_of_dinov2() -> None:
    features = model(num_register_tokens=4).forward_features(images())
    assert features["x_norm_clstoken"].shape == (2, 192)
    assert features["x_norm_regtokens"].shape == (2, 4, 192)
    assert features["x_norm_patchtokens"].shape == (2, 16, 192)
    assert features["x_prenorm"].shape == (2, 21, 192)


@torch.inference_mode()
@pytest.mark.parametrize("size", [(56, 56), (28, 84), (70, 42)])
def test_intermediate_layers(size: tuple[int, int]) -> None:
    network, batch = model(), images(*size)
    last = network.get_intermediate_layers(batch, 1)
    assert torch.allclose(last[0], network.forward_features(batch)["x_norm_patchtokens"])
    maps = network.get_intermediate_layers(batch, 2, reshape=True, return_class_token=True)
    assert [patches.shape for patches, _ in maps] == [(2, 192, size[0] // 14, size[1] // 14)] * 2


@torch.inference_mode()
def test_mask_hides_a_patch() -> None:
    network, batch = model(), images()
    masks = torch.zeros(2, 16, dtype=torch.bool)
    masks[:, 5] = True
    changed = batch.clone()
    changed[:, :, 14:28, 14:28] += 1  # patch 5 of 4 x 4
    hidden = [network.forward_features(x, masks)["x_norm_clstoken"] for x in (batch, changed)]
    seen = [network.forward_features(x)["x_norm_clstoken"] for x in (batch, changed)]
    assert torch.equal(*hidden)
    assert not torch.equal(*seen)


@torch.inference_mode()
def test_result_for_an_image_does_not_depend_on_its_batch() -> None:
    network, batch = model(), images()
    alone = torch.cat([network.forward_features(image[None])["x_norm_clstoken"] for image in batch])
    assert torch.allclose(alone, network.forward_features(batch)["x_norm_clstoken"], atol=1e-5)


def test_same_seed_same_weights_and_no_global_generator() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, two, other = model(seed=3), model(seed=3), model(seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.pos_embed, two.pos_embed)
    assert not torch.equal(one.pos_embed, other.pos_embed)


def test_channels_and_sizes_are_checked() -> None:
    assert model(in_channels=5).forward_features(images(channels=5))["x_norm_clstoken"].shape == (2, 192)
    with pytest.raises(ConfigError, match="not a multiple of patch_size"):
        model(image_size=57)
    with pytest.raises(ValueError, match="do not divide into patches of 14"):
        model().forward_features(images(60, 56))
