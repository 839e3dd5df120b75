"""Checkpoints in every layout give the same model, and an error lists every key that does not fit.

test_parity.py tests folders of transformers against the library itself.
"""

import copy
import hashlib
import json
import math
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from curation import backbone, weights
from curation.errors import WeightsError

State = dict[str, Tensor]


def make(seed: int = 0, **options: object) -> backbone.VisionTransformer:
    options = {"patch_size": 14, "image_size": 28, "depth": 2, "num_register_tokens": 1, "seed": seed, **options}
    return backbone.build("vit_tiny", **options)  # type: ignore[arg-type]  # the options of `build`


@pytest.fixture
def state() -> State:
    """The weights that a checkpoint holds."""
    return make(seed=1).state_dict()


def as_training_checkpoint(state: State) -> dict[str, State]:
    heads = {"dino_head.mlp.0.weight": torch.ones(2), "ibot_head.last_layer.weight_v": torch.ones(3)}
    return {"teacher": {f"backbone.{name}": value for name, value in state.items()} | heads}


def as_chunked(state: State) -> State:
    """Blocks in chunks of one, each with its number in the whole model, as written by DINOv2's trainer."""
    chunked = {}
    for name, value in state.items():
        kind, *rest = name.split(".")
        chunked[".".join([kind, rest[0], rest[0], *rest[1:]]) if kind == "blocks" else name] = value
    return chunked


LAYOUTS: dict[str, Callable[[State], object]] = {
    "released": lambda state: state,
    "training": as_training_checkpoint,
    "chunked": as_chunked,
    "chunked training": lambda state: as_training_checkpoint(as_chunked(state)),
    "compiled": lambda state: {f"_orig_mod.{name}": value for name, value in state.items()},
    "compiled training": lambda state: {
        "teacher": {f"module.backbone._orig_mod.{name}": value for name, value in state.items()}
    },
    "wrapped": lambda state: {"teacher": {f"module.backbone.{name}": value for name, value in state.items()}},
    "half precision": lambda state: {name: value.half() for name, value in state.items()},
}


