"""Checkpoints of the Vision Transformer, read and written in several layouts: every key fits, or nothing is loaded.

The layouts, recognised by their keys, and the only parts of each that may be left aside:

    released      cls_token, pos_embed, mask_token, blocks.0.norm1.weight    DINOv2's .pth files; .safetensors alike
    training      {"teacher": {"backbone.cls_token", "dino_head..."}}        without the heads; with or without chunks
                                                                             of blocks: blocks.0.3.norm1.weight
    timm          reg_token, fc1 and fc2 also for SwiGLU, no mask_token      also MAE's own encoder files
    mae           {"model": {..., "decoder_embed.weight": ...}}              without the decoder
    ijepa         {"encoder", "predictor", "target_encoder", ...}            only the target encoder
    transformers  a folder of config.json and model.safetensors              Dinov2, Dinov2WithRegisters, IJepa, ViTMAE

`read` gives any of them under the released keys; `save` writes three of them. docs/weights.md lists the losses of each.
Files are read with `torch.load(weights_only=True)` or safetensors, so a checkpoint cannot run code.

A file that `save` writes states the interpolation of its positional embedding: a .pth in the metadata of its
state_dict (where torch keeps versions of modules), a .safetensors in its header. The hash of the file covers it.
"""

import json
import math
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, TypeGuard, TypeVar, cast, get_args

import safetensors.torch
import torch
from torch import Tensor, nn

from curation.backbone import NORM_EPSILON, FeedForward, Name, PositionInterpolation, VisionTransformer, build
from curation.errors import WeightsError
from curation.files import paths
from curation.files.hashes import sha256_of_files

Layout = Literal["released", "training", "timm", "mae", "ijepa", "transformers"]
SavedLayout = Literal["released", "timm", "transformers"]
Family = Literal["dinov2", "vit"]

MAX_LISTED = 10  # keys in a message; assumed: a person reads no more
STEP_COUNTER = ".num_batches_tracked"
INTERPOLATION_KEY = "position_interpolation"  # in the metadata of a file
CHUNKED_BLOCK = re.compile(r"^blocks\.\d+\.(\d+)\.")

# For a file that wraps its state_dict: the key of the state_dict, and the other keys that may occur. Cited: DINOv2
# train/train.py, DINO main_dino.py, I-JEPA src/train.py, MAE util/misc.py.
WRAPPERS: dict[str, frozenset[str]] = {
    "teacher": frozenset({"student", "optimizer", "scheduler", "iteration", "epoch"}),
    "target_encoder": frozenset(
        {"encoder", "predictor", "opt", "scaler", "epoch", "loss", "batch_size", "world_size", "lr"}
    ),
    "model": frozenset({"optimizer", "epoch", "scaler"}),
}
# Tensors that do not belong to a backbone; for transformers see FOLDERS. Cited: the same files, and timm's.
_HEADS = re.compile(r"(dino|ibot)_head\..+")
LEFT_ASIDE: dict[str, re.Pattern[str]] = {
    "released": _HEADS,
    "training": _HEADS,
    "timm": re.compile(r"head\.(weight|bias)"),
    "mae": re.compile(r"decoder_.+|mask_token"),  # MAE's mask token enters the decoder and has its width
    "ijepa": re.compile(r"(?!)"),  # nothing
}

