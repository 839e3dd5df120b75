"""Checkpoints load whole or not at all, from every layout that `curation.weights` names."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from curation import weights
from curation.backbone import VisionTransformer, build
from curation.errors import WeightsError


def model(seed: int = 0, *, image_size: int = 28) -> VisionTransformer:
    return build("vit_tiny", patch_size=14, image_size=image_size, depth=2, seed=seed)


def same(one: VisionTransformer, other: VisionTransformer) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def chunked(name: str) -> str:
    return name.replace("blocks.", "blocks.0.") if name.startswith("blocks.") else name


LAYOUTS = {
    "released": lambda state: state,
    "training": lambda state: {
        "teacher": {f"backbone.{name}": value for name, value in state.items()} | {"dino_head.w": torch.ones(1)}
    },
    "parallel": lambda state: {"teacher": {f"module.backbone.{name}": value for name, value in state.items()}},
    "chunked": lambda state: {"teacher": {f"backbone.{chunked(name)}": value for name, value in state.items()}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads_the_same_values(layout: str, tmp_path: Path) -> None:
    source, target = model(1), model(2)
    assert not same(source, target)
    torch.save(LAYOUTS[layout](source.state_dict()), tmp_path / "w.pth")
    weights.load(target, str(tmp_path / "w.pth"))
    assert same(source, target)


def test_safetensors_load(tmp_path: Path) -> None:
    source, target = model(1), model(2)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    weights.load(target, str(tmp_path / "w.safetensors"))
    assert same(source, target)


def broken(state: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    state = dict(state)
    match how:
        case "missing":
            del state["norm.weight"]
        case "unexpected":
            state["surprise"] = torch.ones(1)
        case "shape":
            state["pos_embed"] = torch.ones(1, 2, 192)
    return state


@pytest.mark.parametrize(
    ("how", "message"),
    [("missing", "norm.weight"), ("unexpected", "surprise"), ("shape", r"pos_embed \(expected \(1, 5, 192\)")],
)
def test_key_that_does_not_fit_is_named_and_nothing_loads(how: str, message: str, tmp_path: Path) -> None:
    torch.save(broken(model(1).state_dict(), how), tmp_path / "w.pth")
    target = model(2)
    with pytest.raises(WeightsError, match=message):
        weights.load(target, str(tmp_path / "w.pth"))
    assert same(target, model(2))


def test_hash_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(model(1).state_dict(), path)
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    weights.load(model(2), str(path), sha256=right)
    with pytest.raises(WeightsError, match=f"SHA-256 is {right}, expected {'0' * 64}"):
        weights.load(model(2), str(path), sha256="0" * 64)


@pytest.mark.parametrize("length", [0, 10, 5000])
def test_truncated_file_is_refused(length: int, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(model(1).state_dict(), path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(WeightsError, match="cannot be read as weights"):
        weights.load(model(2), str(path))


def test_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"teacher": model(1)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="more than tensors"):
        weights.load(model(2), str(tmp_path / "w.pth"))


def test_missing_file_is_named() -> None:
    with pytest.raises(WeightsError, match=r"No weights at '/nowhere\.pth'"):
        weights.load(model(), "/nowhere.pth")
