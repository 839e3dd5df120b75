"""The machine that a plan is made for: this one, or machines of a stated size."""

import os
import posixpath
import shutil
from dataclasses import dataclass
from pathlib import Path

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
        memory_bytes=free_memory(),
        disk_bytes=free_disk(output),
    )


def usable_cores() -> int:
    """The cores that this process may use: its affinity, and the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _first_line("/sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdecimal() and period.isdecimal():
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def free_memory() -> int | None:
    """Bytes that new processes can take without swapping, within the limit of the container; None outside Linux."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    limit, used = (_first_line(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if free is not None and limit.isdecimal() and used.isdecimal():
        free = min(free, max(0, int(limit) - int(used)))
    return free


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


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
