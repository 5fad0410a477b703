"""The floor under everything: the same kernel on a bare QEMU, busybox as init, an echo over virtio-serial.

It loads nothing but what the echo needs, and has no agent, no root file system and no protocol: what it costs, the
machine underneath costs.  It gets the CPU and
every kernel argument that byre's own boot gets.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from byre.machines.accelerators import choose_accelerator
from byre.machines.clock import tsc_khz
from byre.machines.command_line import EMULATED_CPU, choose_machine, kernel_command_line
from byre.machines.config import MachineConfig
from byre.machines.migration import Migration
from byre.machines.qmp import Qmp
from byre_images import KERNEL_ARGUMENTS, Image
from byre_images.initramfs import Node, cpio

#: Longest that a bare machine may take for anything, in seconds.
LIMIT = 120.0

INIT = """#!/bin/busybox sh
busybox mount -t devtmpfs dev /dev
for m in $(busybox cat /modules/order); do busybox insmod /modules/$m; done
until { busybox true 3<>/dev/vport0p1; } 2>/dev/null; do busybox usleep 1000; done
busybox stty raw </dev/console
exec 3<>/dev/vport0p1
%s
busybox poweroff -f
"""

#: Says that it is there, then echoes.
ECHO = "echo ready >&3; exec busybox cat <&3 >&3"

MACHINES = {
    "pc": ["-M", "pc", "-device", "virtio-serial-pci"],
    "microvm": ["-M", "microvm,rtc=on,pit=on,pic=on", "-device", "virtio-serial-device"],
}


#: What a virtio-serial port needs.
MODULES = ("virtio_mmio", "virtio_pci", "virtio_console")


def initramfs(image: Image, script: str = ECHO, modules: Sequence[str] = MODULES) -> bytes:
    """A cpio with busybox, `modules` with what they need, and `script` at the end of its init."""
    dep = _cat(image, "usr/lib/modules", "modules.dep").decode()
    needs = {}
    for line in dep.splitlines():
        path, _, rest = line.partition(":")
        needs[Path(path).name.partition(".")[0].replace("-", "_")] = [path, *rest.split()]
    order: list[str] = []
    for name in modules:
        if name in needs:
            order += [path for path in reversed(needs[name]) if path not in order]
    busybox = Path(shutil.which("busybox") or "/bin/busybox").read_bytes()
    nodes = [Node(d, 0o40755) for d in ("bin", "dev", "modules")]
    nodes += [Node("bin/busybox", 0o100755, busybox), Node("dev/console", 0o020600, device=(5, 1))]
    names = []
    for path in order:
        names.append(Path(path).name)
        nodes.append(Node(f"modules/{names[-1]}", 0o100644, _cat(image, "usr/lib/modules", path)))
    nodes.append(Node("modules/order", 0o100644, "\n".join(names).encode()))
    nodes.append(Node("init", 0o100755, (INIT % script).encode()))
    return cpio(nodes)


def _cat(image: Image, base: str, name: str) -> bytes:
    """A file of the guest's root, below the directory of its kernel's release."""
    release = subprocess.run(
        ["rdsquashfs", "--list", base, image.root], check=True, capture_output=True, text=True
    ).stdout.split()[-1]
    return subprocess.run(
        ["rdsquashfs", "--cat", f"{base}/{release}/{name}", image.root], check=True, capture_output=True
    ).stdout


def command_line(image: Image, machine: str, initrd: str, channel: int, wanted: str = "auto") -> list[str]:
    """QEMU's arguments for a bare machine whose port is the descriptor `channel`."""
    accelerator = choose_accelerator(wanted).name
    config = MachineConfig(
        kernel=image.kernel, initramfs=image.initramfs, root=image.root, kernel_arguments=KERNEL_ARGUMENTS
    )
    choices, _ = choose_machine(machine, accelerator, tsc_khz())
    append = kernel_command_line(config, choices, "")
    cpu = "host" if accelerator == "kvm" else EMULATED_CPU
    command = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    command += ["-accel", accelerator, "-cpu", cpu, "-m", "256", "-smp", "1"]
    command += ["-kernel", str(image.kernel), "-initrd", initrd, "-append", append, "-serial", "null"]
    command += [*MACHINES[machine], "-chardev", f"socket,id=c,fd={channel}"]
    return [*command, "-device", "virtserialport,chardev=c"]


