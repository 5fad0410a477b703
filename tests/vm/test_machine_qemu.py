"""QEMU with a guest that boots: its channel, its console, its deaths."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import byre_images
from byre.errors import ConnectionLost
from byre.machines.config import MachineConfig
from byre.machines.qemu import QemuMachine
from byre_proto.connection import MAGIC
from tests.conftest import machine_options

pytestmark = pytest.mark.vm

#: A boot takes 3 s under emulation on an idle host; these tests share theirs.
BOOT = 100.0
#: "Within a second" (B42, B43), and room for a busy host.
SOON = float(os.environ.get("BYRE_TEST_SOON", "5"))


def config(**options: Any) -> MachineConfig:
    image = byre_images.ensure()
    files = {"kernel": image.kernel, "initramfs": image.initramfs, "root": image.root}
    return MachineConfig(**{**files, **machine_options(), **options})


def run(scenario: Callable[[QemuMachine], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        machine = QemuMachine(config(**options))
        try:
            await machine.start()
            async with asyncio.timeout(BOOT):
                await scenario(machine)
        except BaseException as error:
            error.add_note(f"console:\n{machine.console_tail()}")
            raise
        finally:
            await machine.kill()

    asyncio.run(main())


async def greeting(machine: QemuMachine) -> socket.socket:
    """The channel, after the agent's first bytes: the guest is up."""
    channel = await machine.connect()
    received = b""
    while MAGIC not in received:
        data = await asyncio.get_running_loop().sock_recv(channel, 4096)
        assert data, "the channel ended"
        received += data
    return channel


@pytest.mark.parametrize(("machine", "cpus"), [("microvm", 1), ("microvm", 2), ("pc", 1), ("q35", 2)])
def test_the_agent_greets_on_every_machine_type(machine: str, cpus: int) -> None:
    async def scenario(booted: QemuMachine) -> None:
        (await greeting(booted)).close()

    run(scenario, machine=machine, cpus=cpus)


@pytest.mark.behaviour("B40")
def test_a_guest_that_cannot_boot_ends_with_its_words_on_the_console(tmp_path: Path) -> None:
    garbage = tmp_path / "root"
    garbage.write_bytes(b"\x1b[2J" * 4096)

    async def scenario(machine: QemuMachine) -> None:
        how = await machine.wait()
        assert how.reason == "guest-reset"
        assert machine.console_tail()
        with pytest.raises(ConnectionLost):
            await machine.connect()

    run(scenario, root=garbage)


@pytest.mark.behaviour("B42")
def test_killed_from_outside_everything_ends_within_a_second() -> None:
    async def scenario(machine: QemuMachine) -> None:
        with await greeting(machine) as channel:
            waiting = asyncio.create_task(machine.wait_console("never"))
            await asyncio.sleep(0)
            assert machine.pid is not None
            os.kill(machine.pid, signal.SIGKILL)
            async with asyncio.timeout(SOON):
                how = await machine.wait()
                with pytest.raises(ConnectionLost):
                    await waiting
                with contextlib.suppress(ConnectionResetError):  # vsock's end of a peer that is no more
                    while await asyncio.get_running_loop().sock_recv(channel, 4096):
                        pass
        assert (how.reason, how.signal) == ("killed", signal.SIGKILL)

    run(scenario)


OWNER = """
import asyncio, sys, threading
from pathlib import Path
from byre.machines.config import MachineConfig
from byre.machines.qemu import QemuMachine

kernel, initramfs, root, accelerator, transport = sys.argv[1:]
machine = None

async def start():
    global machine
    machine = QemuMachine(MachineConfig(kernel=Path(kernel), initramfs=Path(initramfs), root=Path(root),
                                        accelerator=accelerator, transport=transport))
    await machine.start()

loop = asyncio.new_event_loop()
starter = threading.Thread(target=lambda: loop.run_until_complete(start()))
starter.start()
starter.join()
print(machine.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.behaviour("B43")
def test_it_survives_the_thread_that_started_it_and_dies_with_the_process() -> None:
    want = config()
    arguments = [str(path) for path in (want.kernel, want.initramfs, want.root)]
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, *arguments, want.accelerator, want.transport],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with owner:
        assert owner.stdout is not None
        pidfd = os.pidfd_open(int(owner.stdout.readline()))
        try:
            assert not select.select([pidfd], [], [], 0.5)[0], "QEMU died with the thread that started it"
            owner.kill()
            assert select.select([pidfd], [], [], SOON)[0], "QEMU outlived its owner"
        finally:
            os.close(pidfd)