# transformers' names and those of the released layout, without `.weight` and `.bias`; the tensors of several names are
# stacked by rows. Cited: transformers 5.23, the modeling files for `current` (the names of its modules), and
# conversion_mapping.py for `published` (the names in files).
STEM = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
}
_PUBLISHED_ATTENTION = {
    "attn.qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "attn.proj": ("attention.output.dense",),
}
_CURRENT_ATTENTION = {
    "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "attn.proj": ("attention.o_proj",),
}
_DINOV2 = {
    "norm1": ("norm1",),
    "norm2": ("norm2",),
    "ls1.gamma": ("layer_scale1.lambda1",),
    "ls2.gamma": ("layer_scale2.lambda1",),
    "mlp.fc1": ("mlp.fc1",),
    "mlp.fc2": ("mlp.fc2",),
}
_VIT = {"norm1": ("layernorm_before",), "norm2": ("layernorm_after",)}
BLOCK: dict[tuple[Family, Literal["published", "current"]], dict[str, tuple[str, ...]]] = {
    ("dinov2", "published"): {
        **_DINOV2,
        **_PUBLISHED_ATTENTION,
        "mlp.w12": ("mlp.weights_in",),
        "mlp.w3": ("mlp.weights_out",),
    },
    ("dinov2", "current"): {
        **_DINOV2,
        **_CURRENT_ATTENTION,
        "mlp.w12": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.w3": ("mlp.down_proj",),
    },
    ("vit", "published"): {
        **_VIT,
        **_PUBLISHED_ATTENTION,
        "mlp.fc1": ("intermediate.dense",),
        "mlp.fc2": ("output.dense",),
    },
    ("vit", "current"): {**_VIT, **_CURRENT_ATTENTION, "mlp.fc1": ("mlp.fc1",), "mlp.fc2": ("mlp.fc2",)},
}


@dataclass(frozen=True)
class FolderKind:
    """The properties of one model_type of config.json."""

    model: str
    """The class of the backbone without a head."""
    prefix: str
    """Prefix of the backbone's keys in a class with a head."""
    left_aside: re.Pattern[str]
    norm_epsilons: tuple[float, ...]
    """Values that config.json may state."""