@contextlib.asynccontextmanager
async def bare_machine(
    image: Image, machine: str, script: str = ECHO, *, more: Sequence[str] = (), handed: Sequence[int] = ()
) -> AsyncIterator[tuple[socket.socket, float]]:
    """A running bare machine: its channel, and when QEMU was started (time.perf_counter).

    `more` is added to QEMU's arguments, `handed` are descriptors that they name.
    """
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with tempfile.NamedTemporaryFile(prefix="byre-floor-") as file:
        file.write(initramfs(image, script))
        file.flush()
        command = [*command_line(image, machine, file.name, theirs.fileno()), *more]
        started = time.perf_counter()
        process = await asyncio.create_subprocess_exec(*command, pass_fds=(theirs.fileno(), *handed))
        theirs.close()
        try:
            async with asyncio.timeout(LIMIT):
                yield ours, started
        finally:
            ours.close()
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


async def boot_and_echo(image: Image, machine: str) -> float:
    """Seconds from QEMU's start to the first echoed byte at the host."""
    async with bare_machine(image, machine) as (channel, started):
        await asyncio.get_running_loop().sock_recv(channel, 64)
        await echo(channel)
        return time.perf_counter() - started


async def echo(channel: socket.socket) -> None:
    """A line to the bare machine and back."""
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(channel, b"x\n")
    assert await loop.sock_recv(channel, 64) == b"x\n"


class Saved:
    """A bare machine that was saved while it waits for something to echo, in a directory of its own."""

    def __init__(self, image: Image, machine: str, directory: Path) -> None:
        self._image, self._machine = image, machine
        self._memory, self._state = directory / f"{machine}-memory", directory / f"{machine}-state"

    @contextlib.asynccontextmanager
    async def _run(
        self, *, shared: bool, more: Sequence[str] = (), handed: Sequence[int] = ()
    ) -> AsyncIterator[Any]:
        """The machine's channel, its QMP, and when it was started."""
        memory = {"qom-type": "memory-backend-file", "id": "m", "size": 256 << 20, "mem-path": str(self._memory)}
        ours, theirs = socket.socketpair()
        arguments = [
            "-object",
            json.dumps({**memory, "share": shared}),
            "-machine",
            "memory-backend=m,suppress-vmdesc=on",
        ]
        arguments += ["-global", "migration.send-configuration=off"]
        arguments += ["-chardev", f"socket,id=q,fd={theirs.fileno()}", "-mon", "chardev=q,mode=control", *more]
        fds = (theirs.fileno(), *handed)
        async with bare_machine(self._image, self._machine, more=arguments, handed=fds) as (channel, started):
            theirs.close()
            migration: Migration
            qmp = Qmp("bare", lambda name, data: migration.on_event(data) if name == "MIGRATION" else None)
            migration = Migration(qmp.execute)
            try:
                await qmp.connect(ours)
                yield channel, qmp, migration, started
            finally:
                await qmp.close(orderly=False)

    async def save(self) -> None:
        async with self._run(shared=True) as (channel, qmp, migration, _):
            await asyncio.get_running_loop().sock_recv(channel, 64)
            await echo(channel)
            with self._state.open("wb") as file:
                await migration.save(qmp.send_fd, file)

    async def clone_and_echo(self) -> float:
        """Seconds from QEMU's start to the first echoed byte at the host."""
        with self._state.open("rb") as state:
            fd = state.fileno()
            async with self._run(shared=False, more=("-incoming", "defer"), handed=(fd,)) as running:
                channel, _, migration, started = running
                await migration.load(fd)
                await echo(channel)
                return float(time.perf_counter() - started)
