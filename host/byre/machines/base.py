"""A machine is one virtual machine's life: start, channel, disks, pause, end.

Rule: every way a life can end is published once, as a `MachineExit`, and everything that waits hears of it.
A machine knows nothing of the protocol spoken over its channel, and of no container.
"""

from __future__ import annotations

import abc
import asyncio
import os
import secrets
import signal as signals
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from byre.errors import ConnectionLost, NotSupported
from byre.machines.config import MachineConfig, Saved
from byre.machines.console import ConsoleRing
from byre.machines.disks import Disk, DiskTable

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from byre.machines.balloon import Reclaimed

__all__ = ["Disk", "Identity", "Machine", "MachineConfig", "MachineExit"]


@dataclass(frozen=True, kw_only=True)
class MachineExit:
    """How the machine ended.  ``returncode`` or ``signal`` is set; neither if no process of its own ran."""

    #: "guest-shutdown", "guest-reset" (a panic, or the end of PID 1), "host-quit", "killed", "failed",
    #: "never-started"
    reason: str
    returncode: int | None = None
    signal: int | None = None
    #: The last lines that the emulator wrote to stderr, made printable.
    stderr: str = ""

    def __str__(self) -> str:
        how = ""
        if self.signal is not None:
            known = self.signal in set(signals.Signals)
            how = f", by {signals.Signals(self.signal).name if known else f'signal {self.signal}'}"
        elif self.returncode:
            how = f", status {self.returncode}"
        text = f"the virtual machine ended ({self.reason}{how})"
        return f"{text}: {self.stderr}" if self.stderr else text


@dataclass(frozen=True, kw_only=True)
class Identity:
    """``facts`` must be the same (JSON values), ``tsc_khz`` about the same: it is measured each time anew."""

    facts: dict[str, Any]
    tsc_khz: int | None