# MAE was trained with an epsilon of 1e-6 (cited: its models_mae.py), although transformers' default is 1e-12. So was
# I-JEPA. This module computes with 1e-6.
_CLASSIFIER = re.compile(r"classifier\..+")
FOLDERS = {
    "dinov2": FolderKind("Dinov2Model", "dinov2.", _CLASSIFIER, (1e-6,)),
    "dinov2_with_registers": FolderKind("Dinov2WithRegistersModel", "dinov2_with_registers.", _CLASSIFIER, (1e-6,)),
    "ijepa": FolderKind("IJepaModel", "ijepa.", re.compile(r"(classifier|pooler)\..+"), (1e-6, 1e-12)),
    "vit_mae": FolderKind("ViTMAEModel", "vit.", re.compile(r"decoder\..+"), (1e-6, 1e-12)),
}
TRANSFORMERS_BLOCK = re.compile(r"(?:encoder\.layer|layers)\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Architecture:
    """The properties of a backbone that follow from its tensors' shapes. They do not give the number of heads."""

    embed_dim: int
    depth: int
    patch_size: int
    grid_size: int
    """Side of the square grid of patches of the positional embedding."""
    in_channels: int
    num_register_tokens: int
    has_cls_token: bool
    has_layer_scale: bool
    feed_forward: FeedForward


@dataclass(frozen=True)
class Checkpoint:
    """The content of a file or folder; `read` creates it."""

    path: str
    layout: Layout
    tensors: Mapping[str, Tensor]
    """Under the keys of the released layout, with the types of the file."""
    left_aside: tuple[str, ...]
    """Names in the file that do not belong to the backbone."""
    num_heads: int | None
    """Heads of the attention; only transformers' config.json states them."""
    position_interpolation: PositionInterpolation | None = None
    """As the network was trained; only files of `save` state it. None for all others."""


def read(path: str, *, sha256: str | None = None) -> Checkpoint:
    """The content of the local file or transformers folder at `path`, in any of the layouts above.

    sha256: hash in hex that the file must have; for a folder, that of its weight files one after another, by name.
    The mask token of a layout without one is zero, as DINOv2's is before training. Raises WeightsError.
    """
    if Path(path).is_dir():
        return _read_folder(Path(path), sha256)
    content = _read_file(path, sha256)
    interpolation = _stated_interpolation(Path(path), content)
    wrapper = next((key for key in WRAPPERS if key in content), None)
    beside: list[str] = []
    layout: Layout
    if wrapper is not None:
        state = content[wrapper]
        if not isinstance(state, Mapping):
            raise WeightsError(f"{path}: its '{wrapper}' is a {type(state).__name__}, not a state_dict.")
        beside = sorted(str(key) for key in content if key != wrapper)
        if unknown := [key for key in beside if key not in WRAPPERS[wrapper]]:
            raise WeightsError(
                f"{path}: beside '{wrapper}' it holds {_some(unknown)}, which no known layout has. Save only the "
                "state_dict of the backbone."
            )
        content = state
    tensors = _renamed(_tensors(content, path), _without_prefixes, path)
    match wrapper:
        case "teacher":
            layout = "training"
        case "target_encoder":
            layout = "ijepa"
        case _:
            layout = _layout_of(tensors, path)
    aside = [name for name in tensors if LEFT_ASIDE[layout].fullmatch(name)]
    kept = {name: value for name, value in tensors.items() if name not in aside}
    if layout in ("timm", "mae", "ijepa"):
        kept = _from_timm(kept)
    return Checkpoint(path, layout, kept, (*beside, *aside), None, interpolation)


def load(backbone: VisionTransformer, path: str, *, sha256: str | None = None) -> tuple[str, ...]:
    """Fills a Vision Transformer with the weights at `path`, as `read` gives them; returns the names left aside.

    Raises WeightsError and then leaves `backbone` unchanged.
    """
    checkpoint = read(path, sha256=sha256)
    fill(backbone, checkpoint)
    return checkpoint.left_aside


def fill(backbone: VisionTransformer, checkpoint: Checkpoint) -> None:
    """Copies a checkpoint into a Vision Transformer. Raises WeightsError and then leaves `backbone` unchanged."""
    if checkpoint.num_heads not in (None, backbone.num_heads):
        raise WeightsError(
            f"{checkpoint.path}: config.json says {checkpoint.num_heads} heads of attention, and the model has "
            f"{backbone.num_heads}. Check the name of the model."
        )
    _fill(backbone, checkpoint.tensors, checkpoint.path)


def load_exactly(module: nn.Module, path: str, *, sha256: str | None = None) -> None:
    """Fills `module` from a local file that has the module's own keys. Otherwise as `load`."""
    _fill(module, _tensors(_read_file(path, sha256), path), path)


ModuleType = TypeVar("ModuleType", bound=nn.Module)


def load_module(kind: type[ModuleType], path: str, *, sha256: str | None = None) -> ModuleType:
    """A new `kind()`, filled as by `load_exactly`. Its initialisation is skipped, since every value is overwritten."""
    with torch.device("meta"):
        module = kind()
    module.to_empty(device="cpu")
    load_exactly(module, path, sha256=sha256)
    return module


def architecture(tensors: Mapping[str, Tensor], origin: str) -> Architecture:
    """The architecture of the backbone that the tensors fit, by their shapes. `origin` names them in a WeightsError."""
    absent = [name for name in ("patch_embed.proj.weight", "pos_embed") if name not in tensors]
    if absent:
        raise WeightsError(
            f"{origin}: these are not the weights of a Vision Transformer: no {' and no '.join(absent)} among "
            f"{_some(list(tensors))}."
        )
    projection, positions = tensors["patch_embed.proj.weight"].shape, tensors["pos_embed"].shape
    has_cls_token = "cls_token" in tensors
    grid_size = math.isqrt(max(positions[1] - has_cls_token, 0)) if len(positions) == 3 else 0
    if len(projection) != 4 or grid_size == 0 or grid_size**2 != positions[1] - has_cls_token:
        raise WeightsError(
            f"{origin}: patch_embed.proj.weight has the shape {tuple(projection)} and pos_embed {tuple(positions)}; "
            f"expected (D, C, P, P) and (1, {'1 + ' if has_cls_token else ''}M * M, D)."
        )
    registers = tensors.get("register_tokens")
    blocks = {int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))}
    return Architecture(
        embed_dim=projection[0],
        depth=len(blocks),
        patch_size=projection[2],
        grid_size=grid_size,
        in_channels=projection[1],
        num_register_tokens=registers.shape[1] if registers is not None and registers.ndim == 3 else 0,
        has_cls_token=has_cls_token,
        has_layer_scale=any(name.endswith(".ls1.gamma") for name in tensors),
        feed_forward="swiglu" if any(".mlp.w12." in name for name in tensors) else "mlp",
    )


