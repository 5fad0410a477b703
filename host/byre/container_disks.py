"""The disks that containers may write: scratches and volumes, held as long as a container has them.

    HeldDisks     in the process that holds the VM
    KeeperDisks   a client's view of those that a keeper holds

    hold    locked -> attached -> mounted in the guest    a volume that several containers have is there once
    drop    unmounted in the guest -> detached -> free    when the last of them is gone (B60)

Rule: what one container holds has a *lease*, drawn anew for each attempt to create one.  Whoever makes the
container drops it when that fails; from then on the guest's word that the container is deleted does, whoever
deleted it.  A maker that died in between is found out by asking the guest.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .errors import ByreError, ConnectionLost, ContainerNotFound
from .machines.spawn import stoppable

if TYPE_CHECKING:
    from .bridge import Bridge
    from .calls import Result
    from .machines.base import Machine
    from .machines.disks import Disk

logger = logging.getLogger(__name__)

#: Seconds after which a lease is dropped that no container came to have: a creation's deadline, and more.
CLAIM_TIMEOUT = 180.0

#: For what was written to be on the disks when the VM is shut down, in seconds.
SYNC_TIMEOUT = 10.0

#: The file system that `disk_files` makes.
FILESYSTEM = "ext4"


class Scratch(NamedTuple):
    """A scratch that a container has, to be found again in a clone of its VM: whose it is, what it is called, its
    place on the bus, and the guest's name of it."""

    lease: str
    path: Path
    target: int
    name: str


class ContainerDisks(abc.ABC):
    """See the module."""

    @abc.abstractmethod
    async def hold(self, lease: str, container: str, volume: Path | None, size: int) -> str:
        """The guest's name of a volume's disk; of a new scratch of `size` bytes where `volume` is None.

        Raises `VolumeInUse`, `VolumeNotFound`, `ResourceExhausted` (B62), `StorageFailed`.
        """

    @abc.abstractmethod
    async def drop(self, lease: str) -> None:
        """No container has this lease, or has it any more.  Harmless when repeated."""

    def scratches(self) -> tuple[Scratch, ...]:
        """Those that containers have now, where this process holds them."""
        return ()

    @abc.abstractmethod
    async def sync(self) -> None:
        """The VM is about to be shut down: what was written is on the disks."""


class _Held:
    def __init__(self, path: Path) -> None:
        self.path = path  # what it is called
        self.lock = asyncio.Lock()
        self.leases: set[str] = set()
        self.disk: Disk | None = None
        self.name = ""  # as the guest calls it; "" while it is not mounted


