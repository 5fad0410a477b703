"""`Owner`: what `UtilityVM` asks of whoever holds the machine.

    MachineOwner   this process holds it; its end is the VM's end (B43)
    KeeperClient   a keeper process holds it; this process is one of its clients (`byre.keeper`)

Rule: only what needs the machine itself goes through here; everything else goes over the bridge to the agent.
"""

from __future__ import annotations

import abc
import asyncio
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import InvalidRequest, NotSupported
from .events import DiskEvent
from .journal import Journal

if TYPE_CHECKING:
    from .bridge import Bridge
    from .container_disks import ContainerDisks, Scratch
    from .events import Event
    from .journal import Events
    from .machines.balloon import Reclaimed
    from .machines.base import Machine
    from .machines.disks import Disk
    from .networks.registry import Networks
    from .ports.registry import Ports
    from .shares.registry import Shares

#: An emulator that is told to quit does so in milliseconds; after this, in seconds, it is killed.
RELEASE_TIMEOUT = 5.0

#: Between two events of disks that fail, in seconds: a guest can have its reads and writes fail without end.
FAILURE_PAUSE = 1.0


class DiskPlace(NamedTuple):
    """Where a hot-added disk is: SCSI 0:0:`target`:`lun` in the guest."""

    path: Path
    target: int
    lun: int


class Owner(abc.ABC):
    """See the module.  What fails because the VM is gone raises ConnectionLost."""

    #: The VM's id: in logs, and unique on this host.
    id: str
    #: Process id of the emulator; 0 where there is none, or none that this process may see.
    machine_pid: int = 0

    @abc.abstractmethod
    async def attach_disk(self, path: Path) -> DiskPlace:
        """Hot-add a raw image, read-only.  The same one again is counted, not added again (B60, B62)."""

    @abc.abstractmethod
    async def detach_disk(self, place: DiskPlace) -> None:
        """Undo one `attach_disk`.  The guest has let go of it before."""

    @abc.abstractmethod
    async def console(self, lines: int) -> str:
        """The last lines that the guest wrote to its console, escaped (B49)."""

    @abc.abstractmethod
    async def pause(self) -> None:
        """Stop the virtual CPUs."""

    @abc.abstractmethod
    async def resume(self) -> None:
        """Let them run again."""

    @abc.abstractmethod
    async def reclaim(self, memory_mib: int) -> Reclaimed:
        """Leave the guest this much memory.  Raises `NotSupported` for a clone."""

    @abc.abstractmethod
    async def shutdown(self, timeout: float) -> None:
        """End the VM, by force after `timeout` seconds.  Harmless when repeated (B51)."""

    @abc.abstractmethod
    async def kill(self) -> None:
        """End the VM now.  Harmless when repeated."""

    @abc.abstractmethod
    async def wait(self) -> str:
        """Wait for the end of the VM: why it ended."""

    @abc.abstractmethod
    async def info(self) -> dict[str, Any]:
        """What it is made of, and why (accelerator, machine, transport)."""

    @abc.abstractmethod
    def ports(self, bridge: Bridge) -> Ports:
        """The forwards that belong to the VM, and not to a caller."""

    @abc.abstractmethod
    def container_disks(self, bridge: Bridge, name: str) -> ContainerDisks:
        """The disks that containers of the VM, which goes by this name, may write."""

    @abc.abstractmethod
    def shares(self, bridge: Bridge) -> Shares:
        """The directories of this host that the VM has."""

    @abc.abstractmethod
    def networks(self, bridge: Bridge) -> Networks:
        """The ways out that the VM has."""

    @abc.abstractmethod
    def events(self, bridge: Bridge) -> Events:
        """What has happened in the VM, and goes on to happen."""

    @abc.abstractmethod
    def note(self, make: Callable[..., Event], **details: Any) -> None:
        """This process has seen something happen: `make` is the event's class."""

    @abc.abstractmethod
    async def release(self) -> None:
        """This program is done with the VM: it ends where it is ours, and goes on where it is a keeper's."""

    async def probe(self, bridge: Bridge, timeout: float) -> None:
        """One sign of life of the guest's agent (B48).  Raises `DeadlineExceeded`.  A keeper answers pings itself,
        so it is asked for what only the agent can answer."""
        await bridge.call("system.info", timeout=timeout)

    def console_tail(self, lines: int) -> str:
        """`console`, without waiting, where the console is in this process."""
        raise NotSupported("the console of this VM is its keeper's", hint="await vm.console()")


