"""The Vision Transformer: key layout, calling conventions, positions and results."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from curation import backbone
from curation.errors import ConfigError, InputError

RELEASED_BLOCK = (
    "norm1.weight norm1.bias attn.qkv.weight attn.qkv.bias attn.proj.weight attn.proj.bias ls1.gamma "
    "norm2.weight norm2.bias mlp.fc1.weight mlp.fc1.bias mlp.fc2.weight mlp.fc2.bias ls2.gamma"
).split()


def small(**options: object) -> backbone.VisionTransformer:
    """Two blocks, 3x3 patches of 14, with weights large enough for every part of the model to affect the result."""
    options = {"patch_size": 14, "image_size": 42, "depth": 2, "layer_scale": 0.7, **options}
    model = backbone.build("vit_tiny", **options).eval()  # type: ignore[arg-type]  # the options of `build`
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.requires_grad_(False)


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def test_keys_and_shapes_are_the_released_ones() -> None:
    state = backbone.build("vit_small", patch_size=14, image_size=518, depth=2).state_dict()
    blocks = [f"blocks.{index}.{name}" for index in range(2) for name in RELEASED_BLOCK]
    stem = ["cls_token", "pos_embed", "mask_token", "patch_embed.proj.weight", "patch_embed.proj.bias"]
    assert list(state) == [*stem, *blocks, "norm.weight", "norm.bias"]
    assert state["pos_embed"].shape == (1, 1370, 384)
    assert state["mask_token"].shape == (1, 384)
    assert state["patch_embed.proj.weight"].shape == (384, 3, 14, 14)
    with_registers = backbone.build("vit_small", patch_size=14, image_size=518, depth=1, num_register_tokens=4)
    assert with_registers.state_dict()["register_tokens"].shape == (1, 4, 384)


# The published sizes with patches of 14 and positions for 518 pixels, counted by hand.
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("vit_small", 22_056_576),
        ("vit_base", 86_580_480),
        ("vit_large", 304_368_640),
        ("vit_giant", 1_136_480_768),
    ],
)
def test_parameter_counts_are_the_released_ones(name: backbone.Name, count: int) -> None:
    size = backbone.SIZES[name]
    one, two = (backbone.build(name, patch_size=14, image_size=518, depth=depth) for depth in (1, 2))
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (one, two)]
    assert sizes[0] + (size.depth - 1) * (sizes[1] - sizes[0]) == count


def test_weights_depend_only_on_the_seed() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = backbone.build("vit_tiny", patch_size=16, image_size=32, depth=1, num_register_tokens=2)
    assert torch.equal(torch.get_rng_state(), before)
    again = backbone.build("vit_tiny", patch_size=16, image_size=32, depth=1, num_register_tokens=2)
    other = backbone.build("vit_tiny", patch_size=16, image_size=32, depth=1, num_register_tokens=2, seed=1)
    for name, value in first.state_dict().items():
        assert value.isfinite().all()
        assert torch.equal(value, again.state_dict()[name])
    assert not torch.equal(first.pos_embed, other.pos_embed)
    assert first.get_submodule("blocks.0.ls1").gamma.unique().tolist() == [pytest.approx(1e-5)]


def test_forward_features_splits_the_tokens() -> None:
    model = small(num_register_tokens=3)
    x = images(2, 3, 42, 42)
    features = model.forward_features(x)
    tokens = torch.cat(
        [features["x_norm_clstoken"][:, None], features["x_norm_regtokens"], features["x_norm_patchtokens"]], dim=1
    )
    assert features["x_prenorm"].shape == (2, 1 + 3 + 9, 192)
    assert torch.equal(tokens, model.norm(features["x_prenorm"]))
    assert torch.equal(model(x), features["x_norm_clstoken"])
    assert features["masks"] is None


@pytest.mark.parametrize("feed_forward", ["mlp", "swiglu"])
def test_the_result_agrees_with_the_written_out_equations(feed_forward: str) -> None:
    model = small(feed_forward=feed_forward, num_register_tokens=2)
    x = images(1, 3, 42, 42)
    state = model.state_dict()

    def linear(name: str, tokens: Tensor) -> Tensor:
        return tokens @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name: str, tokens: Tensor) -> Tensor:
        centred = tokens - tokens.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    pixels = x[0].unfold(1, 14, 14).unfold(2, 14, 14).permute(1, 2, 0, 3, 4).reshape(9, -1)
    patches = pixels @ state["patch_embed.proj.weight"].flatten(1).T + state["patch_embed.proj.bias"]
    tokens = torch.cat([state["cls_token"][0], patches]) + state["pos_embed"][0]
    tokens = torch.cat([tokens[:1], state["register_tokens"][0], tokens[1:]])
    for index in range(2):
        block = f"blocks.{index}"
        queries, keys, values = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", tokens)).chunk(3, dim=-1)
        heads = []
        for head in range(3):
            part = slice(64 * head, 64 * (head + 1))
            weights = (queries[:, part] @ keys[:, part].T / math.sqrt(64)).softmax(-1)
            heads.append(weights @ values[:, part])
        attended = linear(f"{block}.attn.proj", torch.cat(heads, dim=-1))
        tokens = tokens + state[f"{block}.ls1.gamma"] * attended
        hidden = norm(f"{block}.norm2", tokens)
        if feed_forward == "mlp":
            hidden = linear(f"{block}.mlp.fc2", functional.gelu(linear(f"{block}.mlp.fc1", hidden)))
        else:
            gate, up = linear(f"{block}.mlp.w12", hidden).chunk(2, dim=-1)
            hidden = linear(f"{block}.mlp.w3", gate * gate.sigmoid() * up)
        tokens = tokens + state[f"{block}.ls2.gamma"] * hidden
    torch.testing.assert_close(model.forward_features(x)["x_prenorm"][0], tokens, rtol=1e-4, atol=1e-4)


def test_the_pixels_of_masked_patches_have_no_effect() -> None:
    model = small()
    masks = torch.zeros(2, 9, dtype=torch.bool)
    masks[0, 4] = True
    x = images(2, 3, 42, 42)
    changed = x.clone()
    changed[:, :, 14:28, 14:28] += 1  # the patch in the middle, number 4
    masked, masked_changed = (model.forward_features(part, masks)["x_norm_patchtokens"] for part in (x, changed))
    assert torch.equal(masked[0], masked_changed[0])
    assert not torch.allclose(masked[1], masked_changed[1])
    assert not torch.allclose(masked[0], model.forward_features(x)["x_norm_patchtokens"][0])


def test_intermediate_layers_in_every_form() -> None:
    model = small(num_register_tokens=2, depth=3)
    x = images(2, 3, 28, 42)
    (last,) = model.get_intermediate_layers(x)
    assert torch.equal(last, model.forward_features(x)["x_norm_patchtokens"])
    all_three = model.get_intermediate_layers(x, 3)
    assert [layer.shape for layer in all_three] == [(2, 6, 192)] * 3
    first_and_last = model.get_intermediate_layers(x, [0, 2])
    assert torch.equal(first_and_last[0], all_three[0]) and torch.equal(first_and_last[1], all_three[2])
    ((grid, cls),) = model.get_intermediate_layers(x, reshape=True, return_class_token=True)
    assert grid.shape == (2, 192, 2, 3)
    assert torch.equal(grid[:, :, 1, 2], last[:, 5])
    assert torch.equal(cls, model(x))
    (raw,) = model.get_intermediate_layers(x, norm=False)
    assert torch.equal(raw, model.forward_features(x)["x_prenorm"][:, 3:])
    with pytest.raises(InputError, match=r"\[3\].*has 3"):
        model.get_intermediate_layers(x, [3])


def bicubic(grid: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Rows of `grid` at fractional `positions`, by Keys' cubic with a=-0.75, the border repeated."""

    def weight(distance: np.ndarray, a: float = -0.75) -> np.ndarray:
        d = np.abs(distance)
        near = (a + 2) * d**3 - (a + 3) * d**2 + 1
        far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
        return np.where(d <= 1, near, np.where(d < 2, far, 0.0))

    taps = np.floor(positions).astype(int)[:, None] + np.arange(-1, 3)
    weights = weight(positions[:, None] - taps)
    return np.einsum("pt,pt...->p...", weights, grid[np.clip(taps, 0, len(grid) - 1)])


