"""A keeper whose VM is played, run as a process of its own (`detached.start` with this module as the keeper).

The options say what it plays: {"boot": "ready" | "fail" | "never" | "crash"}, and {"lists": ...}: all that the
guest says of its processes and containers.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from byre import keeper
from byre.bridge import Bridge
from byre.container_disks import ContainerDisks
from byre.errors import BootFailed
from byre.owner import DiskPlace
from byre.ports.address import Address
from byre.ports.registry import HeldPorts, PublishedPort
from byre.shares.share import Share
from byre.testing import FakeGuest, FakeProcess


async def forever(_: FakeProcess) -> int:
    await asyncio.Event().wait()
    return 0


async def echo(process: FakeProcess) -> int:
    assert process.stdout is not None
    process.stdout.write(" ".join(process.args[1:]).encode())
    await process.stdout.drain()
    return 0


class Disks(ContainerDisks):
    """Says what it was told."""

    def __init__(self) -> None:
        self.held: dict[str, list[str]] = {}

    async def hold(self, lease: str, container: str, volume: Path | None, size: int) -> str:
        self.held.setdefault(lease, []).append(f"{volume} {size} for {container}")
        return str(len(self.held[lease]))

    async def drop(self, lease: str) -> None:
        self.held.pop(lease, None)

    async def sync(self) -> None:
        pass


class Played:
    """What is kept: it has the methods of a `UtilityVM` that a keeper calls."""

    def __init__(self, bridge: Bridge) -> None:
        self.bridge = bridge
        self.ended = asyncio.Event()
        self.reason = ""
        self.paused = 0
        self.ports = HeldPorts(bridge)
        self.container_disks = Disks()

    async def publish(self, host: str, guest: str, *, container: str) -> Address:
        return await self.ports.publish(container, host, guest)

    async def unpublish(self, host: str) -> None:
        await self.ports.unpublish(host)

    async def published(self) -> list[PublishedPort]:
        return await self.ports.published()

    async def share(self, directory: str, *, read_only: bool, cache: str) -> Share:
        return Share(self.bridge, "1", f"/played{directory}", directory)

    async def info(self) -> dict[str, Any]:
        return {
            "machine": {"pid": os.getpid()},
            "paused": self.paused,
            "held": self.container_disks.held,
            "tmp": tempfile.gettempdir(),
        }

    async def attach_disk(self, path: str) -> DiskPlace:
        return DiskPlace(Path(path), 3, 0)

    async def detach_disk(self, disk: DiskPlace) -> None:
        assert disk.target == 3

    async def console(self, lines: int) -> str:
        if lines == 666:  # the test's way to let the VM die
            self.reason = "the virtual machine ended (killed)"
            self.ended.set()
        return f"{lines} lines"

    async def pause(self) -> None:
        self.paused += 1

    async def resume(self) -> None:
        self.paused -= 1

    async def shutdown(self, timeout: float) -> None:
        if timeout == 0.666:  # the test's way to let it hang
            await asyncio.Event().wait()
        self.reason = self.reason or "shut down"
        self.ended.set()

    async def wait(self) -> str:
        await self.ended.wait()
        return self.reason


def describe(process: FakeProcess) -> dict[str, Any]:
    """As the agent's own process.list has it."""
    ended = process.task is not None and process.task.done()
    exit_status = {"code": 0, "signal": 0} if ended else None
    return {
        "process": process.id,
        "pid": process.id,
        "container": "",
        "args": process.args,
        "terminal": False,
        "exit": exit_status,
    }


@contextlib.asynccontextmanager
async def boot(_: str, options: dict[str, Any]) -> AsyncIterator[Played]:
    if options.get("boot") == "fail":
        raise BootFailed("the guest panicked", hint="look at the console", console="Kernel panic")
    if options.get("boot") == "crash":
        raise RuntimeError("a defect")
    if options.get("boot") == "never":
        Path(tempfile.gettempdir(), "booting").touch()
        await asyncio.Event().wait()
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setblocking(False)
    guest, bridge = FakeGuest(theirs, {"forever": forever, "echo": echo}), Bridge(ours, label="played")
    guest.handlers["process.list"] = lambda _: {"processes": [describe(p) for p in guest.processes.values()]}
    guest.handlers["container.list"] = lambda _: {"containers": []}
    if "lists" in options:
        guest.handlers["process.list"] = lambda _: {"processes": options["lists"]}
        guest.handlers["container.list"] = lambda _: {"containers": options["lists"]}
    await asyncio.gather(guest.open(), bridge.open(10))
    try:
        yield Played(bridge)
    finally:
        await bridge.close()
        await guest.close()


if __name__ == "__main__":
    keeper.main(boot)
