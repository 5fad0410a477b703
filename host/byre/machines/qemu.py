"""A machine made by QEMU, driven over QMP.

Rule: nothing has a name.  QMP, console and channel are socket pairs and a secret is a memfd, so there is no run
directory to guard or to clean, and no other process can connect.  One task, `_reap`, owns the end: it waits for
the process and gives everything back, whatever ended it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import shutil
import signal
import socket
import subprocess
from typing import TYPE_CHECKING, Any

from byre.errors import ConnectionLost, DeadlineExceeded, InvalidRequest, MachineFailed, ToolMissing
from byre.machines import namespaces
from byre.machines.accelerators import choose_accelerator
from byre.machines.balloon import Balloon, Reclaimed
from byre.machines.base import Identity, Machine, MachineExit
from byre.machines.clock import rough_tsc_khz, tsc_khz
from byre.machines.command_line import QEMU, Choices, choose_machine, qemu_command
from byre.machines.config import MIN_MEMORY_MIB
from byre.machines.console import ConsoleRing
from byre.machines.identity import identity
from byre.machines.migration import Migration
from byre.machines.qmp import Qmp
from byre.machines.saving import Continuation
from byre.machines.scsi import ScsiBus
from byre.machines.spawn import OwnedProcess, in_thread
from byre.timings import span
from byre.transports.choice import choose_transport
from byre_proto.errors import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from byre.machines.config import MachineConfig
    from byre.machines.disks import Disk
    from byre.transports.base import Transport

logger = logging.getLogger(__name__)

#: Debian 12's.  Older ones are not tested, and lack some of what the command line asks for.
OLDEST_QEMU = (7, 2, 0)
#: A killed QEMU is gone at once, unless the kernel holds it (a dead network file system).
KILL_TIMEOUT = 10.0
#: Of QEMU's own complaint, in errors; mostly one line says it all.
_STDERR_LINES = 10

#: Programs that every start needs, and the Debian package of each.
TOOLS = {QEMU: "qemu-system-x86", "setpriv": "util-linux", "unshare": "util-linux"}

#: The reasons of QMP's SHUTDOWN event that are told in our words; the others mean that something failed.
_REASONS = {
    "guest-shutdown": "guest-shutdown",
    "guest-reset": "guest-reset",
    "guest-panic": "guest-reset",
    "host-qmp-quit": "host-quit",
    "host-signal": "killed",
}


class QemuMachine(Machine):
    """See the module.  ``explanation`` says, after `start`, what was chosen and why."""

    def __init__(self, config: MachineConfig) -> None:
        super().__init__()
        self._config = config
        self._started = False
        self._transport: Transport | None = None
        self._process: OwnedProcess | None = None
        self._reaper: asyncio.Task[None] | None = None
        self._stderr = ConsoleRing()
        self._qmp = Qmp(self.id, self._on_event)
        self._migration = Migration(self._execute)
        self._shutdown_reason = ""
        self._bus = ScsiBus(self._execute, self._qmp.send_fd)
        self._balloon = Balloon(self._execute)
        self._continuation = Continuation()
        if config.saved is not None:
            self._disks.adopt(config.saved.disks)

    @property
    def secret(self) -> bytes | None:
        return self._transport.secret if self._transport is not None else None

    @property
    def lossy(self) -> bool:
        return self._transport is not None and self._transport.lossy

    @property
    def redialled(self) -> bool:
        return self._transport is not None and self._transport.redialled

    @property
    def pid(self) -> int | None:
        """QEMU's process id, while it runs."""
        return self._process.pid if self._process is not None and self._exit is None else None

    async def start(self) -> None:
        if self._started:
            raise MachineFailed("a machine starts once", hint="make another one")
        self._started = True
        try:
            with self._until_end():
                await self._start()
        except ConnectionLost as error:
            await self.kill()
            raise MachineFailed(f"QEMU did not start: {self._exit}", hint="see: byre doctor") from error
        except BaseException:
            await asyncio.shield(self.kill())
            raise

    async def _start(self) -> None:
        self._check()
        refused = await in_thread(namespaces.problem)
        why = "QEMU has its own" if refused is None else f"QEMU has its user's: {refused}"
        self.explanation["namespaces"] = why  # `_choose` adds the others
        # Only a kernel that boots is told the rate, so only then it has to be right.
        with span("choices"):
            choices, transport = await self._choose(rough_tsc_khz if self._config.saved else tsc_khz)
        with span("QEMU"):
            qmp, state_fd = self._spawn(choices, transport, None if refused else namespaces.MACHINE)
            self._reaper = asyncio.create_task(self._reap(), name=f"machine {self.id}")
            await self._qmp.connect(qmp)
        found, oldest = (".".join(map(str, v)) for v in (self._qmp.version, OLDEST_QEMU))
        self.explanation["qemu"] = found
        if self._qmp.version < OLDEST_QEMU:
            raise MachineFailed(f"QEMU {found} is too old", hint=f"install {oldest} or later")
        if state_fd is not None:
            with span("state"):
                await self._migration.load(state_fd)

    def _check(self) -> None:
        self._config.check()
        for tool, package in TOOLS.items():
            if shutil.which(tool) is None:
                raise ToolMissing(f"{tool} is not installed", hint=f"apt install {package}", tool=tool)

    async def identity(self) -> Identity:
        self._check()
        choices, transport = await self._choose(rough_tsc_khz)
        try:
            return identity(self._config, choices, transport.name, choices.tsc_khz)
        except OSError as error:
            raise MachineFailed(f"cannot look at what the machine is made of: {error}") from error

    async def _choose(self, measure: Callable[[], int | None]) -> tuple[Choices, Transport]:
        config = self._config
        accelerator = await in_thread(lambda: choose_accelerator(config.accelerator))
        khz = await in_thread(measure) if accelerator.name == "tcg" else None
        choices, why_machine = choose_machine(config.machine, accelerator.name, khz)
        transport, why_transport = choose_transport(config.transport, accelerator.name)
        self.explanation |= {
            "accelerator": f"{accelerator.name}: {accelerator.reason}",
            "machine": f"{choices.machine}: {why_machine}",
            "transport": f"{transport.name}: {why_transport}",
        }
        for what, why in self.explanation.items():
            logger.info("= vm %s %s %s", self.id, what, why)
        return choices, transport

    def _spawn(
        self, choices: Choices, transport: Transport, apart: namespaces.Apart | None
    ) -> tuple[socket.socket, int | None]:
        """Spawn QEMU; the host's end of its QMP socket, and the number that the state's file has in QEMU, if any.

        `apart`: in namespaces of its own.  Never suspends, so nothing is half done.
        """
        with contextlib.ExitStack() as undo:
            undo.callback(transport.close)
            saved = self._config.saved
            wiring = transport.open(choices.bus, had_host=bool(saved and saved.host_gone))
            handed = list(wiring.handed)
            undo.callback(_close_all, handed)
            undo.callback(self._continuation.close)
            self._continuation.keep_back(wiring)
            (qmp, qmp_fd), (console, console_fd) = _pair(undo, handed), _pair(undo, handed)
            config, state_fd = self._config, None
            if saved is not None:
                saved, state_fd = self._continuation.open(saved, handed)
                config = dataclasses.replace(config, saved=saved)
            command = qemu_command(
                config,
                choices,
                name=self.id,
                qmp_fd=qmp_fd,
                console_fd=console_fd,
                transport=wiring.arguments,
                channel=wiring.kernel_argument,
            )
            undo.pop_all()
        self._transport = transport
        logger.debug("> %s", command)
        sinks = {console.detach(): self._console.feed}
        self._process = OwnedProcess(command, output=self._stderr.feed, sinks=sinks, handed=handed, apart=apart)
        try:
            self._process.start()
        except BaseException:
            qmp.close()
            self._process = None
            raise
        return qmp, state_fd

    async def connect(self) -> socket.socket:
        self._check_alive()
        if self._transport is None:
            raise MachineFailed("the machine has not been started")
        with self._until_end():
            if self._continuation.waits and self._config.saved is not None:
                await self.wait_console(self._config.saved.host_gone)
                await self._continuation.show_channel(self._qmp)
            return await self._transport.connect()

    async def pause(self) -> None:
        await self._execute("stop")

    async def resume(self) -> None:
        await self._execute("cont")

    async def reclaim(self, memory_mib: int) -> Reclaimed:
        if self._config.saved is not None:
            return await super().reclaim(memory_mib)
        if not MIN_MEMORY_MIB <= memory_mib <= self._config.memory_mib:
            raise InvalidRequest(
                f"the VM cannot be left {memory_mib} MiB",
                hint=f"{MIN_MEMORY_MIB} to {self._config.memory_mib}; more takes a restart",
            )
        self._check_alive()
        return await self._balloon.resize(memory_mib, self.pid or 0)

    async def hang_up(self) -> None:
        self._check_alive()
        if self._transport is not None:
            self._transport.hang_up()

    async def _save(self, memory: Path, state: Path) -> None:
        if self._process is None or self._process.pid is None:
            raise MachineFailed("the machine has not been started")
        size, pid = self._config.memory_mib * 1024 * 1024, self._process.pid
        written = await self._continuation.save(self._qmp, self._migration, pid, size, memory, state)
        logger.info("= vm %s was saved: %.1f MiB were written", self.id, written / 1024**2)

    async def shutdown(self, timeout: float) -> None:
        try:
            async with asyncio.timeout(timeout):
                if self._reaper is not None and self._exit is None:
                    with contextlib.suppress(ConnectionLost):
                        await self._qmp.execute("quit")
                    await self.wait()
        except (TimeoutError, MachineFailed):
            logger.warning("! vm %s did not end in order", self.id)
        await self.kill()

    async def kill(self) -> None:
        if self._reaper is None:
            self._started = True
            self._give_back(MachineExit(reason="never-started"))
            return
        assert self._process is not None
        self._process.kill()
        try:
            async with asyncio.timeout(KILL_TIMEOUT):
                await self.wait()
        except TimeoutError:
            raise DeadlineExceeded(f"QEMU, process {self._process.pid}, does not end when killed") from None

    async def _execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        with self._until_end():
            return await self._qmp.execute(command, arguments)

    async def _plug(self, disk: Disk) -> None:
        await self._bus.plug(disk)

    async def _unplug(self, disk: Disk) -> None:
        try:
            with self._until_end():
                await self._bus.unplug(disk)
        except ConnectionLost:
            pass  # the machine is gone, and the disk with it

    def _on_event(self, name: str, data: Mapping[str, Any]) -> None:
        if name == "SHUTDOWN":
            self._shutdown_reason = str(data.get("reason", ""))
        elif name == "MIGRATION":
            self._migration.on_event(data)
        elif name == "BALLOON_CHANGE":
            self._balloon.on_change()
        elif name == "DEVICE_DELETED":
            self._bus.on_deleted(str(data.get("device")))
        elif name == "BLOCK_IO_ERROR":
            reason = printable(f"it failed to {data.get('operation')}: {data.get('reason')}")
            path = self._disks.path_of(str(data.get("node-name")))
            logger.warning("! vm %s: disk %s: %s", self.id, path, reason)
            self.on_disk_error(path, reason)

    async def _reap(self) -> None:
        assert self._process is not None
        end = asyncio.wrap_future(self._process.exit)
        try:
            await asyncio.wait({end})
            orderly = True
        except asyncio.CancelledError:  # the event loop ends under a machine that nobody has ended
            orderly = False
            self._process.kill()
            await asyncio.wait({end}, timeout=KILL_TIMEOUT)
        how = MachineExit(reason="killed")
        try:
            if end.done():
                self._process.join()
                await self._qmp.close(orderly=orderly)
                how = self._describe(end.result())
        except (OSError, subprocess.SubprocessError) as error:
            how = MachineExit(reason="never-started", stderr=str(error))
        finally:
            self._give_back(how)

    def _describe(self, code: int) -> MachineExit:
        stderr = self._stderr.tail(_STDERR_LINES)
        if code == -signal.SIGKILL:
            reason = "killed"
        elif code or not self._shutdown_reason:
            reason = "failed"
        else:
            reason = _REASONS.get(self._shutdown_reason, "failed")
        if code < 0:
            return MachineExit(reason=reason, signal=-code, stderr=stderr)
        return MachineExit(reason=reason, returncode=code, stderr=stderr)

    def _give_back(self, how: MachineExit) -> None:
        if self._transport is not None:
            self._transport.close()
        self._continuation.close()
        if self._exit is None:
            logger.info("x vm %s: %s", self.id, how.reason)
        self._publish(how)


def _close_all(descriptors: list[int]) -> None:
    for fd in descriptors:
        os.close(fd)


def _pair(undo: contextlib.ExitStack, handed: list[int]) -> tuple[socket.socket, int]:
    """A socket pair: the host's end, and the descriptor of QEMU's, which is also added to `handed`."""
    host, guest = socket.socketpair()
    undo.callback(host.close)
    handed.append(guest.detach())
    return host, handed[-1]