def interpolated(grid: np.ndarray, rows: int, columns: int, offset: float) -> np.ndarray:
    """A square grid of positions at rows x columns, as in torch.hub's DINOv2 with an offset of 0.1.

    Its scale is (rows + offset) / side, so patch `i` is interpolated at (i + 0.5) * side / (rows + offset) - 0.5.
    """
    row_positions, column_positions = (
        (np.arange(count) + 0.5) * len(grid) / (count + offset) - 0.5 for count in (rows, columns)
    )
    return bicubic(bicubic(grid, row_positions).swapaxes(0, 1), column_positions).swapaxes(0, 1)


@pytest.mark.parametrize(("mode", "offset"), [("offset", 0.1), ("plain", 0.0)])
@pytest.mark.parametrize(("side", "rows", "columns"), [(5, 3, 7), (37, 16, 16), (37, 7, 40)])
def test_positions_are_interpolated_as_stated(mode: str, offset: float, side: int, rows: int, columns: int) -> None:
    model = small(image_size=14 * side, position_interpolation=mode)
    expected = interpolated(model.pos_embed[0, 1:].reshape(side, side, 192).double().numpy(), rows, columns, offset)
    positions = model._positions(rows, columns)
    assert torch.equal(positions[:, 0], model.pos_embed[:, 0])
    np.testing.assert_allclose(positions[0, 1:].numpy(), expected.reshape(rows * columns, 192), atol=1e-5)


