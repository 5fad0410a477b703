"""The cgroup of a container: limits, kill, leaves for each exec, notices of its files.  Version 2 only.

    /sys/fs/cgroup/containers            all containers; its limit leaves the agent a reserve (init.py)
    /sys/fs/cgroup/containers/ID         one container: its limits, and what it sees as the root of its cgroups
    /sys/fs/cgroup/containers/ID/byre-N  one exec in it, so that its whole tree can be killed (B15b)
    /sys/fs/cgroup/containers/@POD       one pod: the limits of all in it together; its containers are @POD/ID

The leaves have no controllers, so that processes may live beside them (cgroups(7), "no internal processes").
Rule: only files of cgroupfs are touched, which never wait for a disk.  Writing a limit may wait for memory to be
reclaimed: `apply` is for helper children.  Source: admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import os

from byre_proto.errors import InvalidRequest, NotSupported, StorageFailed

from . import reserve

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

ROOT = "/sys/fs/cgroup"
CONTAINERS = f"{ROOT}/containers"

#: The period of cpu.max in microseconds, the kernel's default; a quota is a share of it.
CPU_PERIOD = 100_000

#: The kernel refuses a quota below 1 ms.
MIN_CPU_QUOTA = 1000

#: What an update may name (`byre.Resources`).
RESOURCES = ("memory_bytes", "cpus", "pids")


def path_of(container: str, pod: str = "") -> str:
    """The directory of a container's cgroup."""
    return f"{path_of_pod(pod)}/{container}" if pod else f"{CONTAINERS}/{container}"


def path_of_pod(pod: str) -> str:
    """The directory of a pod's cgroup: no id of a container begins with an @."""
    return f"{CONTAINERS}/@{pod}"


def why_not() -> str:
    """Why containers cannot be had here; "" when they can."""
    if os.geteuid() != 0:
        return "the agent does not run as root"
    if not os.path.exists(f"{ROOT}/cgroup.controllers"):
        return "cgroup version 2 is not mounted on /sys/fs/cgroup"
    if not os.path.isdir(CONTAINERS):
        return f"{CONTAINERS} was not set up: the agent is not this machine's first process"
    return ""


def read(path: str) -> str:
    """A file's text; "" when it is not there (a controller that is off, a cgroup that is gone)."""
    try:
        with reserve.LENT, open(path, "rb", buffering=0) as file:
            return file.readall().decode(errors="replace")
    except OSError:
        return ""


def write(path: str, text: str) -> None:
    """Write a file in one go.  Raises OSError."""
    with reserve.LENT:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)


def table(text: str) -> dict[str, int]:
    """`name number` per line, as in memory.stat and cgroup.events."""
    pairs = (line.split(" ", 1) for line in text.splitlines() if " " in line)
    return {name: int(value) for name, value in pairs if value.isdigit()}


def kill(cgroup: str) -> None:
    """SIGKILL to every process in it and below, those that fork meanwhile too.  Harmless when it is gone."""
    try:
        write(f"{cgroup}/cgroup.kill", "1")
    except OSError:
        pass


def populated(cgroup: str) -> bool:
    """Whether a process lives in it or below."""
    return table(read(f"{cgroup}/cgroup.events")).get("populated", 0) == 1


def oom_kills(cgroup: str) -> int:
    """Processes that were killed because the cgroup was out of memory (B29)."""
    return table(read(f"{cgroup}/memory.events")).get("oom_kill", 0)


def refused_forks(cgroup: str) -> int:
    """Forks that failed because the cgroup had as many processes as it may (B31)."""
    return table(read(f"{cgroup}/pids.events")).get("max", 0)


def leaves(cgroup: str) -> list[str]:
    """The cgroup and all below it, deepest first.  What a container has made itself is among them."""
    return [directory for directory, _, _ in os.walk(cgroup, topdown=False)]


def remove(cgroup: str) -> bool:
    """Remove it and all below it; False when a process still lives there.  True when it was gone."""
    try:
        for directory in leaves(cgroup):
            os.rmdir(directory)
    except OSError:
        pass
    return not os.path.isdir(cgroup)  # what could not even be looked through is still there


def files_of_resources(resources: dict[str, Any]) -> dict[str, str]:
    """File -> text of an update: `memory_bytes`, `cpus`, `pids`; None leaves one as it is, -1 removes a limit.

    Raises `NotSupported` for other names, `InvalidRequest` for what is not above 0 (B28).
    """
    unknown = sorted(set(resources) - set(RESOURCES))
    if unknown:
        raise NotSupported(
            f"the resource {unknown[0]!r} cannot be updated", hint=f"these can: {', '.join(RESOURCES)}"
        )
    files = {}
    for name, value in resources.items():
        if value is None:
            continue
        number = type(value) in ((int, float) if name == "cpus" else (int,))
        if not number or not (value == -1 or 0 < value < 1 << 63):
            raise InvalidRequest(f"{name} must be above 0, or -1 for no limit; not {value!r}", field=name)
        files.update(_files(name, value))
    return files


def _files(name: str, value: Any) -> dict[str, str]:
    if name == "memory_bytes":
        return {"memory.max": _limit(value), "memory.swap.max": "max" if value == -1 else "0"}
    if name == "pids":
        return {"pids.max": _limit(value)}
    quota = "max" if value == -1 else str(max(MIN_CPU_QUOTA, int(value * CPU_PERIOD)))
    return {"cpu.max": f"{quota} {CPU_PERIOD}"}


def _limit(value: int) -> str:
    return "max" if value == -1 else str(value)


def take_limits(spec: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """The limits of an OCI spec as files, and the spec without them.

    The agent sets them when the container is created, so that they can be seen and changed from then on (B27).
    What else `linux.resources` has (devices, weights) is the runtime's.
    """
    linux = dict(spec.get("linux", {}))
    resources = dict(linux.get("resources") or {})
    memory, cpu, pids = (dict(resources.pop(name, None) or {}) for name in ("memory", "cpu", "pids"))
    limit, quota, period = memory.pop("limit", None), cpu.pop("quota", None), cpu.pop("period", None)
    memory.pop("swap", None)  # a virtual machine's containers do not swap
    wanted = {"memory_bytes": _none_or_limit(limit), "pids": _none_or_limit(pids.get("limit"))}
    files = files_of_resources(wanted)
    if quota is not None and quota > 0:
        files["cpu.max"] = f"{max(MIN_CPU_QUOTA, int(quota))} {int(period or CPU_PERIOD)}"
    resources.update({name: rest for name, rest in (("memory", memory), ("cpu", cpu)) if rest})
    linux["resources"] = resources
    return files, {**spec, "linux": linux}


def _none_or_limit(value: Any) -> int | None:
    """OCI says "no limit" as -1, and by habit as 0."""
    if value is not None and type(value) is not int:
        raise InvalidRequest(f"a limit of the spec is {value!r}, not a number", field="resources")
    return value if value is None or value > 0 else -1


def apply(cgroup: str, files: dict[str, str]) -> None:
    """Write limits; when one fails, those before it are put back (B28).  May block: for helper children."""
    done: list[tuple[str, str]] = []
    name = ""
    try:
        for name, text in files.items():
            path = f"{cgroup}/{name}"
            before = read(path).strip()
            if not before and name == "memory.swap.max":
                continue  # a kernel without swap accounting has no swap either
            write(path, text)
            done.append((path, before))
    except OSError as error:
        for path, before in reversed(done):
            write(path, before)
        raise StorageFailed(f"{name}: {error.strerror}; no limit was changed", errno=error.errno) from error
