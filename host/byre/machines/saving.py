"""Saving a QEMU, and what one has that goes on from where another was saved.

    base     the memory that it began with, open for as long as it may be saved itself
    channel  its end of the channel, kept back until its guest has noticed that the host it was saved with is gone

Rule: what can be copied while the machine runs is copied before it stops.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

from byre.errors import MachineFailed
from byre.machines import guest_memory
from byre.machines.spawn import stoppable

if TYPE_CHECKING:
    from byre.machines.config import Saved
    from byre.machines.migration import Migration
    from byre.machines.qmp import Qmp
    from byre.transports.base import Wiring

#: The name under which QEMU knows the descriptor of the channel.
_CHANNEL = "channel"


class Continuation:
    """See the module; of one machine, empty for one that boots.  `close` it."""

    def __init__(self) -> None:
        self._base = -1
        self._channel: tuple[str, int] | None = None

    def open(self, saved: Saved, handed: list[int]) -> tuple[Saved, int]:
        """Take up what was saved: it, as QEMU is to know it, and the descriptor of its state.  `handed` gets all
        descriptors that QEMU is to have.  Raises `MachineFailed`.

        The memory's path may be of one of this process's own descriptors, which QEMU cannot follow from its user
        namespace: so it gets a descriptor, too."""
        self._base = _open(saved.memory)
        handed.append(memory := os.dup(self._base))
        handed.append(state := _open(saved.state))
        disks = []
        for disk in saved.disks:
            if disk.file is not None:
                handed.append(os.dup(disk.file))
                disk = dataclasses.replace(disk, file=handed[-1])
            disks.append(disk)
        return dataclasses.replace(saved, memory=Path(f"/proc/self/fd/{memory}"), disks=tuple(disks)), state

    def keep_back(self, wiring: Wiring) -> None:
        """Take over the end of the channel that the guest is not to find yet, if there is one."""
        self._channel = wiring.later

    @property
    def waits(self) -> bool:
        """Whether the channel is kept back."""
        return self._channel is not None

    async def show_channel(self, qmp: Qmp) -> None:
        """Let the guest find a host."""
        assert self._channel is not None
        chardev, fd = self._channel
        qmp.send_fd(fd)
        await qmp.execute("getfd", {"fdname": _CHANNEL})
        socket = {"addr": {"type": "fd", "data": {"str": _CHANNEL}}, "server": False}
        await qmp.execute("chardev-change", {"id": chardev, "backend": {"type": "socket", "data": socket}})
        os.close(fd)
        self._channel = None

    async def save(self, qmp: Qmp, migration: Migration, pid: int, size: int, memory: Path, state: Path) -> int:
        """Stop QEMU, the process `pid` with `size` bytes of memory, and save it; the bytes that it had written."""
        with memory.open("wb") as file:
            target = file.fileno()
            if self._base >= 0:
                with os.fdopen(os.dup(self._base)) as base:  # the machine may end meanwhile
                    await stoppable(lambda check: guest_memory.copy_base(base.fileno(), target, check))
            with state.open("wb") as devices:
                await migration.save(qmp.send_fd, devices)
            answer = await qmp.execute("human-monitor-command", {"command-line": "gpa2hva 0"})
            address = guest_memory.parse_address(answer)
            return await stoppable(lambda check: guest_memory.copy_written(pid, address, size, target, check))

    def close(self) -> None:
        """Harmless when repeated."""
        if self._base >= 0:
            os.close(self._base)
            self._base = -1
        if self._channel is not None:
            os.close(self._channel[1])
            self._channel = None


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise MachineFailed(f"cannot read {path} of a saved machine: {error.strerror}") from error
