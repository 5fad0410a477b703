"""The guest's cgroup v2 numbers in the shapes that hcsshim's users know (B27).

    v1   schema1.ContainerProperties, as its JSON has it
    v2   hcsschema.Properties, whose LCOWMetrics are containerd's cgroup v1 Metrics (stats/v1/metrics.proto)

Rule: a field that cgroup v2 has no number for is left out; none is invented.  Pure functions, no I/O.
"No limit" is what cgroup v1 shows: 0 for pids, NO_LIMIT for memory.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import InvalidRequest

#: memory.limit_in_bytes of an unlimited v1 cgroup: LONG_MAX rounded down to a page of 4 KiB.
NO_LIMIT = (1 << 63) - 4096

#: What `properties` and `properties_v2` can be asked for.
TYPES = ("Statistics", "ProcessList")

_Stats = Mapping[str, Any]

#: Field of v1's MemoryStat -> field of memory.stat in v2, where one says what the other said.
_MEMORY = {
    "cache": "file",
    "rss": "anon",
    "rss_huge": "anon_thp",
    "mapped_file": "file_mapped",
    "dirty": "file_dirty",
    "writeback": "file_writeback",
    "pg_fault": "pgfault",
    "pg_maj_fault": "pgmajfault",
    "inactive_anon": "inactive_anon",
    "active_anon": "active_anon",
    "inactive_file": "inactive_file",
    "active_file": "active_file",
    "unevictable": "unevictable",
}


def check_types(types: Sequence[str]) -> None:
    """Raises `InvalidRequest` for a type that is not known."""
    unknown = [name for name in types if name not in TYPES]
    if unknown:
        raise InvalidRequest(f"there is no property type {unknown[0]!r}", hint=f"one of {', '.join(TYPES)}")


def basic(container: str, state: str) -> dict[str, Any]:
    """What both shapes have of every container.  `state` is the agent's: created, running, stopped."""
    stopped = state == "stopped"
    return {
        "Id": container,
        "Name": container,
        "SystemType": "Container",
        "RuntimeOsType": "Linux",
        "Owner": "byre",
        "State": "Stopped" if stopped else "Running" if state == "running" else "Created",
        "Stopped": stopped,
    }


def statistics(stats: _Stats, started_ns: int = 0) -> dict[str, Any]:
    """`Statistics`, the same in both shapes.  Times are in units of 100 ns, sizes in bytes."""
    timestamp = int(stats.get("timestamp_ns", 0))
    read, written = _io_sum(stats, "rbytes"), _io_sum(stats, "wbytes")
    shown: dict[str, Any] = {
        "Timestamp": _time(timestamp),
        "Memory": _known(
            MemoryUsageCommitBytes=stats.get("memory.current"),
            MemoryUsageCommitPeakBytes=stats.get("memory.peak"),
            MemoryUsagePrivateWorkingSetBytes=stats.get("memory.stat.anon"),
        ),
        "Processor": _known(
            TotalRuntime100ns=_scaled(stats, "cpu.stat.usage_usec", 10),
            RuntimeUser100ns=_scaled(stats, "cpu.stat.user_usec", 10),
            RuntimeKernel100ns=_scaled(stats, "cpu.stat.system_usec", 10),
        ),
        "Storage": {
            "ReadCountNormalized": _io_sum(stats, "rios"),
            "ReadSizeBytes": read,
            "WriteCountNormalized": _io_sum(stats, "wios"),
            "WriteSizeBytes": written,
        },
    }
    if started_ns:
        shown["ContainerStartTime"] = _time(started_ns)
        shown["Uptime100ns"] = max(0, timestamp - started_ns) // 100
    return shown


