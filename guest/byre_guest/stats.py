"""Statistics and processes of one cgroup (version 2), as plain numbers; the host gives them the shape it needs.

    statistics   one flat map: "FILE.FIELD" -> number, "FILE" -> number where the file has one value;
                 None stands for "max", no limit; a file that is not there is left out
    processes    what lives in the cgroup and below

Rule: nothing is computed that the reader can compute, nothing invented that the kernel does not say (B27).
Source: admin-guide/cgroup-v2.rst, proc_pid_stat(5).
"""

from __future__ import annotations

import os
from time import CLOCK_BOOTTIME, clock_gettime_ns, time_ns

from . import cgroups

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: Files with one number, or "max".
SINGLE = (
    *("memory.current", "memory.peak", "memory.max", "memory.high", "memory.low"),
    *("memory.swap.current", "memory.swap.max", "pids.current", "pids.peak", "pids.max"),
)

#: Files with a name and a number per line.
TABLES = ("memory.stat", "memory.events", "cpu.stat", "pids.events", "cgroup.events")

#: Processes reported at most: the answer must fit one frame (a process takes about 100 bytes).
MAX_PROCESSES = 4096

#: Bytes of arguments that are reported of one process, and of all: the same frame must hold them.
MAX_ARGUMENTS = 256
ALL_ARGUMENTS = 64 * 1024

#: USER_HZ, the unit of the times in /proc/PID/stat.
TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


def statistics(cgroup: str) -> dict[str, Any]:
    """The flat map of a cgroup; `timestamp_ns` is the guest's real time in nanoseconds."""
    found: dict[str, Any] = {"timestamp_ns": time_ns()}
    for name in SINGLE:
        text = cgroups.read(f"{cgroup}/{name}").strip()
        if text:
            found[name] = _number(text)
    for name in TABLES:
        for field, value in cgroups.table(cgroups.read(f"{cgroup}/{name}")).items():
            found[f"{name}.{field}"] = value
    limit = cgroups.read(f"{cgroup}/cpu.max").split()
    if len(limit) == 2:
        found["cpu.max.quota_usec"], found["cpu.max.period_usec"] = _number(limit[0]), int(limit[1])
    found.update(_io(cgroups.read(f"{cgroup}/io.stat")))
    return found


def _number(text: str) -> int | None:
    return None if text == "max" else int(text)


def _io(text: str) -> dict[str, int]:
    """`io.stat.MAJOR:MINOR.FIELD` of lines such as `8:0 rbytes=1 wbytes=2`."""
    found = {}
    for line in text.splitlines():
        device, *fields = line.split()
        for field in fields:
            name, _, value = field.partition("=")
            if value.isdigit():
                found[f"io.stat.{device}.{name}"] = int(value)
    return found


def processes(cgroup: str, proc: str = "/proc") -> list[dict[str, Any]]:
    """The processes of a cgroup and those below it: for helper children, there may be thousands.

    Each is `{"pid", "uid", "state", "command", "args", "user_us", "system_us", "rss_bytes", "created_ns"}`: the pid
    is the VM's, the state one letter of proc_pid_stat(5), the command the kernel's name for it (15 characters),
    `args` what it was started with as one line, or has made of it, `created_ns` real time since the epoch.
    """
    booted = time_ns() - clock_gettime_ns(CLOCK_BOOTTIME)
    found: list[dict[str, Any]] = []
    room = ALL_ARGUMENTS
    for directory in sorted(cgroups.leaves(cgroup)):
        for pid in cgroups.read(f"{directory}/cgroup.procs").split():
            text = cgroups.read(f"{proc}/{pid}/stat")
            if text and len(found) < MAX_PROCESSES:
                args = _arguments(f"{proc}/{pid}/cmdline", min(MAX_ARGUMENTS, room))
                room -= len(args)
                found.append({**_process(text, booted), "uid": _owner(f"{proc}/{pid}"), "args": args})
    return found


def _arguments(path: str, size: int) -> str:
    """The process's own text: not more of it than is wanted is read."""
    try:
        with open(path, "rb", buffering=0) as file:
            return (file.read(size) or b"").rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
    except OSError:  # it has just ended
        return ""


def _owner(directory: str) -> int:
    """Its effective user (proc(5)); -1 when it has just ended."""
    try:
        return os.stat(directory).st_uid
    except OSError:
        return -1


def _process(text: str, booted: int) -> dict[str, Any]:
    """One line of /proc/PID/stat.  The name stands in parentheses and may hold any character, these too."""
    start, end = text.index("("), text.rindex(")")
    fields = text[end + 2 :].split()  # from the third field of proc_pid_stat(5) on
    return {
        "pid": int(text[:start]),
        "command": text[start + 1 : end],
        "state": fields[0],
        "user_us": int(fields[11]) * 1_000_000 // TICKS,
        "system_us": int(fields[12]) * 1_000_000 // TICKS,
        "rss_bytes": int(fields[21]) * PAGE,
        "created_ns": booted + int(fields[19]) * 1_000_000_000 // TICKS,
    }
