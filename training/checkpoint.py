"""Checkpoints of a run: saved on any number of ranks, resumed on any other number, and never visible half-written.

    <folder>/
      step-0001000/
        checkpoint.json      the record: step, progress, config, names and shapes of all tensors, sizes and hashes of
                             files
        .metadata            index of torch.distributed.checkpoint: the place of each slice of each tensor
        __0_0.distcp  ...    the slices, one file a rank
      .tmp-step-0002000/     only during a save, or after a kill; the next save removes it

`.metadata` is a pickle: reading it runs any code that its writer put there. So only the run that wrote a checkpoint
should read it. An export (export.py) carries no code and can be handed to others.

Every rank hashes the files that it wrote, and before a checkpoint is read the ranks share the check of all hashes. A
core with SHA instructions hashes 1.8 GB a second (measured 2026-11), so a ViT-L of 6 GB on one rank takes 3 s for each
save; a core without them takes about four times as long.

A checkpoint holds no generator state: all random draws follow from the run's seed and step.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter

from curation.config import Settings
from curation.engine.ranks import ALONE, World, barrier, gather_texts
from curation.errors import ConfigError, InputError, OutputMismatchError
from curation.files import paths
from curation.files.hashes import sha256_of_file

RECORD_NAME = "checkpoint.json"
PREFIX = "step-"
MAX_LISTED = 8  # differences in a message; assumed: as many as a person reads
# The version of the format written here. Checkpoints of another version are refused, not converted.
FORMAT_VERSION = 2

Parts = Mapping[str, Mapping[str, Tensor]]


class CheckpointConfig(Settings):
    """When checkpoints are written, and how many are kept."""

    every: int = Field(default=1000, ge=1)
    """Steps between two checkpoints."""
    keep: int = Field(default=2, ge=1)
    """Number of latest checkpoints to keep. With 1, no other is left if the disk damages it."""


class Record(BaseModel):
    """The content of `checkpoint.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int = FORMAT_VERSION
    step: int
    """Optimizer steps done."""
    num_ranks: int
    """Ranks that wrote the checkpoint."""
    progress: dict[str, Any]
    """The run's counters."""
    config: dict[str, Any]
    """The settings that the run's numbers depend on."""
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    """Type and full shape of each tensor, by `<part>.<name>`."""
    files: dict[str, int]
    """Size in bytes of each file but this one."""
    sha256: dict[str, str]
    """The hash of each of these files, as 64 hex digits."""


def save(
    folder: str,
    step: int,
    parts: Parts,
    *,
    progress: Mapping[str, Any],
    config: Mapping[str, Any],
    keep: int,
    world: World,
) -> str:
    """Write the checkpoint of `step` and delete all but the last `keep`. Every rank calls it. Gives its path.

    folder: on a filesystem that every rank sees.
    parts: state_dicts by name, and the result of `optimizer_tensors` for the optimizer. Each rank writes its slices of
        a sharded model. A plain tensor must be equal on all ranks.
    progress, config: values that JSON can hold, equal on all ranks.
    """
    final, temporary = _path(folder, step), Path(_local(folder)) / f"{paths.TEMPORARY_PREFIX}{PREFIX}{step:07d}"
    tensors = _flat(parts)
    json_fields = _as_json({"progress": dict(progress), "config": dict(config)})  # fails on all ranks, or on none
    if world.is_first:
        _remove_unfinished(folder)
        temporary.mkdir(parents=True)
    barrier()
    with _without_warning():
        state_dict_saver.save(tensors, storage_writer=FileSystemWriter(temporary), no_dist=world.num_ranks == 1)
    hashes: dict[str, str] = {}
    for text in gather_texts(world, json.dumps(_hash_files_of_rank(temporary, world))):
        hashes |= json.loads(text)
    if world.is_first:
        record = Record(
            step=step,
            num_ranks=world.num_ranks,
            **json_fields,
            tensors=_shapes(tensors),
            files={file.name: file.stat().st_size for file in sorted(temporary.iterdir())},
            sha256=dict(sorted(hashes.items())),
        )
        paths.write_bytes(str(temporary / RECORD_NAME), (record.model_dump_json(indent=1) + "\n").encode())
        _set_aside(final)  # exists if the run resumed from an earlier step
        os.rename(temporary, final)
        _sync(final.parent)
        for number in steps(folder)[:-keep]:
            _set_aside(_path(folder, number))
        _remove_unfinished(folder)
    barrier()
    return str(final)


def load(path: str, parts: Parts, *, config: Mapping[str, Any], world: World) -> Record:
    """Fill the tensors of `parts`, in place, from the checkpoint at `path`. Every rank calls it.

    parts: as for `save`, on the current number of ranks.
    Raises OutputMismatchError if the checkpoint has another config, InputError if it is damaged or has other tensors.
    """
    record = read_record(path)
    require_config(path, record, config)
    tensors = _flat(parts)
    _require_tensors(path, record, _shapes(tensors))
    _require_hashes(path, record, world)
    _read(path, tensors, no_dist=world.num_ranks == 1)
    return record


def load_tensors(path: str, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, by the rest of the name: whole, on the CPU, without other ranks."""
    record = read_record(path)
    _require_hashes(path, record, ALONE)
    tensors = {
        name: torch.empty(shape, dtype=getattr(torch, kind))
        for name, (kind, shape) in record.tensors.items()
        if name.startswith(prefix)
    }
    _read(path, tensors, no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def steps(folder: str) -> list[int]:
    """The steps of the checkpoints in `folder`, in order."""
    names = [name.removeprefix(PREFIX) for name in paths.list_names(folder) if name.startswith(PREFIX)]
    return sorted(int(name) for name in names if name.isdecimal())


def latest(folder: str) -> str | None:
    """The path of the last checkpoint in `folder`, or None."""
    numbers = steps(folder)
    return str(_path(folder, numbers[-1])) if numbers else None


def read_record(path: str) -> Record:
    """The record of the checkpoint at `path`. Raises InputError if there is no checkpoint, or a file is not whole."""
    record_path = Path(_local(path)) / RECORD_NAME
    try:
        record = Record.model_validate_json(record_path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"'{path}' is no checkpoint: it has no {RECORD_NAME}. Give a folder step-... of a run."
        ) from None
    except ValidationError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{record_path}: not a file that this version of Seedbed wrote ({reason}).") from None
    if record.format_version != FORMAT_VERSION:
        raise InputError(
            f"{record_path}: written in format {record.format_version}, and this version of Seedbed reads "
            f"{FORMAT_VERSION}. Resume with the version that wrote it, or start a new run from its export."
        )
    for name, size in record.files.items():
        file = record_path.with_name(name)
        current_size = file.stat().st_size if file.is_file() else None
        if current_size != size:
            problem = "it is missing" if current_size is None else f"it has {current_size:,} bytes"
            raise InputError(
                f"{file}: {problem}, and the checkpoint was written with {size:,} there. Copy it again, or delete "
                f"'{path}' to resume from the one before."
            )
    return record


def require_config(path: str, record: Record, config: Mapping[str, Any]) -> None:
    """Raises OutputMismatchError with the differences between `config` and the checkpoint's config."""
    before, after = _leaves(record.config), _leaves(_as_json(dict(config)))
    changed = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    if changed:
        there, now = ({key: repr(value) for key, value in side.items()} for side in (before, after))
        lines = [f"  {key}: {there.get(key, 'not set')} there, {now.get(key, 'not set')} now" for key in changed]
        del lines[MAX_LISTED:]
        more = f"\n  and {len(changed) - MAX_LISTED} more" if len(changed) > MAX_LISTED else ""
        raise OutputMismatchError(
            f"'{path}' is a checkpoint of another config:\n" + "\n".join(lines) + more + "\n"
            "Nothing was changed. Resume with the config and the version of Seedbed that wrote it. To begin anew, give "
            "another --output, or delete the folder of this run."
        )


def optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an AdamW over the parameters of `module`, by parameter name: the optimizer's tensors, not copies.

    A parameter that had no step yet gets its state here, equal to the state that the optimizer would make. The names
    are then the same in every run. Learning rates and weight decays are left out: they follow from the step.
    """
    assert isinstance(optimizer, torch.optim.AdamW), type(optimizer)
    names = {parameter: name for name, parameter in module.named_parameters()}
    tensors: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        assert not group["amsgrad"], "amsgrad has one more state, which is not saved"
        on_device = group["fused"] or group["capturable"]
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not state:  # cited: torch/optim/adam.py, _init_group, of torch 2.13
                step_device = parameter.device if on_device else torch.device("cpu")
                state["step"] = torch.zeros((), dtype=torch.float32, device=step_device)
                state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            tensors |= {f"{names[parameter]}.{kind}": tensor for kind, tensor in state.items()}
    return tensors


def _hash_files_of_rank(folder: Path, world: World) -> dict[str, str]:
    """The hashes of the slices that this rank wrote, by name of the file; on the first rank, also of `.metadata`."""
    files = list(folder.glob(f"__{world.rank}_*"))
    if world.is_first:
        files += [file for file in folder.iterdir() if not file.name.startswith("__")]
    return {file.name: sha256_of_file(str(file)) for file in files}


def _require_hashes(path: str, record: Record, world: World) -> None:
    """Raise InputError on every rank where a file of the checkpoint has other bytes than were written."""
    problem = ""
    for name in sorted(record.sha256)[world.rank :: world.num_ranks]:
        file = Path(_local(path)) / name
        if not problem and (sha256 := sha256_of_file(str(file))) != record.sha256[name]:
            problem = (
                f"{file}: damaged after it was written (its SHA-256 is {sha256}, and the checkpoint was written with "
                f"{record.sha256[name]}). Copy it again, or delete '{path}' to resume from the one before."
            )
    if problems := [text for text in gather_texts(world, problem) if text]:
        raise InputError(problems[0])


def _read(path: str, tensors: dict[str, Tensor], *, no_dist: bool) -> None:
    """Fill `tensors` in place."""
    with _without_warning():
        state_dict_loader.load(tensors, storage_reader=FileSystemReader(_local(path)), no_dist=no_dist)


def _flat(parts: Parts) -> dict[str, Tensor]:
    return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (str(value.dtype).removeprefix("torch."), tuple(value.shape)) for name, value in tensors.items()}


def _require_tensors(path: str, record: Record, expected: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    problems = {
        "missing": [name for name in expected if name not in record.tensors],
        "unexpected": [name for name in record.tensors if name not in expected],
        "of another type or shape": [
            f"{name} (expected {expected[name]}, found {saved})"
            for name, saved in record.tensors.items()
            if name in expected and expected[name] != saved
        ],
    }
    if any(problems.values()):
        lines = [
            f"  {len(names)} {kind}: {', '.join(names[:MAX_LISTED])}{', ...' if len(names) > MAX_LISTED else ''}"
            for kind, names in problems.items()
            if names
        ]
        raise InputError(
            f"{path}: its tensors do not fit this model ({len(expected)} expected, {len(record.tensors)} found):\n"
            + "\n".join(lines)
            + "\nAnother version of Seedbed wrote it. Resume with that one, or start a new run from its export."
        )


def _as_json(value: dict[str, Any]) -> dict[str, Any]:
    """`value` after a round trip through JSON, which turns tuples into lists."""
    return dict(json.loads(json.dumps(value, allow_nan=False)))


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": [1]}}` as `{"a.b.0": 1}`."""
    if isinstance(value, list):
        value = {str(index): item for index, item in enumerate(value)}
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {
        key: leaf
        for name, item in value.items()
        for key, leaf in _leaves(item, f"{prefix}.{name}" if prefix else name).items()
    }


def _path(folder: str, step: int) -> Path:
    return Path(_local(folder)) / f"{PREFIX}{step:07d}"


def _local(folder: str) -> str:
    if not paths.is_local(folder):
        raise ConfigError(
            f"'{folder}': checkpoints need a mounted filesystem, where renaming a folder is atomic. Give such an "
            "--output, shared by all machines of the run, and copy it elsewhere afterwards."
        )
    return paths.filesystem(folder)[1]


def _set_aside(path: Path) -> None:
    """Rename the checkpoint at `path` to a temporary name. Deleting it takes longer and may be interrupted."""
    if path.exists():
        os.rename(path, path.with_name(f"{paths.TEMPORARY_PREFIX}old-{path.name}"))


def _remove_unfinished(folder: str) -> None:
    for name in paths.list_names(folder):
        if name.startswith((f"{paths.TEMPORARY_PREFIX}{PREFIX}", f"{paths.TEMPORARY_PREFIX}old-")):
            shutil.rmtree(Path(_local(folder)) / name)


def _sync(folder: Path) -> None:
    """Write the names in `folder` to disk, so that they survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _without_warning() -> Iterator[None]:
    """Hide torch's warning about a single process, which is intended here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield
