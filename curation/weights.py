"""Checkpoints in: whatever layout the file has, every key fits or nothing loads.

Known layouts, told apart by their keys:

    released     cls_token, pos_embed, blocks.0.norm1.weight, ...          DINOv2's .pth files; .safetensors alike
    training     {"teacher": {"backbone.cls_token": ..., "dino_head...": ...}}   heads are left aside
    chunked      blocks.0.3.norm1.weight                                   a training layout: chunk, then block

Files are read with `torch.load(weights_only=True)` or safetensors, so a checkpoint can carry no code.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypeGuard

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from curation.errors import WeightsError

MAX_LISTED = 10  # assumed: as many keys as a person reads
HEAD_PREFIXES = ("dino_head.", "ibot_head.")
STEP_COUNTER = ".num_batches_tracked"
CHUNKED_BLOCK = re.compile(r"^blocks\.\d+\.(\d+)\.")


def load(backbone: nn.Module, path: str, *, sha256: str | None = None) -> None:
    """Fill a Vision Transformer with the weights in the local file `path`, in any of the layouts above.

    sha256: hash in hex that the file must have. Raises WeightsError, and then `backbone` is unchanged.
    """
    _fill(backbone, _released_layout(_read(path, sha256), path), path)


def load_exactly(module: nn.Module, path: str, *, sha256: str | None = None) -> None:
    """Fill `module` from a local file whose keys are the module's own. Otherwise as `load`."""
    _fill(module, _tensors(_read(path, sha256), path), path)


def _read(path: str, sha256: str | None) -> Mapping[str, object]:
    """What the file holds, on the CPU."""
    file = Path(path)
    if not file.is_file():
        raise WeightsError(f"No weights at '{path}'. Give the path of a local .pth, .pt or .safetensors file.")
    if sha256 is not None:
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != sha256.lower():
            raise WeightsError(f"{path}: SHA-256 is {found}, expected {sha256}. It is another file, or it is damaged.")
    try:
        # Both readers raise whatever the broken byte happens to cause, so every failure here is the file's.
        content = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise WeightsError(
            f"{path}: cannot be read as weights ({reason}). The file is damaged or incomplete, or it holds more than "
            "tensors: fetch it again, or save only its state_dict."
        ) from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, not a state_dict. Save model.state_dict().")
    return content


def _released_layout(content: Mapping[str, object], path: str) -> dict[str, Tensor]:
    """The tensors of any known layout under the keys of the released one."""
    teacher = content.get("teacher", content)
    if not isinstance(teacher, Mapping):
        raise WeightsError(f"{path}: its 'teacher' is a {type(teacher).__name__}, not a state_dict.")
    renamed: dict[str, Tensor] = {}
    for name, tensor in _tensors(teacher, path).items():
        name = name.removeprefix("module.")
        if name.startswith(HEAD_PREFIXES):
            continue
        name = CHUNKED_BLOCK.sub(r"blocks.\1.", name.removeprefix("backbone."))
        if name in renamed:
            raise WeightsError(f"{path}: two tensors are called '{name}' once prefixes are taken off.")
        renamed[name] = tensor
    return renamed


def _tensors(content: Mapping[str, object], path: str) -> dict[str, Tensor]:
    """`content`, all of which must be tensors, less the counters of batch norms, which only training reads."""
    if strangers := [f"{name} ({type(value).__name__})" for name, value in content.items() if not _is_tensor(value)]:
        raise WeightsError(
            f"{path}: {len(strangers)} of its {len(content)} entries are no tensors: {_some(strangers)}. Expected a "
            "state_dict, or a checkpoint with one under 'teacher'."
        )
    return {name: value for name, value in content.items() if _is_tensor(value) and not name.endswith(STEP_COUNTER)}


def _fill(module: nn.Module, tensors: Mapping[str, Tensor], path: str) -> None:
    """Copy `tensors` into `module`, which must have exactly their names and shapes."""
    expected = {name: value for name, value in module.state_dict().items() if not name.endswith(STEP_COUNTER)}
    misshapen = [
        f"{name} (expected {tuple(expected[name].shape)}, found {tuple(tensors[name].shape)})"
        for name in expected
        if name in tensors and expected[name].shape != tensors[name].shape
    ]
    problems = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in tensors if name not in expected],
        "of another shape": misshapen,
    }
    if any(problems.values()):
        lines = [f"  {len(names)} {kind}: {_some(names)}" for kind, names in problems.items() if names]
        raise WeightsError(
            f"{path}: the weights do not fit the model ({len(expected)} keys expected, {len(tensors)} found):\n"
            + "\n".join(lines)
            + "\nCheck the name of the model and its options, such as patch size, image size and register tokens."
        )
    module.load_state_dict(dict(tensors), strict=False)  # all that is missing by now are step counters


def _is_tensor(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor)


def _some(names: list[str]) -> str:
    return ", ".join(names[:MAX_LISTED]) + (", ..." if len(names) > MAX_LISTED else "")
