"""Which disk is on which place of a machine's SCSI bus, and how many want it there (B60, B62).

Rule: a place is free, or taken by one file, or lost (its removal failed, so nobody may have it again).  Adding and
removing themselves are the machine's; this table only says when.  A file is leased for as long as it has a place,
so that nobody takes a layer for unused (`byre.oci.eviction`).  Of an open file that it was given it has a
descriptor for as long: with it go the locks of whoever opened it, and they end with the emulator, not before.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import stat
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from byre.errors import DeadlineExceeded, InvalidRequest, MachineFailed, ResourceExhausted
from byre.oci.files import Lease
from byre_proto.errors import ByreError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
    from pathlib import Path

logger = logging.getLogger(__name__)

#: One disk per SCSI target; QEMU's virtio-scsi controller has targets 0 to 255, each with LUN 0.
MAX_DISKS = 256

#: How much later than it was told to a removal may give up, in seconds: an emulator that answers does so at once.
LATE = 4.0


#: A disk's serial number is this and a number that no other one of its machine has had.
_SERIAL = "byre"


@dataclass(frozen=True, kw_only=True)
class Disk:
    """A hot-added disk: in the guest SCSI 0:0:``target``:``lun``, with ``serial`` in its VPD page 0x80.

    ``file`` is a descriptor of it, open for writing, where the emulator gets that instead of the path."""

    target: int
    lun: int
    path: Path
    serial: str
    read_only: bool
    file: int | None = None


@dataclass
class _Place:
    disk: Disk
    identity: tuple[int, int]
    references: int = 0
    plugged: bool = False
    lost: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    lease: Lease = field(default_factory=Lease)


class DiskTable:
    """The disks of one machine.  `plug` and `unplug` do the work; `unplug` also tidies after a failed `plug`."""

    def __init__(self, plug: Callable[[Disk], Awaitable[None]], unplug: Callable[[Disk], Awaitable[None]]) -> None:
        self._plug = plug
        self._unplug = unplug
        self._places: dict[tuple[int, int], _Place] = {}
        self._free = list(range(MAX_DISKS - 1, -1, -1))
        self._lost: list[Lease] = []
        self._late: set[asyncio.Future[None]] = set()  # removals that nobody awaits any longer
        self._last_serial = 0
        self._may_change = asyncio.Event()
        self._may_change.set()

    def adopt(self, disks: Iterable[Disk]) -> None:
        """Take in what a saved machine begins with, each attached once."""
        for disk in disks:
            identity = _identity(disk.path, disk.file)
            self._free.remove(disk.target)
            lease = Lease()
            if disk.file is None:
                lease.add(disk.path)
            else:
                disk = dataclasses.replace(disk, file=lease.hold(disk.file))
            self._places[identity] = _Place(disk, identity, references=1, plugged=True, lease=lease)
            self._last_serial = max(self._last_serial, int(disk.serial.removeprefix(_SERIAL)))

    def at(self, target: int) -> Disk | None:
        """The disk at a place of the bus."""
        return next((place.disk for place in self._places.values() if place.disk.target == target), None)

    @asynccontextmanager
    async def still(self) -> AsyncIterator[tuple[Disk, ...]]:
        """The disks that are attached; within the context it stays so, and whoever wants another one waits."""
        await self._may_change.wait()
        self._may_change.clear()
        try:
            for place in list(self._places.values()):
                async with place.lock:  # who has come this far goes first
                    pass
            yield tuple(place.disk for place in self._places.values() if place.plugged)
        finally:
            self._may_change.set()

    async def attach(self, path: Path, *, read_only: bool, file: int | None = None) -> Disk:
        """See `Machine.attach_disk`."""
        place = self._place_of(path, read_only, file)
        place.references += 1
        try:
            await self._may_change.wait()
            async with place.lock:
                if not place.plugged:
                    await self._plug_or_tidy(place)
        except BaseException:
            self._let_go(place)
            raise
        return place.disk

    async def detach(self, disk: Disk) -> None:
        """See `Machine.detach_disk`."""
        place = next((p for p in self._places.values() if p.disk is disk), None)
        if place is None or not place.plugged:
            raise InvalidRequest(f"the disk {disk.path} is not attached")
        try:
            await self._may_change.wait()
            async with place.lock:
                if place.references == 1:  # nobody else wants it, or came to want it while this waited
                    await self._remove(place)
        finally:
            self._let_go(place)

    def end(self) -> None:
        """The machine is gone, and needs no file any more."""
        for lease in (*self._lost, *(place.lease for place in self._places.values())):
            lease.close()

    async def _plug_or_tidy(self, place: _Place) -> None:
        try:
            await self._plug(place.disk)
        except BaseException:
            try:
                await self._remove(place, LATE)
            except ByreError as error:  # what went wrong first is what the caller hears of
                logger.warning("! the place of %s is lost: %s", place.disk.path, error)
            raise
        place.plugged = True

    async def _remove(self, place: _Place, patience: float | None = None) -> None:
        """Unplug to the end, also when cancelled: half a removal is worse than a late cancellation, but no later
        than by LATE.  What takes longer goes on, and the place is lost."""
        place.plugged = False
        work = asyncio.ensure_future(self._unplug(place.disk))
        cancelled: asyncio.CancelledError | None = None
        waiting = True
        while waiting and not work.done():
            try:
                waiting = bool((await asyncio.wait({work}, timeout=patience))[0])
            except asyncio.CancelledError as error:
                cancelled, patience = error, LATE
        if not work.done():
            self._late.add(work)
            work.add_done_callback(self._ended_late)
        place.lost = not work.done() or work.cancelled() or work.exception() is not None
        if cancelled is not None:
            raise cancelled
        if not work.done():
            raise DeadlineExceeded(f"the disk {place.disk.path} was not removed within {patience} s")
        work.result()

    def path_of(self, serial: str) -> str:
        """Of the disk with this serial; "" where there is none."""
        disks = (place.disk for place in self._places.values())
        return next((str(disk.path) for disk in disks if disk.serial == serial), "")

    def _ended_late(self, work: asyncio.Future[None]) -> None:
        self._late.discard(work)
        if not work.cancelled() and work.exception() is not None:
            logger.warning("! a disk could not be removed: %s", work.exception())

    def _place_of(self, path: Path, read_only: bool, file: int | None) -> _Place:
        identity = _identity(path, file)
        place = self._places.get(identity)
        if place is None:
            if not self._free:
                raise ResourceExhausted(
                    f"no place for another disk: all {MAX_DISKS} are taken", hint="use another virtual machine"
                )
            self._last_serial += 1
            serial = f"{_SERIAL}{self._last_serial}"
            lease = Lease()
            held = None if file is None else lease.hold(file)
            if held is None and path.is_file():
                lease.add(path)
            disk = Disk(target=self._free.pop(), lun=0, path=path, serial=serial, read_only=read_only, file=held)
            place = self._places[identity] = _Place(disk, identity, lease=lease)
        elif place.disk.read_only != read_only:
            how = "read-only" if place.disk.read_only else "writable"
            raise InvalidRequest(f"{path} is attached already, {how}", hint="detach it first")
        return place

    def _let_go(self, place: _Place) -> None:
        place.references -= 1
        if not place.references:
            del self._places[place.identity]
            if place.lost:
                self._lost.append(place.lease)  # the emulator may still have it open
            else:
                place.lease.close()
                self._free.append(place.disk.target)


def _identity(path: Path, file: int | None) -> tuple[int, int]:
    """What makes two paths the same disk.  Only files and block devices: QEMU would block opening a FIFO."""
    try:
        status = path.stat() if file is None else os.fstat(file)
    except OSError as error:
        raise MachineFailed(f"cannot attach the disk {path}: {error.strerror}", path=str(path)) from error
    if stat.S_ISBLK(status.st_mode):
        return status.st_rdev, 0
    if not stat.S_ISREG(status.st_mode):
        raise InvalidRequest(f"{path} is neither a file nor a block device", path=str(path))
    return status.st_dev, status.st_ino
