"""What happens in a VM, as records: `UtilityVM.events` gives them, in order.

    created, started, killed, oom, pids, exited, deleted   of a container
    health, disk, log                                      of the VM
    missed                                                 of this reader: it was too slow, or came too late
    ended                                                  the VM; nothing follows

Rule: plain records, no I/O.  What a guest said in them (names, log lines) is data: escape it before a terminal
sees it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class Event:
    """number   1, 2, 3, ... of this VM; a gap is told as `Missed`
    time        when the VM's owner heard of it, in seconds since the epoch
    """

    kind: ClassVar[str] = ""
    number: int
    time: float

    def details(self) -> dict[str, Any]:
        """The fields of its kind, by name."""
        found = dataclasses.asdict(self)
        del found["number"], found["time"]
        return found


@dataclass(frozen=True, kw_only=True)
class ContainerEvent(Event):
    container: str


@dataclass(frozen=True, kw_only=True)
class ContainerCreated(ContainerEvent):
    kind = "created"


@dataclass(frozen=True, kw_only=True)
class ContainerStarted(ContainerEvent):
    """`pid`: of its first process, in the VM."""

    kind = "started"
    pid: int


@dataclass(frozen=True, kw_only=True)
class ContainerKilled(ContainerEvent):
    """Somebody asked it to end, by `signal`: its stop signal, or 9.  Its end is an event of its own."""

    kind = "killed"
    signal: int


@dataclass(frozen=True, kw_only=True)
class ContainerOutOfMemory(ContainerEvent):
    """The kernel killed `kills` of its processes, because it had all the memory that it may (B29)."""

    kind = "oom"
    kills: int


@dataclass(frozen=True, kw_only=True)
class ContainerPidsLimit(ContainerEvent):
    """The kernel refused it `refused` forks, because it had all the processes that it may (B31)."""

    kind = "pids"
    refused: int


@dataclass(frozen=True, kw_only=True)
class ContainerExited(ContainerEvent):
    """`code`, `signal` and `oom` as in `ExitStatus`."""

    kind = "exited"
    code: int
    signal: int
    oom: bool


@dataclass(frozen=True, kw_only=True)
class ContainerDeleted(ContainerEvent):
    kind = "deleted"


@dataclass(frozen=True, kw_only=True)
class HealthChanged(Event):
    """`state`: ok, unresponsive, paused (`byre.health`)."""

    kind = "health"
    state: str


@dataclass(frozen=True, kw_only=True)
class DiskEvent(Event):
    """`action`: attached, detached; or failed, with QEMU's `reason` for it (the host's disk is full, say)."""

    kind = "disk"
    action: str
    path: str
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class LogLine(Event):
    """A line of the log of the guest's kernel or agent; `level` is as in `logging`.  `dropped` lines before it were
    lost in the guest."""

    kind = "log"
    source: str
    level: int
    message: str
    dropped: int


@dataclass(frozen=True, kw_only=True)
class Missed(Event):
    """`count` events up to this number are no longer kept."""

    kind = "missed"
    count: int


@dataclass(frozen=True, kw_only=True)
class VMEnded(Event):
    kind = "ended"
    reason: str


KINDS: Mapping[str, type[Event]] = {
    cls.kind: cls
    for cls in (
        *(ContainerCreated, ContainerStarted, ContainerKilled, ContainerOutOfMemory, ContainerPidsLimit),
        *(ContainerExited, ContainerDeleted, HealthChanged, DiskEvent, LogLine, Missed, VMEnded),
    )
}


def to_wire(event: Event) -> list[Any]:
    """As a keeper tells it."""
    return [event.number, event.time, event.kind, event.details()]


def from_wire(told: Sequence[Any]) -> Event | None:
    """What a keeper told; None for a kind that is not known here (a newer keeper's)."""
    number, time, kind, details = told
    cls = KINDS.get(kind)
    return None if cls is None else cls(number=number, time=time, **details)