def assert_holds(model: nn.Module, state: State, *, tolerance: float = 0.0) -> None:
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, state[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_model(layout: str, state: State, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save(LAYOUTS[layout](state), path)
    model = make()
    weights.load(model, str(path))
    assert_holds(model, state, tolerance=1e-4 if layout == "half precision" else 0.0)


def test_safetensors(state: State, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    model = make()
    weights.load(model, str(path))
    assert_holds(model, state)


def test_a_saved_model_is_read_back_unchanged(state: State, tmp_path: Path) -> None:
    model = make()
    for name in ("first.pth", "second.pth"):
        torch.save(state, tmp_path / name)
        weights.load(model, str(tmp_path / name))
        state = model.state_dict()
    assert_holds(make(seed=1), state)


def test_every_key_that_does_not_fit_is_listed_and_nothing_is_loaded(state: State, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    broken = {name: value for name, value in state.items() if not name.startswith("blocks.1.")}
    broken["pos_embed"] = torch.zeros(1, 17, 192)
    broken["head.weight"] = torch.zeros(3)
    torch.save(broken, path)
    model = make()
    with pytest.raises(WeightsError) as caught:
        weights.load(model, str(path))
    message = str(caught.value)
    assert str(path) in message
    assert "14 missing: blocks.1.norm1.weight, " in message and message.count("blocks.1.") == 10 and ", ..." in message
    assert "1 unexpected: head.weight" in message
    assert "1 of another shape: pos_embed (expected (1, 5, 192), found (1, 17, 192))" in message
    assert_holds(model, make().state_dict())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_register_tokens": 0}, "unexpected: register_tokens"),
        ({"num_register_tokens": 4}, "register_tokens"),
        ({"depth": 3}, "14 missing"),
        ({"feed_forward": "swiglu"}, "mlp.w12.weight"),
        ({"layer_scale": None}, "ls1.gamma"),
        ({"image_size": 42}, "pos_embed"),
    ],
)
def test_a_checkpoint_for_another_model_is_refused(
    options: dict[str, object], named: str, state: State, tmp_path: Path
) -> None:
    torch.save(state, tmp_path / "checkpoint.pth")
    with pytest.raises(WeightsError, match=named):
        weights.load(make(**options), str(tmp_path / "checkpoint.pth"))


def test_the_hash_is_checked_where_one_is_required(state: State, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save(state, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    model = make()
    with pytest.raises(WeightsError, match=f"SHA-256 is {digest}, expected {'0' * 64}"):
        weights.load(model, str(path), sha256="0" * 64)
    assert_holds(model, make().state_dict())
    weights.load(model, str(path), sha256=digest.upper())
    assert_holds(model, state)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_a_damaged_file_is_named(suffix: str, damage: str, state: State, tmp_path: Path) -> None:
    path = tmp_path / f"checkpoint{suffix}"
    if suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    whole = path.read_bytes()
    contents = {
        "truncated": whole[: len(whole) // 2],
        "garbage": bytes(range(256)) * 40,
        "empty": b"",
    }
    path.write_bytes(contents[damage])
    with pytest.raises(WeightsError, match="cannot be read as weights") as caught:
        weights.load(make(), str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!doctype html><title>Not found</title>", "a web page or an XML message"),
        (b"\n <HTML><body>Sign in</body></HTML>", "a web page or an XML message"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "a web page or an XML message"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "git lfs pull"),
    ],
)
def test_a_failed_download_is_named(content: bytes, message: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"checkpoint{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=f"{path}: .*{message}"):
        weights.load(make(), str(path))


def test_a_file_that_unpacks_to_more_than_its_size_is_refused_unread(tmp_path: Path) -> None:
    bomb, plain = tmp_path / "bomb.pth", tmp_path / "plain.pth"
    torch.save({"cls_token": torch.zeros(4_000_000)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in source.namelist():
            packed.writestr(name, source.read(name))
    assert bomb.stat().st_size < 100_000 < 16_000_000 < plain.stat().st_size
    with pytest.raises(WeightsError, match=r"bomb\.pth: its entry '.*' is compressed"):
        weights.load(make(), str(bomb))


def test_entries_that_lie_over_each_other_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "overlapping.pth"
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("archive/data/0", bytes(50_000))
        for number in range(1, 10):  # further names in the directory for the same bytes
            entry = copy.copy(packed.filelist[0])
            entry.filename = f"archive/data/{number}"
            packed.filelist.append(entry)
    with pytest.raises(WeightsError, match=r"entries have 500,000 bytes and the file only"):
        weights.load(make(), str(path))


def test_a_value_that_stands_for_a_billion_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "expanded.pth"
    torch.save({"cls_token": torch.zeros(1).expand(40_000, 40_000)}, path)
    assert path.stat().st_size < 10_000
    with pytest.raises(WeightsError, match="only a part of cls_token"):
        weights.load(make(), str(path))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named_with_their_key(value: float, state: State, tmp_path: Path) -> None:
    state["blocks.1.norm1.weight"][3] = value
    torch.save(state, tmp_path / "checkpoint.pth")
    model = make()
    with pytest.raises(
        WeightsError, match=r"checkpoint\.pth: .*not finite in 1 of \d+ tensors: blocks\.1\.norm1\.weight"
    ):
        weights.load(model, str(tmp_path / "checkpoint.pth"))
    assert_holds(model, make().state_dict())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"No weights at .*absent\.pth"):
        weights.load(make(), str(tmp_path / "absent.pth"))


def test_a_file_with_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save(nn.Linear(2, 2), path)  # a whole module, not its state_dict
    with pytest.raises(WeightsError, match="more than tensors"):
        weights.load(make(), str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "holds a list, not a state_dict"),
        ({"teacher": 3}, "'teacher' is a int, not a state_dict"),
        (
            {"state_dict": {"cls_token": torch.zeros(1)}, "epoch": 7},
            r"2 of its 2 entries are not tensors: state_dict \(dict\), epoch",
        ),
        ({"teacher": {"cls_token": torch.zeros(1)}, "notes": 7}, r"beside 'teacher' it holds notes"),
        ({"model": {"cls_token": torch.zeros(1)}, "epoch": 7}, r"unexpected|missing"),
        ({"cls_token": torch.zeros(1), "backbone.cls_token": torch.zeros(1)}, "two tensors are called 'cls_token'"),
    ],
)
def test_a_file_of_another_kind_is_refused(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "checkpoint.pth")
    with pytest.raises(WeightsError, match=message):
        weights.load(make(), str(tmp_path / "checkpoint.pth"))


def test_load_exactly_accepts_only_the_modules_own_names(tmp_path: Path) -> None:
    path = str(tmp_path / "checkpoint.pth")
    module, source = (
        nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)),
        nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)),
    )
    saved = source.state_dict()
    del saved["1.num_batches_tracked"]  # counts training steps: a file may leave it out
    torch.save(saved, path)
    weights.load_exactly(module, path)
    assert torch.equal(module[0].weight, source[0].weight)
    torch.save({f"backbone.{name}": value for name, value in saved.items()}, path)
    with pytest.raises(WeightsError, match=r"6 missing: 0\.weight"):
        weights.load_exactly(module, path)


