"""What this host has for virtual machines: memory that is free, processors that may be used.

Rule: the kernel's own figures, read when they are asked for, and the tightest of the host's and of this process's
control groups' (a CI job's container has limits that /proc/meminfo knows nothing of).  A figure that cannot be read
limits nothing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

MIB = 1024 * 1024

#: Where memory is accounted: the controller in /proc/self/cgroup ("" is version 2), its mount, and the names of
#: limit, use, and of what could be dropped in memory.stat.
_MEMORY = (
    ("", "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("memory", "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_memory_mib(root: Path = Path("/")) -> float:
    """MiB that can be taken without swapping, or meeting the limit of a control group; `root` is for tests."""
    free = [_meminfo(root)]
    for controller, mount, limit, usage, inactive in _MEMORY:
        for group in _groups(root, controller, mount):
            # Version 1 has a huge number for no limit, version 2 the word "max".
            used = _number(group / usage) - _field(group / "memory.stat", inactive)
            free.append(_number(group / limit, math.inf) - used)
    return max(0.0, min(free)) / MIB


def usable_cpus(root: Path = Path("/")) -> float:
    """Processors' worth of time that this process may use."""
    cpus = [float(len(os.sched_getaffinity(0)))]
    for group in _groups(root, "", "sys/fs/cgroup"):
        limit, _, period = _text(group / "cpu.max").partition(" ")
        if limit.isdecimal() and period.strip().isdecimal():
            cpus.append(int(limit) / int(period))
    for group in _groups(root, "cpu", "sys/fs/cgroup/cpu"):
        quota = _number(group / "cpu.cfs_quota_us")
        if quota > 0:
            cpus.append(quota / _number(group / "cpu.cfs_period_us", 100_000))
    return min(cpus)


def own_memory_mib(pid: int, root: Path = Path("/")) -> float:
    """MiB that a process shares with no file and no other process: what its end would give back."""
    return _field(root / f"proc/{pid}/status", "RssAnon:") / 1024


def _meminfo(root: Path) -> float:
    return _field(root / "proc/meminfo", "MemAvailable:", math.inf) * 1024


def _groups(root: Path, controller: str, mount: str) -> Iterator[Path]:
    """This process's group of a controller, and those above it, as far as they can be seen from here."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            group = Path(path.strip("/"))
            yield from (root / mount / above for above in (group, *group.parents) if ".." not in above.parts)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _number(path: Path, missing: float = 0.0) -> float:
    text = _text(path).strip()
    return float(text) if text.lstrip("-").isdecimal() else missing


def _field(path: Path, name: str, missing: float = 0.0) -> float:
    """The number after `name` at the beginning of a line."""
    for line in _text(path).splitlines():
        words = line.split()
        if len(words) > 1 and words[0] == name and words[1].isdecimal():
            return float(words[1])
    return missing