def test_antialiased_positions_average_where_plain_ones_skip() -> None:
    plain, smooth = (small(image_size=126, position_interpolation=mode) for mode in ("plain", "antialias"))
    assert smooth._positions(3, 3)[0, 1:].std() < 0.7 * plain._positions(3, 3)[0, 1:].std()


@pytest.mark.parametrize("mode", ["offset", "plain", "antialias"])
def test_positions_are_unchanged_at_their_size_and_interpolated_at_others(mode: str) -> None:
    model = small(position_interpolation=mode)
    assert model._positions(3, 3) is model.pos_embed
    assert model(images(2, 3, 14, 70)).shape == (2, 192)  # not square, and not the size of the positional embedding


def test_other_channels_and_no_layer_scale() -> None:
    model = small(in_channels=5, layer_scale=None)
    assert model(images(1, 5, 42, 42)).shape == (1, 192)
    assert not any("gamma" in name for name in model.state_dict())


def test_without_a_cls_token() -> None:
    model = small(cls_token=False, num_register_tokens=2, image_size=70)
    assert "cls_token" not in model.state_dict() and model.pos_embed.shape == (1, 25, 192)
    x = images(2, 3, 42, 56)
    features = model.forward_features(x)
    assert "x_norm_clstoken" not in features
    assert features["x_norm_regtokens"].shape == (2, 2, 192) and features["x_norm_patchtokens"].shape == (2, 12, 192)
    with_zeros = small(num_register_tokens=2, image_size=70)
    with_zeros.load_state_dict({**with_zeros.state_dict(), **model.state_dict(), "pos_embed": with_zeros.pos_embed})
    with_zeros.pos_embed[:, 1:] = model.pos_embed
    assert torch.equal(with_zeros._embed(x, None)[:, 1:], model._embed(x, None))  # only the CLS token differs
    (patches,) = model.get_intermediate_layers(x)
    assert torch.equal(patches, features["x_norm_patchtokens"])
    for call in (lambda: model(x), lambda: model.get_intermediate_layers(x, return_class_token=True)):
        with pytest.raises(InputError, match="no CLS token"):
            call()


