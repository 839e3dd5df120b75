"""Exports load in the library of their layout and give the same features.

timm needs torchvision, which is not a dependency. Its layout is checked by its names and by reading it back, as in
tests/curation/test_weights.py.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel

from curation import backbone, weights
from curation.backbone import VisionTransformer
from curation.engine.ranks import World
from curation.errors import ConfigError, InputError, WeightsError
from curation.models.embedders import EmbedderConfig, load_embedder
from evaluation.features import FrozenModelConfig, load_model
from tests.curation.test_parity import randomize
from training import checkpoint, export, heads

ALONE = World(0, 1, 0, torch.device("cpu"))
BACKBONE: dict[str, Any] = {
    "name": "vit_tiny",
    "patch_size": 14,
    "image_size": 56,
    "num_register_tokens": 4,
    "position_interpolation": "antialias",
    "drop_path": 0.1,
    "layer_scale": 1e-5,
    "depth": 2,
}
HEAD = heads.HeadConfig(num_prototypes=7, bottleneck_dim=5, hidden_dim=6)


def build(**options: Any) -> VisionTransformer:
    return backbone.build(**without(BACKBONE | options, "drop_path"), seed=None)


def without(state: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key != name}


def trained(seed: int = 0, **options: Any) -> nn.ModuleDict:
    """A backbone and its heads, as in a run."""
    model = build(**options)
    generator = torch.Generator().manual_seed(seed)
    built = {name: heads.build(192, HEAD, generator) for name in ("dino_head", "ibot_head")}
    parts = nn.ModuleDict({"backbone": model, **built})
    randomize(parts, seed)
    return parts.requires_grad_(False).eval()


def save(folder: Path, *, config: dict[str, Any] | None = None, **parts: nn.Module) -> str:
    states = {name: module.state_dict() for name, module in parts.items()}
    config = {"model": {"backbone": BACKBONE}} if config is None else config
    return checkpoint.save(str(folder), 10, states, progress={}, config=config, keep=1, world=ALONE)


def head_tensors(module: nn.ModuleDict) -> dict[str, Tensor]:
    return {name: value for name, value in module.state_dict().items() if "head" in name}


@pytest.fixture(scope="module")
def teacher() -> nn.ModuleDict:
    return trained(1)


@pytest.fixture(scope="module")
def exported(teacher: nn.ModuleDict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's checkpoint, exported in every layout."""
    folder = tmp_path_factory.mktemp("run")
    path = save(folder / "checkpoints", student=trained(2), teacher=teacher)
    written = export.export_checkpoint(path, str(folder / "export"), export.LAYOUTS)
    names = ["teacher.pth", "hf", "timm/model.safetensors", "heads.pth"]
    assert written == [str(folder / "export" / name) for name in names]
    return folder / "export"


def model_of(teacher: nn.ModuleDict) -> VisionTransformer:
    model = teacher["backbone"]
    assert isinstance(model, VisionTransformer)
    return model


@pytest.mark.parametrize("interpolation", ["offset", "plain", "antialias"])
def test_every_layout_carries_the_interpolation_of_the_training(
    interpolation: backbone.PositionInterpolation, tmp_path: Path
) -> None:
    model = build(num_register_tokens=0, position_interpolation=interpolation)
    randomize(model, 3)
    export.export(model, head_tensors(trained(3)), str(tmp_path), export.LAYOUTS)
    for name in export.FILES.values():
        path = str(tmp_path / name)
        network = load_model(FrozenModelConfig(weights=path)).backbone
        assert network is not None and network.position_interpolation == interpolation, name
        assert torch.equal(network(images(84)), model.eval()(images(84)))  # another size than the trained one
    # A named embedder follows its file too.
    small = backbone.build("vit_tiny", patch_size=16, image_size=64, depth=12, position_interpolation=interpolation)
    weights.save(small, str(tmp_path / "tiny.pth"))
    embedder = load_embedder(EmbedderConfig(name="vit_tiny_patch16", weights=str(tmp_path / "tiny.pth"), image_size=96))
    assert embedder.network.network.position_interpolation == interpolation  # type: ignore[attr-defined]