def process_list(processes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`ProcessList`, the same in both shapes."""
    return [
        {
            "ProcessId": entry["pid"],
            "ImageName": entry["command"],
            "CreateTimestamp": _time(entry["created_ns"]),
            "UserTime100ns": entry["user_us"] * 10,
            "KernelTime100ns": entry["system_us"] * 10,
            "MemoryCommitBytes": entry["rss_bytes"],
        }
        for entry in processes
    ]


def metrics(stats: _Stats) -> dict[str, Any]:
    """containerd's v1 Metrics.  Times are in ns, sizes in bytes."""
    return {
        "pids": {"current": stats.get("pids.current", 0), "limit": stats.get("pids.max") or 0},
        "cpu": {
            "usage": _known(
                total=_scaled(stats, "cpu.stat.usage_usec", 1000),
                kernel=_scaled(stats, "cpu.stat.system_usec", 1000),
                user=_scaled(stats, "cpu.stat.user_usec", 1000),
            ),
            "throttling": _known(
                periods=stats.get("cpu.stat.nr_periods"),
                throttled_periods=stats.get("cpu.stat.nr_throttled"),
                throttled_time=_scaled(stats, "cpu.stat.throttled_usec", 1000),
            ),
        },
        "memory": _memory(stats),
        "blkio": {
            "io_service_bytes_recursive": _io_entries(stats, {"rbytes": "Read", "wbytes": "Write"}),
            "io_serviced_recursive": _io_entries(stats, {"rios": "Read", "wios": "Write"}),
        },
        "memory_oom_control": {"oom_kill": stats.get("memory.events.oom_kill", 0)},
    }


def _memory(stats: _Stats) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for v1, v2 in _MEMORY.items():
        value = stats.get(f"memory.stat.{v2}")
        if value is not None:
            found[v1] = found[f"total_{v1}"] = value  # v2 always counts what is below, as v1's total_ do
    limit, current = _limit(stats, "memory.max"), stats.get("memory.current", 0)
    found["hierarchical_memory_limit"] = limit
    found["usage"] = _known(
        limit=limit,
        usage=current,
        max=stats.get("memory.peak"),
        failcnt=stats.get("memory.events.max"),
    )
    if "memory.swap.current" in stats:
        # v1's memsw counts memory and swap together.
        swap = _limit(stats, "memory.swap.max")
        both = NO_LIMIT if NO_LIMIT in (limit, swap) else limit + swap
        found["hierarchical_swap_limit"] = both
        found["swap"] = {"limit": both, "usage": current + stats["memory.swap.current"]}
    kernel = stats.get("memory.stat.kernel")
    if kernel is not None:
        found["kernel"] = {"usage": kernel}
    return found


def _limit(stats: _Stats, name: str) -> int:
    value = stats.get(name)
    return NO_LIMIT if value is None else int(value)


def _scaled(stats: _Stats, name: str, factor: int) -> int | None:
    value = stats.get(name)
    return None if value is None else int(value) * factor


def _known(**fields: int | None) -> dict[str, int]:
    return {name: value for name, value in fields.items() if value is not None}


def _io_fields(stats: _Stats) -> list[tuple[int, int, str, int]]:
    """`(major, minor, field, value)` of the keys ``io.stat.MAJOR:MINOR.FIELD``."""
    found = []
    for key, value in stats.items():
        if key.startswith("io.stat."):
            device, _, field = key.removeprefix("io.stat.").partition(".")
            major, _, minor = device.partition(":")
            if major.isdigit() and minor.isdigit():
                found.append((int(major), int(minor), field, int(value)))
    return found


def _io_sum(stats: _Stats, field: str) -> int:
    return sum(value for _, _, name, value in _io_fields(stats) if name == field)


def _io_entries(stats: _Stats, operations: Mapping[str, str]) -> list[dict[str, Any]]:
    return [
        {"op": operations[field], "major": major, "minor": minor, "value": value}
        for major, minor, field, value in _io_fields(stats)
        if field in operations
    ]


def _time(nanoseconds: int) -> str:
    """RFC 3339, as Go's time.Time is in JSON."""
    moment = datetime.datetime.fromtimestamp(nanoseconds / 1e9, datetime.UTC)
    return moment.isoformat().replace("+00:00", "Z")
