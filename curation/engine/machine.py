"""The cores, memory and processor of this machine; of cores and memory, those that this process may use.

A container or a job scheduler limits a process by the affinity of its threads and by control groups (Linux), of version
1 or 2. The limits of a group's ancestors count too. `root` is the folder that holds `proc/` and `sys/`, for tests.
"""

import math
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
# Units of a processor that Seedbed's libraries use, and their names in /proc/cpuinfo, of which one suffices.
UNITS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "AVX2": ("avx2",),
        "AVX-512": ("avx512f",),
        "VNNI": ("avx512_vnni", "avx_vnni"),
        "AVX-512 BF16": ("avx512_bf16",),
        "AMX BF16": ("amx_bf16",),
        "SHA": ("sha_ni",),
    },
    "aarch64": {"SVE": ("sve",), "I8MM": ("i8mm",), "BF16": ("bf16",), "SHA": ("sha2",)},
}


@dataclass(frozen=True)
class Processor:
    """The processor of this machine."""

    model: str
    architecture: str
    units: tuple[str, ...] | None
    """Those of UNITS that it has; None where the system does not say."""
    without: tuple[str, ...]
    """Those that it has not."""


def processor(root: Path = ROOT, architecture: str | None = None) -> Processor:
    """The processor, from /proc/cpuinfo of Linux. Of other systems only the architecture is known."""
    architecture = architecture or platform.machine()
    # The first processor's lines are enough: all have the same units.
    lines = (line.partition(":") for line in (_read(root / "proc/cpuinfo") or "").split("\n\n")[0].splitlines())
    facts = {name.strip(): value.strip() for name, _, value in lines}
    flags = facts.get("flags") or facts.get("Features")
    known = UNITS.get(architecture)
    model = facts.get("model name") or "unknown model"
    if flags is None or known is None:
        return Processor(model, architecture, None, ())
    has = tuple(unit for unit, names in known.items() if set(names) & set(flags.split()))
    return Processor(model, architecture, has, tuple(unit for unit in known if unit not in has))


def usable_cores(root: Path = ROOT) -> int:
    """Cores of the affinity, and at most the quota of the control group, rounded up."""
    cores = float(len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1)
    for folder in _groups(root, "cpu"):
        quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if both := _read(folder / "cpu.max"):  # version 2
            quota, period = both.split()
        if quota is not None and period is not None and quota not in ("max", "-1"):
            cores = min(cores, int(quota) / int(period))
    return max(1, math.ceil(cores))


def usable_memory(root: Path = ROOT) -> int:
    """Bytes of memory: those of the machine, and at most the limit of the control group."""
    return min([_memory_of_machine(), *(limit for limit, _ in _memory_limits(root))])


def available_memory(root: Path = ROOT) -> int | None:
    """Bytes of memory that are free or hold only cached files; None where the system does not say."""
    lines = dict(line.split(":", 1) for line in (_read(root / "proc/meminfo") or "").splitlines())
    if "MemAvailable" not in lines:
        return None
    available = int(lines["MemAvailable"].split()[0]) * 1024
    return max(0, min([available, *(limit - used for limit, used in _memory_limits(root))]))


def _memory_of_machine() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _memory_limits(root: Path) -> Iterator[tuple[int, int]]:
    """The limit of each control group, and the bytes in use without cached files."""
    for folder in _groups(root, "memory"):
        for limit_name, used_name, cached_name in (
            ("memory.max", "memory.current", "inactive_file"),  # version 2
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, used = _read(folder / limit_name), _read(folder / used_name)
            if limit is not None and used is not None and limit != "max":
                statistics = dict(line.split() for line in (_read(folder / "memory.stat") or "").splitlines())
                yield int(limit), int(used) - int(statistics.get(cached_name, 0))


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's control group of `controller` and of the group's ancestors."""
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:  # version 2: one tree for all controllers
            mount = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            mount = root / "sys/fs/cgroup" / controller
        else:
            continue
        group = Path(path.lstrip("/"))
        # A container that sees only its group has it at the mount, whatever the path says.
        yield from dict.fromkeys(mount / folder for folder in (group, *group.parents))


def _read(file: Path) -> str | None:
    """The text of a file; None where it is missing or may not be read."""
    try:
        return file.read_text().strip()
    except OSError:
        return None
