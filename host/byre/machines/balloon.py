"""Memory that a running guest gives back to the host, by a virtio balloon.

Rule: only a machine whose memory is nobody else's has one: on a clone's private mapping QEMU 7.2 would punch the
holes into the template's file.  What is reported is what was measured: the guest's memory by QEMU's word, and what
the process has resident by the host kernel's.  Source: QMP `balloon`, `query-balloon`, BALLOON_CHANGE.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from byre.machines.scsi import Execute

#: A balloon that does not move for so long, in seconds, has got what it can: under emulation 64 MiB take one.
PATIENCE = 3.0

MIB = 1024 * 1024


class Reclaimed(NamedTuple):
    """All in bytes: what the guest has now, and what QEMU held of this host's memory before and after."""

    memory: int
    resident_before: int
    resident_after: int


class Balloon:
    """The balloon of one machine."""

    def __init__(self, execute: Execute) -> None:
        self._execute = execute
        self._moved = asyncio.Event()

    def on_change(self) -> None:
        """QEMU's BALLOON_CHANGE event."""
        self._moved.set()

    async def resize(self, memory_mib: int, pid: int) -> Reclaimed:
        """Leave the guest this much, or what it can do with; ends when the balloon no longer moves."""
        before, wanted = resident(pid), memory_mib * MIB
        await self._execute("balloon", {"value": wanted})
        memory = await self._actual()
        while memory != wanted:
            self._moved.clear()
            try:
                async with asyncio.timeout(PATIENCE):
                    await self._moved.wait()
            except TimeoutError:
                break
            memory = await self._actual()
        return Reclaimed(await self._actual(), before, resident(pid))

    async def _actual(self) -> int:
        answer: dict[str, Any] = await self._execute("query-balloon")
        return int(answer["actual"])


def resident(pid: int) -> int:
    """Bytes that a process has in memory (proc_pid_statm(5))."""
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