class Machine(abc.ABC):
    """One virtual machine: made, started once, ended once.  Its methods belong to one event loop.

    What fails because the machine has ended raises ConnectionLost; what the emulator refuses, MachineFailed;
    what it does not answer in time, DeadlineExceeded.
    """

    def __init__(self) -> None:
        self.id = secrets.token_hex(6)
        #: What was chosen, and why; in `UtilityVM.info`.
        self.explanation: dict[str, str] = {}
        #: Called with a disk's path and QEMU's words when reading or writing it failed here, on the host.
        self.on_disk_error: Callable[[str, str], object] = lambda path, reason: None
        self._console = ConsoleRing()
        self._exit: MachineExit | None = None
        self._ended = asyncio.Event()
        self._waiting: set[_UntilEnd] = set()
        self._disks = DiskTable(self._plug, self._unplug)

    @property
    def exited(self) -> MachineExit | None:
        """How it ended; None while it has not."""
        return self._exit

    @property
    def secret(self) -> bytes | None:
        """What host and agent prove to each other that they know; None on a channel no other can reach."""
        return None

    @property
    def lossy(self) -> bool:
        """Whether the channel may lose or change bytes, or carries others in between: a serial line."""
        return False

    @property
    def redialled(self) -> bool:
        """Whether `connect` gives another channel when one was cut, to the same agent."""
        return False

    def on_noise(self, data: bytes) -> None:
        """Bytes of a lossy channel that were not the agent's: where the console is on the same line, its text."""
        self._console.feed(data)

    async def wait(self) -> MachineExit:
        """Wait for the end.  Any number of tasks may, and each can be cancelled alone."""
        await self._ended.wait()
        assert self._exit is not None
        return self._exit

    def console_tail(self, lines: int = 40) -> str:
        """The last lines that the guest wrote to its serial console, escaped for a terminal (B40, B49)."""
        return self._console.tail(lines)

    async def wait_console(self, text: str) -> None:
        """Wait until the guest's console shows `text`; ConnectionLost when the machine ends first."""
        loop = asyncio.get_running_loop()
        found = asyncio.Event()
        with self._console.watch(text, lambda: loop.call_soon_threadsafe(found.set)), self._until_end():
            await found.wait()

    async def attach_disk(self, path: Path, *, read_only: bool = True, file: int | None = None) -> Disk:
        """Hot-add the raw image (a file or block device) at `path`; the same one twice is attached once (B60).

        `file` is a descriptor of it, open for writing, the caller's to close: the machine has one of its own, with
        the same locks, until the disk is gone from it; `path` is then only what it is called.  The guest sees it as
        SCSI 0:0:``disk.target``:``disk.lun``.  ResourceExhausted beyond the last place (B62).  After an error or a
        cancellation it is not attached.
        """
        self._check_alive()
        with self._until_end():
            return await self._disks.attach(path, read_only=read_only, file=file)

    def disk_at(self, target: int) -> Disk | None:
        """The disk at a place of its bus: what a machine that goes on from another's state began with."""
        return self._disks.at(target)

    async def detach_disk(self, disk: Disk) -> None:
        """Undo one `attach_disk`; the last one removes the disk (B60).  The guest must have let go of it before.
        Harmless when the machine has ended."""
        if self._exit is None:
            await self._disks.detach(disk)

    @abc.abstractmethod
    async def start(self) -> None:
        """Start it, once.  After an error or a cancellation nothing of it is left (B41)."""

    @abc.abstractmethod
    async def connect(self) -> socket.socket:
        """A connected, non-blocking stream socket to the guest's agent, the caller's to close.  It may have to
        wait for the agent to dial; the deadline is the caller's."""

    @abc.abstractmethod
    async def pause(self) -> None:
        """Stop the virtual CPUs; harmless when they are stopped."""

    @abc.abstractmethod
    async def resume(self) -> None:
        """Let the virtual CPUs run; harmless when they do."""

    async def identity(self) -> Identity:
        """What a state must have been saved by, so that this machine can go on from it.

        NotSupported for a machine that cannot be saved.
        """
        raise NotSupported("machines of this kind cannot be saved")

    async def reclaim(self, memory_mib: int) -> Reclaimed:
        """Have the guest give memory back until it has `memory_mib`, or take it again; what came of it."""
        raise NotSupported(
            "the memory of a clone is its template's until it is written: none of it can be given back alone",
            hint='a VM that boots by itself (template="off") can',
        )

    async def hang_up(self) -> None:
        """Give up the channel for good, so that the guest can be saved: a clone's host finds it free."""
        raise NotSupported("machines of this kind cannot be saved")

    async def save(self, memory: Path, state: Path) -> Saved:
        """Stop it and write its memory and the state of its devices to two files, which are made or replaced.

        `resume` lets it go on.  What the guest can write to and nobody else can is still the machine's own file: it
        is for the caller to copy it before that.  NotSupported for machines that cannot be saved, and, by its path,
        for a disk that the guest can write to and that has a name: others may have it too.
        """
        self._check_alive()
        async with self._disks.still() as disks:
            for disk in disks:
                if not disk.read_only and (disk.file is None or os.fstat(disk.file).st_nlink):
                    raise NotSupported(
                        f"the guest can write to the disk {disk.path}, which is not this VM's alone",
                        hint="detach it first: delete the containers that have it",
                    )
            with self._until_end():
                await self._save(memory, state)
        return Saved(memory=memory, state=state, disks=disks)

    @abc.abstractmethod
    async def shutdown(self, timeout: float) -> None:
        """End the machine in order, or by force after `timeout` seconds.  This is the power switch: the guest's
        own clean end is asked of its agent before.  Harmless when repeated (B51)."""

    @abc.abstractmethod
    async def kill(self) -> None:
        """End it now and wait until nothing of it is left.  Harmless when repeated, and from two tasks (B51)."""

    async def _save(self, memory: Path, state: Path) -> None:
        """`save`, while no disk comes or goes."""
        raise NotSupported("machines of this kind cannot be saved")

    @abc.abstractmethod
    async def _plug(self, disk: Disk) -> None:
        """Add the disk; `_unplug` is called if this fails or is cancelled."""

    @abc.abstractmethod
    async def _unplug(self, disk: Disk) -> None:
        """Remove the disk, or what there is of it."""

    def _publish(self, how: MachineExit) -> None:
        if self._exit is None:
            self._exit = how
            self._ended.set()
            self._disks.end()
            for waiting in list(self._waiting):
                waiting.end()

    def _check_alive(self) -> None:
        if self._exit is not None:
            raise ConnectionLost(str(self._exit), hint="start another virtual machine")

    @contextmanager
    def _until_end(self) -> Iterator[None]:
        """Turn the machine's end into ConnectionLost for the task inside (in the way of `asyncio.timeout`)."""
        self._check_alive()
        waiting = _UntilEnd()
        self._waiting.add(waiting)
        try:
            yield
        except asyncio.CancelledError:
            if waiting.ended and waiting.task.uncancel() <= waiting.cancelling:
                self._check_alive()
            raise
        finally:
            self._waiting.discard(waiting)


class _UntilEnd:
    def __init__(self) -> None:
        task: asyncio.Task[Any] | None = asyncio.current_task()
        assert task is not None
        self.task = task
        self.cancelling = task.cancelling()
        self.ended = False

    def end(self) -> None:
        self.ended = True
        self.task.cancel()
