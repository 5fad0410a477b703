"""`byre stop`, `byre rm`, `byre logs`: containers of a VM that is up."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

from byre.errors import ContainerNotReady, DeadlineExceeded
from byre.vm import UtilityVM

from . import foreground
from .status import say

if TYPE_CHECKING:
    import argparse

    from byre.container import LogPiece

#: How long a container that was killed may take to be gone, in seconds.
KILL_TIMEOUT = 30.0


def stop(arguments: argparse.Namespace) -> int:
    return foreground.run(lambda _: _stop(arguments))


async def _stop(arguments: argparse.Namespace) -> int:
    async with await UtilityVM.attach(arguments.vm_name) as vm:
        for name in arguments.containers:
            container = await vm.open_container(name)
            try:
                await container.shutdown()
                if not await _ends(container.wait_channel, arguments.time):
                    await container.terminate()
                    if not await _ends(container.wait_channel, KILL_TIMEOUT):
                        raise DeadlineExceeded(f"{name} was killed, and is not gone after {KILL_TIMEOUT:g} s")
            finally:
                await container.close()
            print(name)
    return 0


async def _ends(ended: asyncio.Event, timeout: float) -> bool:
    try:
        async with asyncio.timeout(timeout):
            await ended.wait()
    except TimeoutError:
        return False
    return True


def rm(arguments: argparse.Namespace) -> int:
    return foreground.run(lambda _: _rm(arguments))


async def _rm(arguments: argparse.Namespace) -> int:
    async with await UtilityVM.attach(arguments.vm_name) as vm:
        for name in arguments.containers:
            container = await vm.open_container(name)
            try:
                if not arguments.force and (await container.state()).get("state") == "running":
                    raise ContainerNotReady(f"{name} is running", hint=f"byre stop {name}, or: byre rm -f {name}")
                await container.delete()
            finally:
                await container.close()
            print(name)
    return 0


def logs(arguments: argparse.Namespace) -> int:
    return foreground.run(lambda _: _logs(arguments))


async def _logs(arguments: argparse.Namespace) -> int:
    async with await UtilityVM.attach(arguments.vm_name) as vm:
        container = await vm.open_container(arguments.container)
        try:
            if arguments.follow:
                async for piece in container.follow_log():
                    _write(piece)
            else:
                _write(await container.read_log())
        finally:
            await container.close()
    return 0


def _write(piece: LogPiece) -> None:
    if piece.dropped:
        say(f"{piece.dropped} bytes before this were dropped")
    view = memoryview(piece.data)
    while view:
        view = view[os.write(1, view) :]