def build_like(
    architecture: Architecture,
    name: Name,
    *,
    layer_scale: float = 1.0,
    position_interpolation: PositionInterpolation = "offset",
    seed: int | None = None,
) -> VisionTransformer:
    """A Vision Transformer into which the tensors of `architecture` fit; `name` gives the number of heads.

    The other arguments are those of `curation.backbone.build`; an architecture without LayerScale leaves it out.
    """
    return build(
        name,
        patch_size=architecture.patch_size,
        image_size=architecture.grid_size * architecture.patch_size,
        num_register_tokens=architecture.num_register_tokens,
        cls_token=architecture.has_cls_token,
        in_channels=architecture.in_channels,
        feed_forward=architecture.feed_forward,
        layer_scale=layer_scale if architecture.has_layer_scale else None,
        position_interpolation=position_interpolation,
        depth=architecture.depth,
        seed=seed,
    )


def save(backbone: VisionTransformer, path: str, layout: SavedLayout = "released") -> None:
    """Writes the weights of a Vision Transformer for other libraries and for `load`.

    released       a .pth or .safetensors file; nothing is lost
    timm           a .safetensors file; loses the mask token, and with registers the CLS token's own position
    transformers   a folder with config.json and model.safetensors; IJepa and ViTMAE lose the mask token

    The model determines the class of transformers. Raises WeightsError where no class fits, or where the path does not
    fit the layout.
    """
    state = OrderedDict((name, value.detach().cpu().contiguous()) for name, value in backbone.state_dict().items())
    suffix, stated = Path(path).suffix, {INTERPOLATION_KEY: backbone.position_interpolation}
    if layout not in get_args(SavedLayout):
        raise WeightsError(f"No layout to save is called {layout!r}. Choose from: {', '.join(get_args(SavedLayout))}.")
    if layout == "transformers":
        if Path(path).is_file():
            raise WeightsError(f"'{path}' is a file, and transformers keeps a model in a folder. Name another path.")
        config, tensors = _to_transformers(state, backbone.num_heads)
        _save_safetensors(tensors, paths.join(path, "model.safetensors"), stated)
        paths.write_bytes(paths.join(path, "config.json"), json.dumps(config, indent=2, sort_keys=True).encode())
    elif suffix == ".safetensors":
        _save_safetensors(_to_timm(state) if layout == "timm" else state, path, stated)
    elif suffix == ".pth" and layout == "released":
        cast(Any, state)._metadata = {"": dict(stated)}  # for the root module; other loaders pass it over
        with paths.atomic_write(path) as file:
            torch.save(state, cast(IO[bytes], file))  # torch only calls `write`
    else:
        kinds = ".safetensors" if layout == "timm" else ".pth or .safetensors"
        raise WeightsError(f"'{path}': the layout '{layout}' is written to a file that ends in {kinds}.")


# --- reading files ------------------------------------------------------------------------------------------------


def _read_file(path: str, sha256: str | None) -> Mapping[str, object]:
    """The content of the file, on the CPU."""
    file = Path(path)
    _require_file(file)
    _check_hash([file], sha256, path)
    check_kind(file)
    try:
        # A damaged byte can cause any exception in both readers, so every exception here is an error of the file.
        if file.suffix == ".safetensors":
            content = safetensors.torch.load_file(file)
        else:
            content = torch.load(file, "cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise WeightsError(
            f"{path}: cannot be read as weights ({reason}). The file is damaged or incomplete, or it holds more than "
            "tensors: fetch it again, or save only its state_dict."
        ) from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, not a state_dict. Save model.state_dict().")
    return content