# --- the architecture that a file states --------------------------------------------------------------------------


def rebuilt(path: Path) -> backbone.VisionTransformer:
    """A vit_tiny with the architecture and the weights of the checkpoint at `path`."""
    checkpoint = weights.read(str(path))
    model = weights.build_like(weights.architecture(checkpoint.tensors, checkpoint.path), "vit_tiny")
    weights.fill(model, checkpoint)
    return model.eval().requires_grad_(False)


def noisy(seed: int = 3, **options: object) -> backbone.VisionTransformer:
    """A model whose weights all affect the result."""
    model = make(**{"layer_scale": 0.7, **options}).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_register_tokens": 0, "feed_forward": "swiglu", "image_size": 42},
        {"cls_token": False, "num_register_tokens": 0, "layer_scale": None, "depth": 3},
        {"in_channels": 5, "patch_size": 7},
    ],
)
def test_a_checkpoint_states_its_architecture(options: dict[str, object], tmp_path: Path) -> None:
    model = noisy(**options)
    torch.save(model.state_dict(), tmp_path / "checkpoint.pth")
    again = rebuilt(tmp_path / "checkpoint.pth")
    assert_holds(again, model.state_dict())
    assert again.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pos_embed": torch.zeros(1, 7, 192)}, r"pos_embed \(1, 7, 192\); expected .* \(1, 1 \+ M \* M, D\)"),
        ({"pos_embed": torch.zeros(5)}, "pos_embed"),
        ({"patch_embed.proj.weight": torch.zeros(192, 588)}, r"patch_embed.proj.weight has the shape \(192, 588\)"),
        ({"pos_embed": None}, "not the weights of a Vision Transformer: no pos_embed among cls_token"),
    ],
)
def test_shapes_that_fit_no_model_are_named(changed: dict[str, Tensor | None], message: str, state: State) -> None:
    tensors = {name: value for name, value in {**state, **changed}.items() if value is not None}
    with pytest.raises(WeightsError, match=message):
        weights.architecture(tensors, "checkpoint.pth")


# --- timm ---------------------------------------------------------------------------------------------------------
# timm needs torchvision, so it is not installed. Its names and formulas are written out from
# timm/models/vision_transformer.py (VisionTransformer, _pos_embed, _convert_dinov2) and timm/layers/mlp.py (GluMlp,
# SwiGLUPacked).


