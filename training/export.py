"""Exports of a run's checkpoints for other programs: whole tensors, without ranks, optimizer or pickled code.

    <output>/
      teacher.pth     the backbone under the released keys
      heads.pth       its projection heads, for further training
      hf/             the backbone as a folder for transformers
      timm/           the backbone for timm, as model.safetensors

A distillation run exports the EMA of its student instead of the teacher. docs/weights.md lists the information that
each layout loses. The command reads a checkpoint of any number of ranks in one process.

    heads.pth holds, for each <head> (dino_head, and ibot_head where it is untied)
        <head>.mlp.{0,2,4}.{weight,bias}    three linear layers, down to d
        <head>.last_layer.weight_g          (K, 1)    lengths of the K prototypes
        <head>.last_layer.weight_v          (K, d)    their directions
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Annotated, Any, cast

import torch
import typer
from torch import Tensor

from curation import backbone, weights
from curation.backbone import VisionTransformer
from curation.engine import command
from curation.errors import ConfigError, InputError, WeightsError
from curation.files import paths
from training import checkpoint

ExportLayout = weights.SavedLayout
LAYOUTS: tuple[ExportLayout, ...] = ("released", "transformers", "timm")
DEFAULT_LAYOUTS: tuple[ExportLayout, ...] = ("released", "transformers")
FILES: dict[ExportLayout, str] = {
    "released": "teacher.pth",
    "transformers": "hf",
    "timm": "timm/model.safetensors",
}
HEADS_FILE = "heads.pth"
# The part of a checkpoint to export: the first of these that it has.
EXPORTED = ("average", "teacher")
# Keys of [model.backbone] in a run's config that describe the backbone. Optional ones are None if absent.
REQUIRED = ("name", "patch_size", "image_size", "num_register_tokens", "position_interpolation", "layer_scale")
OPTIONAL = ("feed_forward", "depth")

_HEAD_KEY = re.compile(r"(dino|ibot)_head\.(mlp\.[024]\.(weight|bias)|last_layer\.weight_[gv])")
_HEAD_KEYS = tuple(
    [f"mlp.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")]
    + ["last_layer.weight_g", "last_layer.weight_v"]
)


def export(
    model: VisionTransformer,
    heads: Mapping[str, Tensor],
    output: str,
    layouts: Sequence[ExportLayout] = DEFAULT_LAYOUTS,
) -> list[str]:
    """Write a backbone and its heads, of whole tensors, to the folder `output`. Gives the paths.

    heads: as in `heads.pth`. Raises WeightsError if a layout cannot hold the backbone.
    """
    files = []
    for layout in layouts:
        files.append(paths.join(output, FILES[layout]))
        weights.save(model, files[-1], layout)
    _require_heads(heads, "the heads to export")
    files.append(paths.join(output, HEADS_FILE))
    with paths.atomic_write(files[-1]) as file:
        whole = {name: value.detach().cpu().contiguous() for name, value in heads.items()}
        torch.save(whole, cast(IO[bytes], file))  # it calls only `write`
    return files


def export_checkpoint(path: str, output: str, layouts: Sequence[ExportLayout] = DEFAULT_LAYOUTS) -> list[str]:
    """Write the trained backbone and heads of the checkpoint at `path` to the folder `output`. Gives the paths.

    Raises InputError, WeightsError.
    """
    record = checkpoint.read_record(path)
    parts = {name.partition(".")[0] for name in record.tensors}
    part = next((part for part in EXPORTED if part in parts), None)
    if part is None:
        raise InputError(f"{path}: it holds {', '.join(sorted(parts))}, and neither of {', '.join(EXPORTED)}.")
    tensors = checkpoint.load_tensors(path, f"{part}.")
    model = _build(record.config, path)
    state = {name.removeprefix("backbone."): value for name, value in tensors.items() if name.startswith("backbone.")}
    weights.fill(model, weights.Checkpoint(f"{path} ({part})", "released", state, (), None))
    heads = {name: value for name, value in tensors.items() if _HEAD_KEY.fullmatch(name)}
    return export(model, heads, output, layouts)


def read_heads(path: str, expected: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The heads in the `heads.pth` at `path`, or in a checkpoint that DINOv2's trainer exported, on the CPU.

    expected: tensors whose names and shapes the heads must have. Raises WeightsError.
    """
    content: object
    try:
        weights.check_kind(Path(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WeightsError(f"No heads at '{path}'. Give the path of a {HEADS_FILE}.") from None
    except WeightsError:
        raise
    except Exception as error:  # torch raises many kinds of errors for other files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"{path}: cannot be read as heads ({reason}). The file is damaged or incomplete.") from error
    if isinstance(content, Mapping) and isinstance(content.get("teacher"), Mapping):
        content = {name: value for name, value in content["teacher"].items() if not name.startswith("backbone.")}
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise WeightsError(f"{path}: holds something else than named tensors. Give a {HEADS_FILE} of an export.")
    heads = {name: cast(Tensor, value) for name, value in content.items()}
    _require_heads(heads, path)
    weights.require_finite(heads, path)
    if expected is not None:
        _require_equal_shapes(heads, expected, path)
    return heads


def _build(config: Mapping[str, Any], path: str) -> VisionTransformer:
    """The backbone that the config of a checkpoint describes, without weights."""
    section: Mapping[str, Any] = config.get("model", {}).get("backbone", {})
    if absent := [key for key in REQUIRED if key not in section]:
        raise InputError(f"{path}: its config lacks {', '.join(f'model.backbone.{key}' for key in absent)}.")
    options: dict[str, Any] = {key: section[key] for key in REQUIRED} | {key: section.get(key) for key in OPTIONAL}
    options["layer_scale"] = options["layer_scale"] or None
    return backbone.build(**options, seed=None)


def _require_heads(heads: Mapping[str, Tensor], origin: str) -> None:
    """Raises WeightsError unless these are one or two complete heads whose layers fit each other."""
    problems = [f"{name} is no part of a head" for name in heads if not _HEAD_KEY.fullmatch(name)]
    kinds = {name.partition(".")[0] for name in heads} & {"dino_head", "ibot_head"}
    for kind in sorted({"dino_head"} | kinds):
        if absent := [key for key in _HEAD_KEYS if f"{kind}.{key}" not in heads]:
            problems.append(f"{kind} lacks {', '.join(absent)}")
            continue
        shapes = {key: tuple(heads[f"{kind}.{key}"].shape) for key in _HEAD_KEYS}
        if any(len(shapes[key]) != (1 if key.endswith("bias") else 2) for key in _HEAD_KEYS):
            problems.append(f"{kind} has shapes that no linear layers have: {shapes}")
            continue
        hidden, middle, bottleneck = (shapes[f"mlp.{layer}.weight"] for layer in (0, 2, 4))
        num_prototypes, directions = shapes["last_layer.weight_v"]
        fits = (
            middle[1] == hidden[0]
            and bottleneck[1] == middle[0]
            and directions == bottleneck[0]
            and shapes["last_layer.weight_g"] == (num_prototypes, 1)
            and all(shapes[f"mlp.{layer}.bias"] == shapes[f"mlp.{layer}.weight"][:1] for layer in (0, 2, 4))
        )
        if not fits:
            problems.append(f"{kind} has layers that do not fit each other: {shapes}")
    if problems:
        raise WeightsError(f"{origin}: not the heads of a run:\n" + "\n".join(f"  {line}" for line in problems))


def _require_equal_shapes(heads: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: str) -> None:
    shapes, expected_shapes = ({name: tuple(value.shape) for name, value in side.items()} for side in (heads, expected))
    names = sorted(shapes.keys() | expected_shapes.keys())
    differing = [name for name in names if shapes.get(name) != expected_shapes.get(name)]
    if differing:
        lines = [f"  {name}: expected {expected_shapes.get(name)}, found {shapes.get(name)}" for name in differing]
        raise WeightsError(
            f"{path}: its heads do not fit this run (None: absent):\n" + "\n".join(lines) + "\n"
            "Set the numbers of prototypes, the widths, and tied or untied heads as they were trained."
        )


def folder(output: str, step: int) -> str:
    """The folder of an export: of the run in `output`, after `step` steps."""
    return paths.join(output, "export", f"{checkpoint.PREFIX}{step:07d}")


def find_checkpoint(path: str) -> str:
    """The checkpoint at `path`, or the last checkpoint of the run at `path`. Raises InputError."""
    if paths.exists(paths.join(path, checkpoint.RECORD_NAME)):
        return path
    for checkpoints in (paths.join(path, "checkpoints"), path):
        if (latest := checkpoint.latest(checkpoints)) is not None:
            return latest
    raise InputError(f"No checkpoint at '{path}'. Give the folder of a run, or a '{checkpoint.PREFIX}...' in it.")


def command_line(
    checkpoint_path: Annotated[str, typer.Option("--checkpoint", help="Folder of a run, or of one checkpoint.")],
    output: command.OutputOption,
    layouts: Annotated[str, typer.Option("--layouts", help="Comma-separated: " + ", ".join(LAYOUTS) + ".")] = ",".join(
        DEFAULT_LAYOUTS
    ),
) -> None:
    """Write the trained backbone and its heads in files for other programs."""
    names = [name.strip() for name in layouts.split(",")]
    if unknown := [name for name in names if name not in LAYOUTS]:
        raise ConfigError(f"--layouts: unknown {', '.join(unknown)}. Choose from: {', '.join(LAYOUTS)}.")
    chosen = [layout for layout in LAYOUTS if layout in names]
    path = find_checkpoint(checkpoint_path)
    paths.require_apart(output, [checkpoint_path, path])
    for written in export_checkpoint(path, output, chosen):
        print(written)


if __name__ == "__main__":
    from training import export as module  # by its real name, or its classes would exist twice

    command.main(module.command_line)