def check_kind(file: Path) -> None:
    """Raise WeightsError for a file that is no checkpoint, and for one that would take more memory than its size.

    torch.save compresses nothing. A compressed archive, or one whose entries lie over each other, may unpack to a
    thousand times its size.
    """
    with file.open("rb") as opened:
        start = opened.read(512).lstrip()
    if start.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{file}: a pointer of git-lfs, not the weights themselves. Fetch them with: git lfs pull")
    if start[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise WeightsError(
            f"{file}: a web page or an XML message, not weights: the download failed. Open the file to read its cause, "
            "and fetch the weights again."
        )
    if not zipfile.is_zipfile(file):
        return
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except zipfile.BadZipFile:
        return  # the reader names the damage
    compressed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if compressed:
        raise WeightsError(
            f"{file}: its entry '{compressed[0]}' is compressed, as in a TorchScript archive. A state_dict that "
            "torch.save wrote has no such entry: load the model where it comes from, and save its state_dict."
        )
    if (unpacked := sum(entry.file_size for entry in entries)) > (size := file.stat().st_size):
        raise WeightsError(f"{file}: its entries have {unpacked:,} bytes and the file only {size:,}: it is damaged.")


def sha256_of(path: str) -> str:
    """The SHA-256 that `read` and `load_exactly` expect as `sha256` for the file or folder at `path`.

    Raises WeightsError where there are no weights.
    """
    given = Path(path)
    if given.is_dir():
        return sha256_of_files(map(str, _weight_files(given)[0]))
    _require_file(given)
    return sha256_of_files([path])


def _require_file(file: Path) -> None:
    if not file.is_file():
        raise WeightsError(
            f"No weights at '{file}'. Give the path of a local .pth, .pt or .safetensors file, or of a folder of "
            "transformers."
        )


def _stated_interpolation(file: Path, content: Mapping[str, object]) -> PositionInterpolation | None:
    """The interpolation that the metadata of a file states. `content`: of the file, as read."""
    if file.suffix == ".safetensors":
        with safetensors.safe_open(file, "pt") as opened:
            metadata: object = opened.metadata()
    else:
        of_modules = getattr(content, "_metadata", None)
        metadata = of_modules.get("") if isinstance(of_modules, Mapping) else None
    value = metadata.get(INTERPOLATION_KEY) if isinstance(metadata, Mapping) else None
    if value is not None and value not in get_args(PositionInterpolation):
        raise WeightsError(
            f"{file}: its metadata states {INTERPOLATION_KEY} {value!r}; known are "
            f"{', '.join(get_args(PositionInterpolation))}. Another version of Seedbed wrote it."
        )
    return value


def _check_hash(files: Sequence[Path], sha256: str | None, path: str) -> None:
    if sha256 is None:
        return
    if (actual := sha256_of_files(map(str, files))) != sha256.lower():
        raise WeightsError(f"{path}: SHA-256 is {actual}, expected {sha256}. It is another file, or it is damaged.")


def _tensors(content: Mapping[str, object], path: str) -> dict[str, Tensor]:
    """The tensors of `content`, which must all be tensors, without the counters of batch norms (for training only)."""
    if others := [f"{name} ({type(value).__name__})" for name, value in content.items() if not _is_tensor(value)]:
        raise WeightsError(
            f"{path}: {len(others)} of its {len(content)} entries are not tensors: {_some(others)}. Expected a "
            "state_dict, or a checkpoint with one under 'teacher', 'target_encoder' or 'model'."
        )
    tensors = {name: value for name, value in content.items() if _is_tensor(value) and not name.endswith(STEP_COUNTER)}
    # A file of a few bytes can state a tensor that repeats one value a billion times; a copy of it fills the memory.
    if repeated := [name for name, value in tensors.items() if value.nbytes > value.untyped_storage().nbytes()]:
        raise WeightsError(
            f"{path}: the file holds only a part of {_some(repeated)}, and the tensor repeats it. Save whole tensors."
        )
    return tensors


def _without_prefixes(name: str) -> str:
    """The released name, without the prefixes of wrappers and trainers."""
    name = name.replace("_orig_mod.", "")  # torch.compile puts it in front of the module that it wraps
    return CHUNKED_BLOCK.sub(r"blocks.\1.", name.removeprefix("module.").removeprefix("backbone."))


def _renamed(tensors: Mapping[str, Tensor], rename: Callable[[str], str], path: str) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        new_name = rename(name)
        if new_name in result:
            raise WeightsError(f"{path}: two tensors are called '{new_name}' after prefixes are removed.")
        result[new_name] = tensor
    return result


def _layout_of(tensors: Mapping[str, Tensor], path: str) -> Layout:
    """The layout of a plain state_dict. If none fits, "released", whose keys a later error then lists."""
    if any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in tensors):
        raise WeightsError(f"{path}: these are weights of transformers. Give their folder, with config.json in it.")
    if "decoder_embed.weight" in tensors:
        return "mae"
    if "patch_embed.proj.weight" in tensors and not {"mask_token", "register_tokens"} & tensors.keys():
        return "timm"
    return "released"