def test_an_unknown_interpolation_in_a_file_is_named(tmp_path: Path) -> None:
    state = build().state_dict()
    state._metadata = {"": {"position_interpolation": "nearest"}}  # type: ignore[attr-defined]
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"states position_interpolation 'nearest'; known are offset, plain"):
        weights.read(str(tmp_path / "other.pth"))


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def images(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size))


def test_the_released_file_loads_strictly_as_torch_hub_does(exported: Path, teacher: nn.ModuleDict) -> None:
    state = torch.load(exported / "teacher.pth", weights_only=True)
    assert_equal(state, teacher["backbone"].state_dict())
    build().load_state_dict(state, strict=True)
    loaded = build()
    assert weights.load(loaded, str(exported / "teacher.pth")) == ()
    assert torch.equal(loaded(images(56)), model_of(teacher)(images(56)))


@pytest.mark.parametrize("size", [56, 98])
def test_transformers_computes_the_same(size: int, exported: Path, teacher: nn.ModuleDict) -> None:
    library_model, report = AutoModel.from_pretrained(exported / "hf", output_loading_info=True)
    assert not any(report.values()), report
    with torch.inference_mode():
        tokens = library_model.eval()(images(size)).last_hidden_state
        features = model_of(teacher).forward_features(images(size))
    expected = torch.cat(
        [features["x_norm_clstoken"][:, None], features["x_norm_regtokens"], features["x_norm_patchtokens"]], dim=1
    )
    assert (tokens - expected).abs().max() < 1e-5 * expected.abs().max()


def test_timm_files_have_timm_names_and_can_be_read_back(exported: Path, teacher: nn.ModuleDict) -> None:
    state = load_file(exported / "timm" / "model.safetensors")
    assert {"reg_token", "cls_token", "pos_embed", "blocks.1.mlp.fc1.weight"} <= state.keys()
    assert not {"mask_token", "register_tokens"} & state.keys()
    loaded = build()
    weights.load(loaded, str(exported / "timm" / "model.safetensors"))
    torch.testing.assert_close(loaded(images(56)), model_of(teacher)(images(56)))


def test_exported_heads_can_be_read_back(exported: Path, teacher: nn.ModuleDict) -> None:
    read = export.read_heads(str(exported / "heads.pth"), head_tensors(trained(3)))
    assert_equal(read, head_tensors(teacher))
    assert read["dino_head.last_layer.weight_g"].shape == (7, 1)
    fresh = trained(3)
    fresh.load_state_dict(fresh["backbone"].state_dict(prefix="backbone.") | read, strict=True)
    tokens = torch.ones(2, 192)
    assert torch.equal(fresh["ibot_head"](tokens)[0], teacher["ibot_head"](tokens)[0])


def test_a_distillation_run_exports_the_ema(teacher: nn.ModuleDict, tmp_path: Path) -> None:
    average = trained(4)
    path = save(tmp_path / "checkpoints", teacher=teacher, average=average)
    export.export_checkpoint(path, str(tmp_path / "out"), ["released"])
    assert_equal(torch.load(tmp_path / "out" / "teacher.pth", weights_only=True), average["backbone"].state_dict())
    assert_equal(export.read_heads(str(tmp_path / "out" / "heads.pth")), head_tensors(average))