def timm_weights(
    *, cls_token: bool = True, registers: int = 0, gated: bool = False, layer_scale: bool = True, seed: int = 7
) -> State:
    """A state_dict of timm's VisionTransformer: 192 wide, two blocks, 2x2 patches of 14, num_classes=0."""
    positions = 4 + int(cls_token and not registers)  # with registers, no_embed_class: only patches have positions
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, positions, 192),
        "patch_embed.proj.weight": (192, 3, 14, 14),
        "patch_embed.proj.bias": (192,),
        "norm.weight": (192,),
        "norm.bias": (192,),
    }
    if cls_token:
        shapes["cls_token"] = (1, 1, 192)
    if registers:
        shapes["reg_token"] = (1, registers, 192)
    hidden = 2 * 512 if gated else 768
    for block in ("blocks.0.", "blocks.1."):
        layers = {"attn.qkv": (576, 192), "attn.proj": (192, 192), "mlp.fc1": (hidden, 192)}
        layers["mlp.fc2"] = (192, 512 if gated else 768)
        for layer, shape in layers.items():
            shapes |= {f"{block}{layer}.weight": shape, f"{block}{layer}.bias": shape[:1]}
        for norm in ("norm1", "norm2"):
            shapes |= {f"{block}{norm}.weight": (192,), f"{block}{norm}.bias": (192,)}
        if layer_scale:
            shapes |= {f"{block}ls1.gamma": (192,), f"{block}ls2.gamma": (192,)}
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def timm_forward(state: State, x: Tensor) -> Tensor:
    """timm's forward_features at the size of the positional embedding."""

    def linear(name: str, y: Tensor) -> Tensor:
        return functional.linear(y, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name: str, y: Tensor) -> Tensor:
        return functional.layer_norm(y, (192,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    y = functional.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=14)
    y = y.flatten(2).transpose(1, 2)
    before = [state[name].expand(len(x), -1, -1) for name in ("cls_token", "reg_token") if name in state]
    if state["pos_embed"].shape[1] == y.shape[1]:
        y = torch.cat([*before, y + state["pos_embed"]], 1)
    else:
        y = torch.cat([*before, y], 1) + state["pos_embed"]
    for block in ("blocks.0.", "blocks.1."):
        q, k, v = linear(f"{block}attn.qkv", norm(f"{block}norm1", y)).unflatten(2, (3, 3, 64)).permute(2, 0, 3, 1, 4)
        z = ((q / math.sqrt(64)) @ k.transpose(-2, -1)).softmax(-1) @ v
        y = y + state.get(f"{block}ls1.gamma", 1) * linear(f"{block}attn.proj", z.transpose(1, 2).flatten(2))
        z = linear(f"{block}mlp.fc1", norm(f"{block}norm2", y))
        if z.shape[-1] == 1024:
            x1, x2 = z.chunk(2, dim=-1)
            z = functional.silu(x1) * x2  # SwiGLUPacked: gate_last=False
        else:
            z = functional.gelu(z)
        y = y + state.get(f"{block}ls2.gamma", 1) * linear(f"{block}mlp.fc2", z)
    return norm("norm", y)


TIMM: dict[str, dict[str, object]] = {
    "dinov2": {},
    "reg4": {"registers": 4},
    "giant": {"gated": True},
    "giant reg4": {"gated": True, "registers": 4},
    "mae, plain ViT": {"layer_scale": False},
    "ijepa, class_token=False": {"layer_scale": False, "cls_token": False},
}


@pytest.mark.parametrize("kind", TIMM)
def test_timm_gives_the_same_results_and_is_read_back_exactly(kind: str, tmp_path: Path) -> None:
    state = timm_weights(**TIMM[kind])  # type: ignore[arg-type]  # the options of timm_weights
    save_file(state, tmp_path / "timm.safetensors")
    checkpoint = weights.read(str(tmp_path / "timm.safetensors"))
    assert checkpoint.layout == "timm" and checkpoint.left_aside == ()
    model = rebuilt(tmp_path / "timm.safetensors")
    x = images(2, 3, 28, 28)
    features = model.forward_features(x)
    actual, expected = model.norm(features["x_prenorm"]), timm_forward(state, x)
    assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()
    assert not model.mask_token.any()

    weights.save(model, str(tmp_path / "again.safetensors"), "timm")
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], value) for name, value in state.items())


@pytest.mark.parametrize("registers", [0, 4])
def test_what_timm_loses(registers: int, tmp_path: Path) -> None:
    model = noisy(num_register_tokens=registers)
    weights.save(model, str(tmp_path / "timm.safetensors"), "timm")
    again = rebuilt(tmp_path / "timm.safetensors")
    before, after = model.state_dict(), again.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == ({"mask_token", "cls_token", "pos_embed"} if registers else {"mask_token"})
    x = images(2, 3, 28, 28)
    assert torch.equal(model.forward_features(x)["x_prenorm"], again.forward_features(x)["x_prenorm"])


def test_timm_may_have_a_head_and_no_other_extra_key(tmp_path: Path) -> None:
    state = timm_weights()
    head = {"head.weight": torch.zeros(10, 192), "head.bias": torch.zeros(10)}
    save_file(state | head, tmp_path / "timm.safetensors")
    assert weights.load(make(num_register_tokens=0), str(tmp_path / "timm.safetensors")) == tuple(sorted(head, key=len))
    state["fc_norm.weight"] = state.pop("norm.weight")
    save_file(state, tmp_path / "pooled.safetensors")
    with pytest.raises(WeightsError, match=r"(?s)1 missing: norm.weight.*1 unexpected: fc_norm.weight"):
        weights.load(make(num_register_tokens=0), str(tmp_path / "pooled.safetensors"))