def _fill(module: nn.Module, tensors: Mapping[str, Tensor], path: str) -> None:
    """Copies `tensors` into `module`, which must have exactly their names and shapes."""
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
    require_finite(tensors, path)
    module.load_state_dict(dict(tensors), strict=False)  # only step counters can be missing here


def require_finite(tensors: Mapping[str, Tensor], origin: str) -> None:
    """Raise WeightsError, with the keys, for tensors that hold NaN or infinity. `origin` names them in the message."""
    if not_finite := [name for name, value in tensors.items() if not value.isfinite().all()]:
        raise WeightsError(
            f"{origin}: values that are not finite in {len(not_finite)} of {len(tensors)} tensors: "
            f"{_some(not_finite)}. The training that wrote it had failed, or the file is damaged: take an earlier one."
        )


# --- timm ---------------------------------------------------------------------------------------------------------
# Cited: timm/models/vision_transformer.py (_convert_dinov2) for the names, and for the CLS token that includes its
# position; timm/layers/mlp.py for SwiGLUPacked, a GluMlp with gate_last=False: the first half of fc1 is the gate, as in
# w12.


def _from_timm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's tensors under the released keys. MAE's and I-JEPA's own files have timm's names."""
    result: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if match := re.fullmatch(r"(blocks\.\d+\.mlp\.)(fc[12])\.(weight|bias)", name):
            block, layer, kind = match.groups()
            if _is_gated(tensors, block):
                name = f"{block}{ {'fc1': 'w12', 'fc2': 'w3'}[layer] }.{kind}"
        result["register_tokens" if name == "reg_token" else name] = value
    positions = result.get("pos_embed")
    if positions is not None and positions.ndim == 3:
        num_positions, embed_dim = positions.shape[1:]
        is_square = math.isqrt(num_positions) ** 2 == num_positions
        if "cls_token" in result and is_square:  # only the patches have positions
            result["pos_embed"] = torch.cat([positions.new_zeros(1, 1, embed_dim), positions], dim=1)
        result["mask_token"] = positions.new_zeros(1, embed_dim)
    return result


def _is_gated(tensors: Mapping[str, Tensor], block: str) -> bool:
    first, second = tensors.get(f"{block}fc1.weight"), tensors.get(f"{block}fc2.weight")
    return first is not None and second is not None and first.shape[0] == 2 * second.shape[-1]


def _to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = {name: name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.") for name in state}
    result = {names[name]: value for name, value in state.items() if name != "mask_token"}
    if "register_tokens" in result:
        result["reg_token"] = result.pop("register_tokens")
        if "cls_token" in result:
            result["cls_token"] = result["cls_token"] + result["pos_embed"][:, :1]
            result["pos_embed"] = result["pos_embed"][:, 1:].contiguous()
    return result


# --- transformers -------------------------------------------------------------------------------------------------


def _read_folder(folder: Path, sha256: str | None) -> Checkpoint:
    config = _read_json(folder / "config.json")
    model_type = config.get("model_type")
    if model_type not in FOLDERS:
        raise WeightsError(
            f"{folder}/config.json: model_type is {model_type!r}; known are {', '.join(FOLDERS)}. For a timm folder, "
            "give the file model.safetensors in it."
        )
    kind = FOLDERS[str(model_type)]
    supported = {"hidden_act": ("gelu",), "qkv_bias": (True,), "layer_norm_eps": kind.norm_epsilons}
    problems = [
        f"{key} is {config[key]!r}, and only {' or '.join(map(repr, values))} is supported"
        for key, values in supported.items()
        if key in config and config[key] not in values
    ]
    num_heads = config.get("num_attention_heads")
    if not isinstance(num_heads, int):
        problems.append(f"num_attention_heads is {num_heads!r}")
    if problems or not isinstance(num_heads, int):
        raise WeightsError(f"{folder}/config.json: {'; '.join(problems)}.")

    files, listed = _weight_files(folder)
    _check_hash(files, sha256, str(folder))
    tensors: dict[str, Tensor] = {}
    interpolation: PositionInterpolation | None = None
    for file in files:
        content = _read_file(str(file), None)
        interpolation = interpolation or _stated_interpolation(file, content)
        tensors_of_file = _tensors(content, str(file))
        if repeated := tensors_of_file.keys() & tensors.keys():
            raise WeightsError(f"{folder}: several of its files hold {_some(sorted(repeated))}.")
        tensors |= tensors_of_file
    if listed is not None and (different := listed ^ tensors.keys()):
        raise WeightsError(f"{folder}: its index and its files disagree about {_some(sorted(different))}.")
    tensors = _renamed(tensors, lambda name: name.removeprefix(kind.prefix), str(folder))
    aside = tuple(name for name in tensors if kind.left_aside.fullmatch(name))
    kept = {name: value for name, value in tensors.items() if name not in aside}
    result = _from_transformers(kept, _family(str(model_type)))
    has_mask_token = model_type == "dinov2_with_registers" or config.get("use_mask_token", model_type == "dinov2")
    if not has_mask_token and "mask_token" not in result and (positions := result.get("pos_embed")) is not None:
        result["mask_token"] = positions.new_zeros(1, positions.shape[-1])
    return Checkpoint(str(folder), "transformers", result, aside, num_heads, interpolation)


def _read_json(path: Path) -> dict[str, object]:
    if not path.is_file():
        raise WeightsError(f"No file '{path}'. A folder of weights must be one of transformers, with config.json.")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise WeightsError(f"{path}: not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, not an object.")
    return content


def _weight_files(folder: Path) -> tuple[list[Path], set[str] | None]:
    """The files with the tensors, by name, and the names of the tensors if an index lists them."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name], None
    names = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
    index = next((folder / name for name in names if (folder / name).is_file()), None)
    if index is None:
        raise WeightsError(f"{folder}: no weights beside config.json. Expected model.safetensors, or its index.")
    shards = _read_json(index).get("weight_map")
    files = list(shards.values()) if isinstance(shards, dict) else []
    if not isinstance(shards, dict) or not all(isinstance(name, str) and Path(name).name == name for name in files):
        raise WeightsError(f"{index}: its weight_map does not give a file of this folder for each tensor.")
    return [folder / name for name in sorted(set(files))], set(shards)


