"""Checkpoints in every layout give the same model, and whatever does not fit is named."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

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
    """Blocks in chunks of one, each under its number in the whole model, as DINOv2's trainer writes them."""
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


def test_a_saved_model_comes_back_whole(state: State, tmp_path: Path) -> None:
    model = make()
    for name in ("first.pth", "second.pth"):
        torch.save(state, tmp_path / name)
        weights.load(model, str(tmp_path / name))
        state = model.state_dict()
    assert_holds(make(seed=1), state)


def test_all_that_does_not_fit_is_listed_and_nothing_loads(state: State, tmp_path: Path) -> None:
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
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    model = make()
    with pytest.raises(WeightsError, match=f"SHA-256 is {found}, expected {'0' * 64}"):
        weights.load(model, str(path), sha256="0" * 64)
    assert_holds(model, make().state_dict())
    weights.load(model, str(path), sha256=found.upper())
    assert_holds(model, state)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "page"])
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
        "page": b"<!doctype html><title>Not found</title>",
    }
    path.write_bytes(contents[damage])
    with pytest.raises(WeightsError, match="cannot be read as weights") as caught:
        weights.load(make(), str(path))
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"No weights at .*absent\.pth"):
        weights.load(make(), str(tmp_path / "absent.pth"))


def test_a_file_that_carries_code_is_refused(tmp_path: Path) -> None:
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
            {"model": {"cls_token": torch.zeros(1)}, "epoch": 7},
            r"2 of its 2 entries are no tensors: model \(dict\), epoch",
        ),
        ({"cls_token": torch.zeros(1), "backbone.cls_token": torch.zeros(1)}, "two tensors are called 'cls_token'"),
    ],
)
def test_a_file_of_another_kind_is_refused(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "checkpoint.pth")
    with pytest.raises(WeightsError, match=message):
        weights.load(make(), str(tmp_path / "checkpoint.pth"))


def test_load_exactly_takes_only_the_modules_own_names(tmp_path: Path) -> None:
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