def test_heads_of_dinov2s_trainer_are_read(teacher: nn.ModuleDict, tmp_path: Path) -> None:
    torch.save({"teacher": teacher.state_dict()}, tmp_path / "teacher_checkpoint.pth")
    assert_equal(export.read_heads(str(tmp_path / "teacher_checkpoint.pth")), head_tensors(teacher))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: without(state, "dino_head.mlp.2.bias"), r"dino_head lacks mlp\.2\.bias"),
        (lambda state: {k: v for k, v in state.items() if k.startswith("ibot")}, r"dino_head lacks mlp\.0\.weight"),
        (lambda state: state | {"dino_head.mlp.6.weight": torch.ones(2)}, r"dino_head\.mlp\.6\.weight is no part"),
        (lambda state: state | {"ibot_head.last_layer.weight_g": torch.ones(6, 1)}, "ibot_head has layers that do not"),
        (lambda state: state | {"dino_head.mlp.2.weight": torch.ones(6, 5)}, "dino_head has layers that do not"),
        (
            lambda state: state | {"ibot_head.mlp.0.bias": torch.ones(6, 1)},
            "ibot_head has shapes that no linear layers have",
        ),
        (lambda state: state | {"step": 3}, "something else than named tensors"),
        (lambda state: [1, 2], "something else than named tensors"),
    ],
)
def test_wrong_heads_are_named(change: Any, message: str, teacher: nn.ModuleDict, tmp_path: Path) -> None:
    path = tmp_path / "heads.pth"
    torch.save(change(head_tensors(teacher)), path)
    with pytest.raises(WeightsError, match=message):
        export.read_heads(str(path))


def test_heads_of_other_shapes_are_named(exported: Path) -> None:
    expected = head_tensors(trained(3)) | {"dino_head.last_layer.weight_v": torch.empty(9, 5)}
    message = r"dino_head\.last_layer\.weight_v: expected \(9, 5\), found \(7, 5\)"
    with pytest.raises(WeightsError, match=message):
        export.read_heads(str(exported / "heads.pth"), expected)
    shared = {name: value for name, value in expected.items() if not name.startswith("ibot")}
    with pytest.raises(WeightsError, match=r"ibot_head\.mlp\.0\.weight: expected None"):
        export.read_heads(str(exported / "heads.pth"), shared)


def test_files_without_heads_are_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="No heads at"):
        export.read_heads(str(tmp_path / "heads.pth"))
    (tmp_path / "heads.pth").write_bytes(b"PK not a zip")
    with pytest.raises(WeightsError, match="cannot be read as heads"):
        export.read_heads(str(tmp_path / "heads.pth"))


def test_a_config_with_missing_keys_is_named(teacher: nn.ModuleDict, tmp_path: Path) -> None:
    config = {"model": {"backbone": without(BACKBONE, "patch_size")}}
    path = save(tmp_path, config=config, teacher=teacher)
    with pytest.raises(InputError, match=r"lacks model\.backbone\.patch_size"):
        export.export_checkpoint(path, str(tmp_path / "out"))


def test_a_config_of_another_model_is_named(teacher: nn.ModuleDict, tmp_path: Path) -> None:
    path = save(tmp_path, config={"model": {"backbone": BACKBONE | {"num_register_tokens": 0}}}, teacher=teacher)
    with pytest.raises(WeightsError, match="1 unexpected: register_tokens"):
        export.export_checkpoint(path, str(tmp_path / "out"))


def test_a_checkpoint_without_a_teacher_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, student=trained(2))
    with pytest.raises(InputError, match="it holds student, and neither of average, teacher"):
        export.export_checkpoint(path, str(tmp_path / "out"))


def test_a_checkpoint_is_found_in_the_folder_of_its_run(teacher: nn.ModuleDict, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No checkpoint at"):
        export.find_checkpoint(str(tmp_path))
    path = save(tmp_path / "checkpoints", teacher=teacher)
    for folder in (tmp_path, tmp_path / "checkpoints", path):
        assert export.find_checkpoint(str(folder)) == path


def test_unknown_layouts_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown mae"):
        export.command_line("run", "out", "released,mae")


def test_the_command(teacher: nn.ModuleDict, tmp_path: Path) -> None:
    save(tmp_path / "checkpoints", teacher=teacher)
    command = [
        sys.executable,
        "-m",
        "training.export",
        "--checkpoint",
        str(tmp_path),
        "--output",
        str(tmp_path / "out"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["heads.pth", "hf", "teacher.pth"]
    result = subprocess.run([*command[:-3], str(tmp_path / "none"), *command[-2:]], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: No checkpoint at")