class MachineOwner(Owner):
    """The machine is this process's own."""

    def __init__(self, machine: Machine, begun_with: Iterable[Scratch] = ()) -> None:
        """`begun_with`: the scratches of the containers that were in the machine when it was saved."""
        self.id = machine.id
        self.machine = machine
        self._begun_with = begun_with
        self._disks: dict[tuple[int, int], Disk] = {}
        self._journal = Journal()
        self._failed = -FAILURE_PAUSE

    @property
    def machine_pid(self) -> int:  # type: ignore[override]
        return getattr(self.machine, "pid", None) or 0

    async def probe(self, bridge: Bridge, timeout: float) -> None:
        await bridge.ping(timeout)

    async def attach_disk(self, path: Path) -> DiskPlace:
        disk = await self.machine.attach_disk(path, read_only=True)
        self._disks[disk.target, disk.lun] = disk
        self._note_disk("attached", path)
        return DiskPlace(path, disk.target, disk.lun)

    async def detach_disk(self, place: DiskPlace) -> None:
        disk = self._disks.get((place.target, place.lun))
        if disk is None:
            raise InvalidRequest(f"the disk {place.path} is not attached")
        await self.machine.detach_disk(disk)
        self._note_disk("detached", place.path)

    async def console(self, lines: int) -> str:
        return self.machine.console_tail(lines)

    def console_tail(self, lines: int) -> str:
        return self.machine.console_tail(lines)

    async def pause(self) -> None:
        await self.machine.pause()

    async def resume(self) -> None:
        await self.machine.resume()

    async def reclaim(self, memory_mib: int) -> Reclaimed:
        return await self.machine.reclaim(memory_mib)

    async def shutdown(self, timeout: float) -> None:
        await asyncio.shield(self.machine.shutdown(timeout))

    async def kill(self) -> None:
        await asyncio.shield(self.machine.kill())

    async def wait(self) -> str:
        return str(await self.machine.wait())

    async def info(self) -> dict[str, Any]:
        return {"id": self.id, "pid": self.machine_pid, **self.machine.explanation}

    def ports(self, bridge: Bridge) -> Ports:
        from .ports.registry import HeldPorts

        return HeldPorts(bridge)

    def container_disks(self, bridge: Bridge, name: str) -> ContainerDisks:
        from .container_disks import HeldDisks

        return HeldDisks(self.machine, bridge, name, self._note_disk, self._begun_with)

    def shares(self, bridge: Bridge) -> Shares:
        from .shares.registry import HeldShares

        return HeldShares(bridge)

    def networks(self, bridge: Bridge) -> Networks:
        from .networks.registry import HeldNetworks

        return HeldNetworks(bridge)

    def events(self, bridge: Bridge) -> Events:
        self._journal.listen(bridge)
        self.machine.on_disk_error = self._disk_failed
        return self._journal

    def _note_disk(self, action: str, path: Path) -> None:
        self.note(DiskEvent, action=action, path=os.fspath(path))

    def _disk_failed(self, path: str, reason: str) -> None:
        now = time.monotonic()
        if now - self._failed >= FAILURE_PAUSE:
            self._failed = now
            self.note(DiskEvent, action="failed", path=path, reason=reason)

    def note(self, make: Callable[..., Event], **details: Any) -> None:
        self._journal.add(make, **details)

    async def release(self) -> None:
        await self.shutdown(RELEASE_TIMEOUT)