class HeldDisks(ContainerDisks):
    """See the module.  `vm` is the name that others see who want a volume that is held here."""

    def __init__(
        self,
        machine: Machine,
        bridge: Bridge,
        vm: str,
        note: Callable[[str, Path], None],
        begun_with: Iterable[Scratch] = (),
    ) -> None:
        """`note("attached" or "detached", path)` tells those who follow what happens."""
        self._note = note
        self._machine = machine
        self._bridge = bridge
        self._vm = vm
        self._held: dict[Path | str, _Held] = {}  # by a volume's path, or a scratch's lease
        self._claimed: set[str] = set()
        for scratch in begun_with:
            held = self._held[scratch.lease] = _Held(scratch.path)
            held.leases.add(scratch.lease)
            held.disk, held.name = machine.disk_at(scratch.target), scratch.name
        bridge.subscribe("container.deleted", None, self._on_deleted)

    def scratches(self) -> tuple[Scratch, ...]:
        return tuple(
            Scratch(key, held.path, held.disk.target, held.name)
            for key, held in self._held.items()
            if isinstance(key, str) and held.disk is not None
        )

    async def hold(self, lease: str, container: str, volume: Path | None, size: int) -> str:
        from . import disk_files, volumes  # most VMs have none

        if volume is None:
            disk_files.check_size(size)

        def opened(check: Callable[[], None]) -> int:
            return disk_files.scratch(size) if volume is None else volumes.take(volume, self._vm, check)

        key = volume or lease
        held = self._held.setdefault(key, _Held(volume or Path(f"scratch of {container}")))
        held.leases.add(lease)
        self._expect(lease, container)
        try:
            async with held.lock:
                if not held.name:
                    await self._attach(held, opened)
                return held.name
        except BaseException:
            held.leases.discard(lease)
            self._forget_unused(key)
            raise

    async def _attach(self, held: _Held, opened: Callable[[Callable[[], None]], int]) -> None:
        """`opened` blocks, and gives a descriptor, with whatever locks there are."""
        fd = await stoppable(opened, undo=os.close)
        try:
            disk = await self._machine.attach_disk(held.path, read_only=False, file=fd)
        finally:
            os.close(fd)  # the machine has its own
        try:
            answer = await self._bridge.call(
                "disk.mount",
                undo=lambda _: self._unmount(disk),
                target=disk.target,
                lun=disk.lun,
                filesystem=FILESYSTEM,
            )
        except BaseException:
            await self._bridge.finish(self._detach_quietly(disk))
            raise
        held.disk, held.name = disk, answer["layer"]
        self._note("attached", held.path)

    async def _unmount(self, disk: Disk) -> None:
        await self._bridge.call("disk.unmount", target=disk.target, lun=disk.lun)

    async def _detach_quietly(self, disk: Disk) -> None:
        """The error that led to it is the one to tell."""
        with contextlib.suppress(ByreError):
            await self._machine.detach_disk(disk)

    async def drop(self, lease: str) -> None:
        self._claimed.discard(lease)
        for key, held in list(self._held.items()):
            if lease in held.leases:
                async with held.lock:  # who comes second waits for the first
                    if held.leases != {lease} or await self._removed(held):
                        held.leases.discard(lease)
                self._forget_unused(key)

    async def _removed(self, held: _Held) -> bool:
        """False where the guest does not let go of it: it stays, with its lease."""
        disk = held.disk
        if disk is None:
            return True
        try:
            await self._unmount(disk)
            held.disk, held.name = None, ""
            await self._machine.detach_disk(disk)
            self._note("detached", held.path)
        except ConnectionLost:
            pass  # the machine's end frees it
        except ByreError as error:
            logger.warning("! vm %s keeps %s: %s", self._vm, held.path, error)
        return held.disk is None

    def _forget_unused(self, key: Path | str) -> None:
        held = self._held.get(key)
        if held is not None and not held.leases and not held.name:
            del self._held[key]

    def _on_deleted(self, event: Result | ConnectionLost) -> None:
        if not isinstance(event, ConnectionLost) and event["lease"]:
            self._bridge.background(self.drop(event["lease"]))

    def _expect(self, lease: str, container: str) -> None:
        if lease not in self._claimed:
            self._claimed.add(lease)
            asyncio.get_running_loop().call_later(CLAIM_TIMEOUT, self._look, lease, container)

    def _look(self, lease: str, container: str) -> None:
        if lease in self._claimed and self._bridge.lost is None:
            self._bridge.background(self._drop_unclaimed(lease, container))

    async def _drop_unclaimed(self, lease: str, container: str) -> None:
        try:
            found = (await self._bridge.call("container.state", container=container))["state"].get("lease")
        except ContainerNotFound:
            found = None
        if found != lease:
            await self.drop(lease)

    async def sync(self) -> None:
        if any(held.name for held in self._held.values()):
            try:
                await self._bridge.call("disk.sync", timeout=SYNC_TIMEOUT)
            except ByreError as error:
                logger.warning("! vm %s: what was written last may be lost: %s", self._vm, error)


class KeeperDisks(ContainerDisks):
    """See the module."""

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge
        self._leases: set[str] = set()  # most containers have none

    async def hold(self, lease: str, container: str, volume: Path | None, size: int) -> str:
        self._leases.add(lease)
        answer = await self._bridge.call(
            "vm.hold_disk",
            undo=lambda _: self.drop(lease),
            lease=lease,
            container=container,
            path="" if volume is None else os.fspath(volume),
            size=size,
        )
        name: str = answer["disk"]
        return name

    async def drop(self, lease: str) -> None:
        if lease in self._leases:
            with contextlib.suppress(ConnectionLost):  # with the VM, or else the keeper does it
                await self._bridge.call("vm.drop_disks", lease=lease)
            self._leases.discard(lease)

    async def sync(self) -> None:
        """The keeper does, when it shuts the VM down."""
