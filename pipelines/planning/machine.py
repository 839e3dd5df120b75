"""The machine that a plan is made for: this one, or machines of a stated size."""

import os
import posixpath
import shutil
from dataclasses import dataclass

from curation.engine.machine import available_memory, usable_cores
from curation.files import paths


@dataclass(frozen=True)
class Machine:
    """The size of one machine. None stands for a number that is not known."""

    cores: int
    gpus: int
    bytes_per_second: float
    """Of its network and storage, reads and writes together."""
    memory_bytes: int | None = None
    """Free for new processes."""
    disk_bytes: int | None = None
    """Free where the run is written; None for an object store."""


def this_machine(output: str, *, with_gpus: bool, bytes_per_second: float) -> Machine:
    """The machine of this process. with_gpus: count its GPUs, which loads torch."""
    return Machine(
        cores=usable_cores(),
        gpus=_num_gpus() if with_gpus else 0,
        bytes_per_second=bytes_per_second,
        memory_bytes=available_memory(),
        disk_bytes=free_disk(output),
    )


def free_disk(output: str) -> int | None:
    """Free bytes of the disk that would hold the folder `output`; None for an object store."""
    if not paths.is_local(output):
        return None
    folder = posixpath.abspath(paths.filesystem(output)[1])
    while not os.path.isdir(folder):
        folder = posixpath.dirname(folder)
    return shutil.disk_usage(folder).free


def _num_gpus() -> int:
    import torch  # a second, which plans without GPUs need not wait for

    return torch.cuda.device_count()
