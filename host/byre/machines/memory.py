"""A machine with nothing in it: a socket pair, and whoever is given its far end plays the guest.

Rule: it keeps every promise of `Machine` that does not need a kernel, and the same conformance suite says so.  It
does nothing by itself; a test tells it to die, to hang, or to write on its console.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from byre.errors import DeadlineExceeded, MachineFailed, NotSupported
from byre.machines.base import Identity, Machine, MachineExit
from byre.transports.memory import MemoryTransport

if TYPE_CHECKING:
    import socket
    from pathlib import Path

    from byre.machines.config import MachineConfig
    from byre.machines.disks import Disk

#: What it saves, there being nothing in it.
_MEMORY, _STATE = b"memory of nothing", b"state of nothing"

#: Plays the guest: takes the channel's far end, its own to close, and gives what is to be called at the end.
Guest = Callable[["socket.socket"], Callable[[], object]]


class MemoryMachine(Machine):
    """``guest`` is called by `start`.  ``disks`` are those attached now, ``running`` is False while paused."""

    def __init__(self, guest: Guest, *, secret: bytes | None = None, config: MachineConfig | None = None) -> None:
        """With a `config` it can be saved: nothing of it is used but `saved`."""
        super().__init__()
        self._config = config
        self.disks: dict[int, Disk] = {}
        self.running = False
        self._guest = guest
        self._end_guest: Callable[[], object] = lambda: None
        self._transport = MemoryTransport(secret)
        self._started = False
        self._answers = asyncio.Event()
        self._answers.set()

    @property
    def secret(self) -> bytes | None:
        return self._transport.secret

    async def start(self) -> None:
        if self._started:
            raise MachineFailed("a machine starts once", hint="make another one")
        self._started = True
        self._load()
        self._transport.open()
        assert self._transport.guest is not None
        try:
            self._end_guest = self._guest(self._transport.guest)
        except BaseException:
            self._transport.guest.close()
            self.die("never-started")
            raise
        self.running = True

    async def connect(self) -> socket.socket:
        self._check_alive()
        if not self._started:
            raise MachineFailed("the machine has not been started")
        return await self._transport.connect()

    async def pause(self) -> None:
        await self._answer()
        self.running = False

    async def resume(self) -> None:
        await self._answer()
        self.running = True

    async def identity(self) -> Identity:
        if self._config is None:
            return await super().identity()
        return Identity(facts={"machine": "memory", "memory_mib": self._config.memory_mib}, tsc_khz=None)

    async def hang_up(self) -> None:
        self._check_alive()
        self._transport.hang_up()

    async def _save(self, memory: Path, state: Path) -> None:
        if self._config is None:
            raise NotSupported("a machine of memory without a configuration cannot be saved")
        await self.pause()
        _write(memory, state)

    def _load(self) -> None:
        """Go on from a state, if there is one."""
        if self._config is None or self._config.saved is None:
            return
        saved = self._config.saved
        for file, content in ((saved.state, _STATE), (saved.memory, _MEMORY)):
            try:
                found = file.read_bytes()
            except OSError as error:
                self.die("never-started")
                raise MachineFailed(f"cannot read {file}: {error.strerror}") from error
            if found != content:
                self.die("failed")
                raise MachineFailed(f"{file} was not saved by such a machine")
        self._disks.adopt(saved.disks)
        self.disks = {disk.target: disk for disk in saved.disks}

    async def shutdown(self, timeout: float) -> None:
        if self._exit is None:
            try:
                async with asyncio.timeout(timeout):
                    await self._answers.wait()
                self.die("host-quit" if self._started else "never-started")
            except TimeoutError:
                self.die("killed")

    async def kill(self) -> None:
        self.die("killed" if self._started else "never-started")

    def die(self, reason: str, *, signal: int | None = None) -> None:
        """End it here and now, as a crash would."""
        self._started = True
        if self._exit is None:
            self.running = False
            self._transport.close()
            self._publish(MachineExit(reason=reason, signal=signal))
            self._end_guest()

    def hang(self) -> None:
        """From now on nothing is answered; `shutdown` runs into its timeout, `kill` works."""
        self._answers.clear()

    def write_console(self, text: str) -> None:
        """What a guest would have written."""
        self._console.feed(text.encode())

    async def _answer(self) -> None:
        with self._until_end():
            await self._answers.wait()

    async def _plug(self, disk: Disk) -> None:
        await self._answer()
        self.disks[disk.target] = disk

    async def _unplug(self, disk: Disk) -> None:
        if not self._answers.is_set():
            raise DeadlineExceeded(f"the machine did not remove {disk.path}")
        self.disks.pop(disk.target, None)


def _write(memory: Path, state: Path) -> None:
    memory.write_bytes(_MEMORY)
    state.write_bytes(_STATE)
