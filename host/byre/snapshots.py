"""Snapshots: a VM as it is at one moment, and clones of it; the VM itself goes on.

    snap = await vm.snapshot()
    async with snap, snap.clone() as vm2: ...

All that runs in the VM runs in each clone: processes, containers (`vm2.open_container` finds them), what they have
written, to their scratch disks too.  A clone has a clock, random numbers, a host name, a machine id and a secret of
its own before any of its processes runs on (B52).  What leads to this program stays with the VM that was saved:
calls under way, streams of processes, forwards and exposed sockets.  In a clone they have ended as if this program
had: a process reads the end of its stdin, and gets a broken pipe where it writes to a stream that was asked for.

Rule: a snapshot is what a template is, taken at another moment: the same `Machine.save` and the same boot.  Its
files have no name, so they go with this program; the layers on its disks are leased for as long.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Self

from byre_proto.messages import QUIET

from . import disk_files, templates
from .boot import boot
from .clone import CLONE_SCALE, QUIESCE_TIMEOUT, Origin
from .errors import InvalidRequest, ResourceExhausted
from .machines.spawn import stoppable
from .oci.files import Lease

if TYPE_CHECKING:
    from .boot import Booted
    from .bridge import Bridge
    from .container_disks import ContainerDisks, Scratch
    from .machines.base import Machine
    from .machines.config import Saved
    from .machines.disks import Disk
    from .vm import UtilityVM


class Snapshot:
    """See the module.  Made by `UtilityVM.snapshot`; an async context manager, or `close` it."""

    def __init__(
        self, origin: Origin, saved: Saved, scratches: tuple[Scratch, ...], held: contextlib.ExitStack
    ) -> None:
        """`held` is what lasts as long as the snapshot."""
        self.origin = origin
        self.scratches = scratches
        self._saved = saved
        self._held = held
        self._closed = False

    def clone(self, name: str = "") -> UtilityVM:
        """A VM that goes on from here, not yet started: ``async with snap.clone() as vm2``.

        `name` is its host name, as for any `UtilityVM`.
        """
        from .vm import UtilityVM

        return UtilityVM.from_snapshot(self, name)

    async def boot(self, hostname: str, timeout: float | None) -> Booted:
        """Start a clone.  Raises what booting raises, and `InvalidRequest` when the snapshot is closed."""
        if self._closed:
            raise InvalidRequest("the snapshot is closed", hint="start its clones before")
        with contextlib.ExitStack() as held:
            saved = dataclasses.replace(self._saved, disks=await _copied(self._saved.disks, held))
            machine = self.origin.make(dataclasses.replace(self.origin.config, saved=saved))
            machine.explanation["template"] = "none: it goes on from a snapshot"
            return await boot(machine, hostname=hostname, timeout=timeout, scale=CLONE_SCALE)

    async def close(self) -> None:
        """No more clones; those that run are not touched.  Harmless when repeated."""
        self._closed = True
        self._held.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


async def take(machine: Machine, bridge: Bridge, origin: Origin, disks: ContainerDisks) -> Snapshot:
    """See `UtilityVM.snapshot`.  Whatever comes of it, the VM runs on."""
    with contextlib.ExitStack() as held:
        memory, state = _unnamed(held), _unnamed(held)
        try:
            await bridge.call("system.quiesce", timeout=QUIESCE_TIMEOUT, freeze=True)
            saved = await machine.save(memory, state)
            scratches = disks.scratches()
            saved = dataclasses.replace(saved, disks=await _copied(saved.disks, held), host_gone=QUIET)
        finally:
            await bridge.finish(_go_on(machine, bridge))
        lease = held.enter_context(Lease())
        for disk in saved.disks:
            if disk.file is None:
                lease.add(disk.path)
        return Snapshot(origin, saved, scratches, held.pop_all())


async def _copied(disks: Iterable[Disk], held: contextlib.ExitStack) -> tuple[Disk, ...]:
    """The same disks, those that a guest can write to as copies, which last as long as `held`."""
    copies = []
    with contextlib.ExitStack() as sources:  # the machine that has them may end meanwhile
        for disk in disks:
            if disk.file is not None:
                source = os.dup(disk.file)
                sources.callback(os.close, source)
                disk = dataclasses.replace(disk, file=source)
            copies.append(disk)
        for at, disk in enumerate(copies):
            if disk.file is not None:
                copy = await stoppable(partial(disk_files.copied, disk.file), undo=os.close)
                held.callback(os.close, copy)
                copies[at] = dataclasses.replace(disk, file=copy)
    return tuple(copies)


async def _go_on(machine: Machine, bridge: Bridge) -> None:
    await machine.resume()
    await bridge.call("system.configure", realtime_ns=time.time_ns())


def _unnamed(held: contextlib.ExitStack) -> Path:
    """A file that lasts as long as `held`, and a path to it for this process and the emulator's."""
    root = templates.Store().root
    problem = templates.room_problem(root)
    if problem:
        raise ResourceExhausted(f"there is no room for a snapshot: {problem}")
    file: BinaryIO = held.enter_context(tempfile.TemporaryFile(dir=root))  # noqa: SIM115
    return Path(f"/proc/{os.getpid()}/fd/{file.fileno()}")