# --- the checkpoints of I-JEPA and of MAE -------------------------------------------------------------------------


def test_ijepa_gives_its_target_encoder(tmp_path: Path) -> None:
    context, target = (timm_weights(cls_token=False, layer_scale=False, seed=seed) for seed in (1, 2))
    checkpoint = {  # as src/train.py writes it
        "encoder": {f"module.{name}": value for name, value in context.items()},
        "predictor": {"module.predictor_embed.weight": torch.zeros(3)},
        "target_encoder": {f"module.{name}": value for name, value in target.items()},
        "opt": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-3}]},
        "scaler": None,
        "epoch": 300,
        "loss": 0.1,
        "batch_size": 128,
        "world_size": 16,
        "lr": 1e-3,
    }
    path = tmp_path / "IN22K-vit.h.14-900e.pth.tar"
    torch.save(checkpoint, path)
    read = weights.read(str(path))
    assert read.layout == "ijepa" and set(read.left_aside) == set(checkpoint) - {"target_encoder"}
    x = images(1, 3, 28, 28)
    features = rebuilt(path).forward_features(x)
    expected = timm_forward(target, x)
    assert (features["x_norm_patchtokens"] - expected).abs().max() < 1e-5 * expected.abs().max()
    torch.save({**checkpoint, "discriminator": {}}, path)
    with pytest.raises(WeightsError, match="beside 'target_encoder' it holds discriminator"):
        weights.read(str(path))


@pytest.mark.parametrize("with_decoder", [False, True])
def test_mae_gives_its_encoder(with_decoder: bool, tmp_path: Path) -> None:
    encoder = timm_weights(layer_scale=False)
    decoder = {
        "mask_token": torch.ones(1, 1, 512),
        "decoder_pos_embed": torch.zeros(1, 5, 512),
        "decoder_embed.weight": torch.zeros(512, 192),
        "decoder_blocks.0.norm1.weight": torch.zeros(512),
        "decoder_pred.bias": torch.zeros(588),
    }
    path = tmp_path / "mae_pretrain_vit_huge.pth"
    torch.save({"model": encoder | decoder if with_decoder else encoder}, path)
    read = weights.read(str(path))
    assert set(read.left_aside) == (set(decoder) if with_decoder else set())
    model = rebuilt(path)
    assert not model.mask_token.any()
    x = images(1, 3, 28, 28)
    expected = timm_forward(encoder, x)
    assert (model(x) - expected[:, 0]).abs().max() < 1e-5 * expected.abs().max()


# --- written and read back ----------------------------------------------------------------------------------------

SAVED: dict[str, dict[str, object]] = {
    "dinov2": {"num_register_tokens": 0},
    "registers": {"num_register_tokens": 4},
    "swiglu": {"feed_forward": "swiglu"},
    "ijepa": {"cls_token": False, "num_register_tokens": 0, "layer_scale": None},
    "mae": {"num_register_tokens": 0, "layer_scale": None, "in_channels": 4},
}


@pytest.mark.parametrize("kind", SAVED)
@pytest.mark.parametrize("name", ["released.pth", "released.safetensors", "transformers"])
def test_round_trips_are_exact(name: str, kind: str, tmp_path: Path) -> None:
    model = noisy(**SAVED[kind])
    weights.save(model, str(tmp_path / name), Path(name).stem)  # type: ignore[arg-type]  # one of the layouts
    state = rebuilt(tmp_path / name).state_dict()
    assert state.keys() == model.state_dict().keys()
    lost = {"mask_token"} if name == "transformers" and kind in ("ijepa", "mae") else set()
    assert {part for part, value in model.state_dict().items() if not torch.equal(value, state[part])} == lost


