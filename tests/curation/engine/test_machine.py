"""The cores, memory and processor of this machine, under the limits of control groups of both versions."""

import os
from pathlib import Path

import pytest

from curation.engine import machine

MEMINFO = "MemTotal:       16000000 kB\nMemFree:         1000000 kB\nMemAvailable:    8000000 kB\n"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_without_limits_the_affinity_counts(tmp_path: Path) -> None:
    affinity = os.sched_getaffinity(0)
    assert machine.usable_cores(tmp_path) == len(affinity)
    try:
        os.sched_setaffinity(0, {min(affinity)})
        assert machine.usable_cores(tmp_path) == 1
    finally:
        os.sched_setaffinity(0, affinity)
    assert machine.usable_memory(tmp_path) == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert machine.available_memory(tmp_path) is None


@pytest.mark.parametrize(
    ("quota", "cores"), [("50000 100000", 1), ("150000 100000", 2), ("max 100000", 10**6), ("9000000 100000", 90)]
)
def test_the_quota_of_a_group_limits_the_cores(tmp_path: Path, quota: str, cores: int) -> None:
    root = write(tmp_path, {"proc/self/cgroup": "0::/jobs/7\n", "sys/fs/cgroup/jobs/cpu.max": quota})
    assert machine.usable_cores(root) == min(cores, len(os.sched_getaffinity(0)))


def test_groups_of_version_1(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "5:memory:/docker/a\n4:cpu,cpuacct:/docker/a\n1:name=systemd:/\n",
            # A container sees its group at the mount.
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "3000000000",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "2000000000",
            "sys/fs/cgroup/memory/memory.stat": "cache 1\ntotal_inactive_file 500000000\n",
        },
    )
    assert machine.usable_cores(root) == 1
    assert (machine.usable_memory(root), machine.available_memory(root)) == (3_000_000_000, 1_500_000_000)


def test_memory_of_groups_of_version_2_and_their_ancestors(tmp_path: Path) -> None:
    files = {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/jobs/7\n", "sys/fs/cgroup/jobs/7/memory.max": "max\n"}
    assert machine.available_memory(write(tmp_path, files)) == 8_000_000 * 1024
    files |= {"sys/fs/cgroup/jobs/memory.max": "1000000000", "sys/fs/cgroup/jobs/memory.current": "600000000"}
    root = write(tmp_path, files)
    assert (machine.usable_memory(root), machine.available_memory(root)) == (1_000_000_000, 400_000_000)


def test_units_of_processors(tmp_path: Path) -> None:
    intel = "processor\t: 0\nmodel name\t: Xeon\nflags\t\t: fpu avx2 avx512f avx512_vnni amx_bf16\n\nprocessor\t: 1\n"
    processor = machine.processor(write(tmp_path / "x", {"proc/cpuinfo": intel}), "x86_64")
    assert (processor.model, processor.units) == ("Xeon", ("AVX2", "AVX-512", "VNNI", "AMX BF16"))
    assert processor.without == ("AVX-512 BF16", "SHA")
    arm = "processor\t: 0\nFeatures\t: fp asimd sha2 bf16\n\nprocessor\t: 1\n"
    processor = machine.processor(write(tmp_path / "a", {"proc/cpuinfo": arm}), "aarch64")
    assert (processor.units, processor.without) == (("BF16", "SHA"), ("SVE", "I8MM"))
    assert machine.processor(tmp_path / "none", "arm64").units is None
