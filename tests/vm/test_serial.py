"""A VM over its 16550, where it differs from other channels: the kernel's console may be the same line."""

from __future__ import annotations

import asyncio
import hashlib
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

import byre
import byre_images
from byre import ProcessParameters
from byre.machines.clock import tsc_khz
from byre.machines.command_line import choose_machine, qemu_command
from byre.machines.config import MachineConfig
from byre.machines.spawn import in_thread
from tests.conftest import machine_options

pytestmark = pytest.mark.vm

SOON = 60.0

#: Of the highest level, so that a quiet kernel shows them as well.
SHOUT = "while :; do echo '<0>shouted from the kernel' >/dev/kmsg; sleep 0.01; done"


def serial_vm(*kernel_arguments: str, machine: str = "auto") -> byre.UtilityVM:
    options = {**machine_options(), "transport": "serial"}
    return byre.UtilityVM(machine=machine, kernel_arguments=kernel_arguments, **options)


async def echoed(vm: byre.UtilityVM, data: bytes) -> bytes:
    async with asyncio.timeout(SOON):
        return (await vm.run(["cat"], input=data, capture_output=True)).stdout


async def test_the_kernel_writes_to_the_agents_own_line() -> None:
    data = random.Random(1).randbytes(30_000)
    async with serial_vm("console=ttyS1") as vm:
        async with await vm.create_process(ProcessParameters(args=["sh", "-c", SHOUT])) as shouting:
            assert await echoed(vm, data) == data
            await shouting.kill()
        assert "shouted from the kernel" in vm.console_tail(400)
        with pytest.raises(byre.errors.ConnectionLost):
            await vm.run(["sh", "-c", "echo c >/proc/sysrq-trigger"], timeout=SOON)
        assert "Kernel panic" in vm.console_tail(400)


async def test_a_machine_with_two_lines_keeps_them_apart() -> None:
    async with serial_vm(machine="pc") as vm:
        info = await vm.info()
        assert info["machine"]["transport"].startswith("serial")
        data = random.Random(1).randbytes(30_000)
        sent = await vm.run(["sha256sum"], input=data, capture_output=True)
        assert sent.stdout.split()[0].decode() == hashlib.sha256(data).hexdigest()
        await vm.run(["sh", "-c", "echo to the console >/dev/console"], check=True)
        async with asyncio.timeout(SOON):
            while "to the console" not in vm.console_tail(5):
                await vm.run(["true"])


@asynccontextmanager
async def board() -> AsyncIterator[str]:
    """A machine that byre does not know of: one 16550, QEMU's pty at its other end, whose path this gives.

    The kernel's console and the agent share it, and nobody listens while it boots.
    """
    image = await in_thread(byre_images.ensure)
    choices, _ = choose_machine("auto", "tcg", await in_thread(tsc_khz))
    config = MachineConfig(
        kernel=image.kernel,
        initramfs=image.initramfs,
        root=image.root,
        accelerator="tcg",
        kernel_arguments=byre_images.KERNEL_ARGUMENTS,
    )
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = qemu_command(
            config,
            choices,
            name="board",
            qmp_fd=theirs.fileno(),
            console_fd=-1,
            transport=(),
            channel="byre.channel=serial:ttyS0",
        )
        command[command.index("socket,id=console,fd=-1")] = "pty,id=console"
        machine = await asyncio.create_subprocess_exec(
            *command, pass_fds=[theirs.fileno()], stdout=asyncio.subprocess.PIPE
        )
        try:
            assert machine.stdout is not None
            async with asyncio.timeout(SOON):
                said = (
                    await machine.stdout.readline()
                ).decode()  # char device redirected to /dev/pts/3 (label console)
            yield said.partition(" to ")[2].split()[0]
        finally:
            machine.kill()
            await machine.communicate()


async def test_a_board_with_one_line_that_is_its_console() -> None:
    data = random.Random(1).randbytes(20_000)
    async with board() as device:
        async with byre.SerialHost(device, start_timeout=SOON) as first:
            done = await first.run(["cat"], input=data, capture_output=True, timeout=SOON)
            assert done.stdout == data
            await first.run(["sh", "-c", "echo to the console >/dev/console"])
            async with asyncio.timeout(SOON):
                while "to the console" not in first.console_tail():
                    await first.run(["true"])
        async with byre.SerialHost(device, start_timeout=SOON) as second:
            done = await second.run(["uname"], capture_output=True, timeout=SOON)
            assert done.stdout == b"Linux\n"
