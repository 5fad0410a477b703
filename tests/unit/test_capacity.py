"""What this host has, read from /proc and control groups that are played."""

from __future__ import annotations

import os
from pathlib import Path

from byre import capacity

MIB = 1024 * 1024


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def meminfo(mib: int) -> str:
    return f"MemTotal: 99999999 kB\nMemAvailable:   {mib * 1024} kB\n"


def test_this_host() -> None:
    assert 0 < capacity.free_memory_mib() < 1 << 24
    assert 0 < capacity.usable_cpus() <= len(os.sched_getaffinity(0))
    assert capacity.own_memory_mib(os.getpid()) > 1
    assert capacity.own_memory_mib(0) == 0


def test_without_control_groups_it_is_what_the_host_has(tmp_path: Path) -> None:
    assert capacity.free_memory_mib(write(tmp_path, {"proc/meminfo": meminfo(700)})) == 700
    assert capacity.usable_cpus(tmp_path) == len(os.sched_getaffinity(0))


def test_the_tightest_group_counts_without_what_it_could_drop(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/meminfo": meminfo(4000),
            "proc/self/cgroup": "0::/job/step\n",
            "sys/fs/cgroup/job/memory.max": f"{1000 * MIB}\n",
            "sys/fs/cgroup/job/memory.current": f"{600 * MIB}\n",
            "sys/fs/cgroup/job/memory.stat": f"anon 5\ninactive_file {100 * MIB}\n",
            "sys/fs/cgroup/job/cpu.max": "50000 100000\n",
            "sys/fs/cgroup/job/step/memory.max": "max\n",
            "sys/fs/cgroup/job/step/memory.current": f"{600 * MIB}\n",
            "sys/fs/cgroup/job/step/cpu.max": "max 100000\n",
        },
    )
    assert capacity.free_memory_mib(root) == 500
    assert capacity.usable_cpus(root) == 0.5


def test_version_1_and_a_path_that_is_not_seen_from_here(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/meminfo": meminfo(4000),
            "proc/self/cgroup": "4:memory:/docker/abc\n3:cpuset,cpu:/docker/abc\n0::/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{300 * MIB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{400 * MIB}\n",
            "sys/fs/cgroup/memory/memory.stat": f"inactive_file 7\ntotal_inactive_file {150 * MIB}\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "25000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    )
    assert capacity.free_memory_mib(root) == 50
    assert capacity.usable_cpus(root) == 0.25


def test_what_is_used_up_is_nothing_and_no_limit_is_none(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": meminfo(4000),
        "proc/self/cgroup": "4:memory:/\n1:cpu:/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{100 * MIB}\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{120 * MIB}\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
    }
    assert capacity.free_memory_mib(write(tmp_path, files)) == 0
    assert capacity.usable_cpus(tmp_path) == len(os.sched_getaffinity(0))
    write(tmp_path, {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"})
    assert capacity.free_memory_mib(tmp_path) == 4000
