"""What containers use, as typed records: `UtilityVM.stats`, `GuestContainer.stats`, `GuestContainer.processes`.

Rule: the kernel's own counts (cgroup version 2), in bytes and seconds; a rate is the reader's, from two of them.
Text is the container's own: escape it before a terminal sees it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class ContainerStats:
    """One look at one container.  A limit is None where there is none (B27)."""

    container: str
    time: float  #: the guest's clock, in seconds since the epoch
    cpu_seconds: float
    throttled_seconds: float
    memory_bytes: int
    memory_limit: int | None
    pids: int
    pids_limit: int | None
    read_bytes: int  #: of disks
    written_bytes: int
    oom_kills: int  #: processes killed for want of memory (B29)
    refused_forks: int  #: for want of pids (B31)

    @classmethod
    def of(cls, container: str, stats: Mapping[str, Any]) -> Self:
        """From the flat map that the agent gives."""

        def number(name: str) -> int:
            return stats.get(name) or 0

        def io(field: str) -> int:
            return sum(v for name, v in stats.items() if name.startswith("io.stat.") and name.endswith(f".{field}"))

        return cls(
            container=container,
            time=number("timestamp_ns") / 1e9,
            cpu_seconds=number("cpu.stat.usage_usec") / 1e6,
            throttled_seconds=number("cpu.stat.throttled_usec") / 1e6,
            memory_bytes=number("memory.current"),
            memory_limit=stats.get("memory.max"),
            pids=number("pids.current"),
            pids_limit=stats.get("pids.max"),
            read_bytes=io("rbytes"),
            written_bytes=io("wbytes"),
            oom_kills=number("memory.events.oom_kill"),
            refused_forks=number("pids.events.max"),
        )

    def processors_since(self, before: ContainerStats) -> float:
        """Processors' worth of time that it used between the two looks."""
        elapsed = self.time - before.time
        return max(0.0, self.cpu_seconds - before.cpu_seconds) / elapsed if elapsed > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class ProcessStats:
    """One process of a container."""

    pid: int  #: the VM's
    uid: int  #: -1 when it has just ended
    state: str  #: as ps(1) has it: R, S, D, Z, ...
    command: str  #: the kernel's name for it
    arguments: str  #: what it was started with, or what it says instead; cut
    cpu_seconds: float
    memory_bytes: int  #: resident
    started: float  #: the guest's clock, in seconds since the epoch

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Self:
        """From what the agent gives."""
        return cls(
            pid=found["pid"],
            uid=found["uid"],
            state=found["state"],
            command=found["command"],
            arguments=found["args"],
            cpu_seconds=(found["user_us"] + found["system_us"]) / 1e6,
            memory_bytes=found["rss_bytes"],
            started=found["created_ns"] / 1e9,
        )