def test_the_calling_conventions_are_those_of_dinov2() -> None:
    model = small(num_register_tokens=1)
    x, y, masks = images(2, 3, 42, 42), images(1, 3, 28, 42), torch.arange(18).reshape(2, 9) % 2 == 0
    alone = model.forward_features(x, masks), model.forward_features(y)
    assert alone[0]["masks"] is masks
    together = model.forward_features([x, y], [masks, None])
    for features, expected in zip(together, alone, strict=True):
        assert features.keys() == expected.keys()
        torch.testing.assert_close(features["x_prenorm"], expected["x_prenorm"], rtol=1e-5, atol=1e-5)
    training = model(x, is_training=True, masks=masks)
    assert torch.equal(training["x_prenorm"], alone[0]["x_prenorm"])
    model.head = torch.nn.Linear(192, 5)
    assert torch.equal(model(x), model.head(model.forward_features(x)["x_norm_clstoken"]))
    facts = ("embed_dim", "num_features", "patch_size", "n_blocks", "num_heads", "num_register_tokens")
    assert [getattr(model, name) for name in facts] == [192, 192, 14, 2, 3, 1] and len(model.blocks) == 2


def test_gradients_of_joint_batches_equal_those_of_single_batches() -> None:
    model = small(num_register_tokens=1).requires_grad_(True)
    x, y, masks = images(2, 3, 42, 42), images(3, 3, 28, 28), torch.arange(18).reshape(2, 9) % 2 == 0

    def gradients(features: list[backbone.Features]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        for batch in features:
            loss = batch["x_norm_clstoken"].sin().sum() + batch["x_norm_patchtokens"].cos().sum()
            loss.backward(retain_graph=True)
        return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}

    together = gradients(model.forward_features([x, y], [masks, None]))
    alone = gradients([model.forward_features(x, masks), model.forward_features(y)])
    assert together.keys() == alone.keys() == dict(model.named_parameters()).keys()
    for name, gradient in alone.items():
        torch.testing.assert_close(
            together[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()), msg=name
        )


def test_a_branch_is_scaled_and_added_to_the_kept_images_only() -> None:
    block = small().blocks[0]
    x, y = (torch.randn(count, 5, 192, generator=torch.Generator().manual_seed(count)) for count in (4, 3))
    kept = (torch.tensor([3, 1]), torch.tensor([2])), (torch.tensor([0, 1]), torch.tensor([0]))
    results = block([x, y], kept)
    for group, first, second, result in zip((x, y), *kept, results, strict=True):
        expected = group.clone()
        for image in first.tolist():
            branch = block.ls1(block.attn(block.norm1(group[image : image + 1])))
            expected[image] += branch[0] * len(group) / len(first)
        middle = expected.clone()
        for image in second.tolist():
            expected[image] += (
                block.ls2(block.mlp(block.norm2(middle[image : image + 1])))[0] * len(group) / len(second)
            )
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("patch_size", [8, 14, 16])
@pytest.mark.parametrize("name", backbone.SIZES)
def test_every_size_at_every_patch_size(name: backbone.Name, patch_size: int) -> None:
    model = backbone.build(name, patch_size=patch_size, image_size=4 * patch_size, depth=1, seed=None)
    assert model.embed_dim % model.num_heads == 0
    assert model.state_dict()["patch_embed.proj.weight"].shape == (model.embed_dim, 3, patch_size, patch_size)
    assert ("blocks.0.mlp.w12.weight" in model.state_dict()) == (name == "vit_giant")


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"image_size 224 is not a multiple of patch_size 15"):
        backbone.build("vit_tiny", patch_size=15, image_size=224)
    with pytest.raises(ConfigError, match=r"'vit_medium'.*vit_tiny"):
        backbone.build("vit_medium", patch_size=16, image_size=224)  # type: ignore[arg-type]  # the mistake under test
    with pytest.raises(InputError, match=r"42x43 pixels.*patches of 14"):
        small()(images(1, 3, 42, 43))