def _family(model_type: str) -> Family:
    return "dinov2" if model_type.startswith("dinov2") else "vit"


def _from_transformers(tensors: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
    """transformers' tensors under the released keys. Unknown names are kept, so that a later error lists them."""
    current = any(".attention.q_proj." in name for name in tensors)
    names = BLOCK[family, "current" if current else "published"]
    released_of = {name: (released, part) for released, parts in names.items() for part, name in enumerate(parts)}
    result: dict[str, Tensor] = {}
    stacks: dict[tuple[str, str, str], dict[int, str]] = {}  # block, released module, leaf: transformers' names by part
    for name, value in tensors.items():
        module, leaf = _split_leaf(name)
        block = TRANSFORMERS_BLOCK.fullmatch(module)
        if module in STEM:
            result[STEM[module] + leaf] = value
        elif block and block[2] in released_of:
            released, part = released_of[block[2]]
            stacks.setdefault((block[1], released, leaf), {})[part] = name
        else:
            result[name] = value
    for (index, released, leaf), parts in stacks.items():
        values = [tensors[parts[part]] for part in sorted(parts)]
        if len(parts) == len(names[released]) and len({value.shape for value in values}) == 1:
            result[f"blocks.{index}.{released}{leaf}"] = values[0] if len(values) == 1 else torch.cat(values)
        else:
            result |= {name: tensors[name] for name in parts.values()}
    if (mask_token := result.get("mask_token")) is not None and mask_token.ndim == 3:  # IJepa's has one more axis
        result["mask_token"] = mask_token.squeeze(0)
    return result


def _to_transformers(state: Mapping[str, Tensor], num_heads: int) -> tuple[dict[str, object], dict[str, Tensor]]:
    """The config, and the tensors under the names of published files, which every version of transformers reads."""
    shape = architecture(state, "the model to save")
    gated = shape.feed_forward == "swiglu"
    match shape.has_cls_token, shape.has_layer_scale, shape.num_register_tokens > 0:
        case True, True, False:
            model_type = "dinov2"
        case True, True, True:
            model_type = "dinov2_with_registers"
        case True, False, False if not gated:
            model_type = "vit_mae"
        case False, False, False if not gated:
            model_type = "ijepa"
        case _:
            raise WeightsError(f"transformers has no model like this one: {shape}. Save it in the layout 'released'.")
    config: dict[str, object] = {
        "architectures": [FOLDERS[model_type].model],
        "dtype": str(state["pos_embed"].dtype).removeprefix("torch."),
        "hidden_act": "gelu",
        "hidden_size": shape.embed_dim,
        "image_size": shape.grid_size * shape.patch_size,
        "layer_norm_eps": NORM_EPSILON,
        "model_type": model_type,
        "num_attention_heads": num_heads,
        "num_channels": shape.in_channels,
        "num_hidden_layers": shape.depth,
        "patch_size": shape.patch_size,
        "qkv_bias": True,
    }
    family = _family(model_type)
    if family == "dinov2":
        config |= {"mlp_ratio": 4, "use_swiglu_ffn": gated}
    else:
        config["intermediate_size"] = 4 * shape.embed_dim
    if model_type == "dinov2_with_registers":
        config["num_register_tokens"] = shape.num_register_tokens

    blocks, stem = BLOCK[family, "published"], {released: name for name, released in STEM.items()}
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        module, leaf = _split_leaf(name)
        if module == "mask_token" and family == "vit":
            continue
        if module in stem:
            tensors[stem[module] + leaf] = value
        else:
            _, index, released = module.split(".", 2)
            parts = blocks[released]
            chunks = [chunk.clone() for chunk in value.chunk(len(parts))] if len(parts) > 1 else [value]  # no views
            for part, chunk in zip(parts, chunks, strict=True):
                tensors[f"encoder.layer.{index}.{part}{leaf}"] = chunk
    return config, tensors


def _split_leaf(name: str) -> tuple[str, str]:
    """`norm1.weight` to ("norm1", ".weight"); a parameter without a suffix, such as `cls_token`, to (name, "")."""
    match = re.fullmatch(r"(.+?)(\.weight|\.bias)?", name)
    assert match, name
    return match[1], match[2] or ""


def _save_safetensors(tensors: dict[str, Tensor], path: str, stated: Mapping[str, str]) -> None:
    # The metadata is written here: safetensors would order its keys differently in each process.
    data = safetensors.torch.save(tensors)
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps({"__metadata__": {"format": "pt", **stated}, **json.loads(data[8:end])}, separators=(",", ":"))
    padded = header.encode() + b" " * (-len(header.encode()) % 8)
    paths.write_bytes(path, b"".join([len(padded).to_bytes(8, "little"), padded, memoryview(data)[end:]]))


def _is_tensor(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor)


def _some(names: list[str]) -> str:
    return ", ".join(names[:MAX_LISTED]) + (", ..." if len(names) > MAX_LISTED else "")