def test_half_precision_stays_half(tmp_path: Path) -> None:
    model = noisy(num_register_tokens=0).to(torch.bfloat16)
    weights.save(model, str(tmp_path / "hf"), "transformers")
    assert json.loads((tmp_path / "hf/config.json").read_text())["dtype"] == "bfloat16"
    tensors = weights.read(str(tmp_path / "hf")).tensors
    assert all(torch.equal(tensors[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "path", "layout", "message"),
    [
        ({}, "model.bin", "released", r"'.*model.bin': the layout 'released' .* \.pth or \.safetensors"),
        ({}, "model.pth", "timm", r"ends in \.safetensors"),
        ({}, "file", "transformers", "is a file"),
        ({}, "model.pth", "onnx", "No layout to save is called 'onnx'"),
        ({"layer_scale": None}, "hf", "transformers", "no model like this one: .*num_register_tokens=1"),
        (
            {"cls_token": False, "num_register_tokens": 0, "layer_scale": None, "feed_forward": "swiglu"},
            "hf",
            "transformers",
            "no model like this one",
        ),
    ],
)
def test_models_and_paths_that_do_not_fit_a_layout_are_refused(
    options: dict[str, object], path: str, layout: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WeightsError, match=message):
        weights.save(make(**options), str(tmp_path / path), layout)  # type: ignore[arg-type]  # the mistake under test
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


# --- folders of transformers --------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    weights.save(noisy(), str(tmp_path / "hf"), "transformers")
    return tmp_path / "hf"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "clip"}, "model_type is 'clip'; known are dinov2, .*timm folder"),
        ({"hidden_act": "relu", "qkv_bias": False}, "hidden_act is 'relu', .* 'gelu' .*qkv_bias is False"),
        ({"layer_norm_eps": 1e-5}, r"layer_norm_eps is 1e-05, and only 1e-06"),
        ({"num_attention_heads": None}, "num_attention_heads is None"),
        ({"num_attention_heads": 6}, "config.json says 6 heads of attention, and the model has 3"),
    ],
)
def test_a_config_of_another_model_is_refused(changes: dict[str, object], message: str, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(WeightsError, match=message):
        weights.load(make(), str(folder))


def test_every_key_of_a_folder_that_does_not_fit_is_listed(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.layer.1.attention.attention.key.weight"], tensors["embeddings.mask_token"]
    tensors["encoder.layer.0.norm3.weight"] = torch.zeros(1)
    tensors["encoder.layer.0.mlp.fc1.bias"] = torch.zeros(5)
    save_file(tensors, folder / "model.safetensors")
    model = make()
    with pytest.raises(WeightsError) as caught:
        weights.load(model, str(folder))
    message = str(caught.value)
    assert "2 missing: mask_token, blocks.1.attn.qkv.weight" in message
    assert "3 unexpected: encoder.layer.0.norm3.weight, encoder.layer.1.attention.attention.query.weight" in message
    assert "blocks.0.mlp.fc1.bias (expected (768,), found (5,))" in message
    assert_holds(model, make().state_dict())


def test_a_folder_with_several_weight_files(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:20], "model-00002-of-00002.safetensors": names[20:]}
    for file, names_of_file in shards.items():
        save_file({name: tensors[name] for name in names_of_file}, folder / file)
    index = {"weight_map": {name: file for file, names_of_file in shards.items() for name in names_of_file}}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    hashed = hashlib.sha256(b"".join((folder / file).read_bytes() for file in shards)).hexdigest()
    model = make()
    weights.load(model, str(folder), sha256=hashed)
    assert_holds(model, noisy().state_dict())
    with pytest.raises(WeightsError, match=f"SHA-256 is {hashed}"):
        weights.load(model, str(folder), sha256="0" * 64)

    save_file({name: tensors[name] for name in names[21:]}, folder / "model-00002-of-00002.safetensors")
    with pytest.raises(WeightsError, match=f"disagree about {names[20]}"):
        weights.load(model, str(folder))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"No weights at .*model-00002-of-00002"):
        weights.load(model, str(folder))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../elsewhere"}}))
    with pytest.raises(WeightsError, match="does not give a file of this folder"):
        weights.load(model, str(folder))


def test_an_older_folder(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    model = make()
    assert weights.load(model, str(folder)) == ()
    assert_holds(model, noisy().state_dict())


def test_an_incomplete_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"Give their folder, with config.json"):
        weights.load(make(), str(folder / "model.safetensors"))
    shutil.copytree(folder, tmp_path / "bare")
    (tmp_path / "bare/model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"no weights beside config.json"):
        weights.load(make(), str(tmp_path / "bare"))
    (tmp_path / "bare/config.json").write_text("[")
    with pytest.raises(WeightsError, match=r"config.json: not valid JSON"):
        weights.load(make(), str(tmp_path / "bare"))
    (tmp_path / "bare/config.json").unlink()
    with pytest.raises(WeightsError, match=r"No file .*config.json"):
        weights.load(make(), str(tmp_path / "bare"))
