"""A keeper's client whose channel is cut: it goes on over another one, or is over; only the guest is played."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from byre import bridge, detached, rundir
from byre.bridge import Bridge
from byre.errors import ConnectionLost
from byre.parameters import ProcessParameters
from byre.process import GuestProcess, start_process
from byre.relay import Relay
from byre.sockethost import SocketHost
from byre.testing import FakeGuest, FakeProcess
from tests.cuts.proxy import PLACES, CuttingProxy

SOON = float(os.environ.get("BYRE_TEST_SOON", "20"))
KEEPER = "tests.unit.played_keeper"


async def cat(process: FakeProcess) -> int:
    assert process.stdin is not None and process.stdout is not None
    while data := await process.stdin.read(65536):
        process.stdout.write(data)
        await process.stdout.drain()
    return 0


async def forever(_: FakeProcess) -> int:
    await asyncio.Event().wait()
    return 0


class Setting:
    """A played guest, a relay to it on a socket, and a proxy before that."""

    def __init__(self, guest: FakeGuest, relay: Relay, proxy: CuttingProxy, path: str) -> None:
        self.guest = guest
        self.relay = relay
        self.proxy = proxy
        self.path = path

    def client(self) -> SocketHost:
        """It reaches the relay through the proxy."""
        return SocketHost(self.proxy.path)

    async def others(self, count: int) -> None:
        """Until the relay has so many clients."""
        async with asyncio.timeout(SOON):
            while len(self.relay._clients) != count:
                await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def setting(folder: Path, *, mean: int = 0) -> AsyncIterator[Setting]:
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setblocking(False)
    guest, upstream = FakeGuest(theirs, {"cat": cat, "forever": forever}), Bridge(ours)
    await asyncio.gather(guest.open(), upstream.open(SOON))
    relay = Relay(upstream, {})
    with socket.socket(socket.AF_UNIX) as listener:
        listener.setblocking(False)
        listener.bind(f"{folder}/keeper")
        listener.listen()
        accepting = asyncio.create_task(relay.accept(listener))
        with CuttingProxy(f"{folder}/way", f"{folder}/keeper", mean=mean, seed=11) as proxy:
            yield Setting(guest, relay, proxy, f"{folder}/keeper")
        accepting.cancel()
        await asyncio.wait([accepting])
    await relay.close("over")
    await upstream.close()
    await guest.close()


async def start(client: SocketHost, *args: str, **streams: bool) -> GuestProcess:
    return await client.start_process(ProcessParameters(args=args, **streams))  # type: ignore[arg-type]


async def test_bytes_pass_a_keeper_whole_however_often_the_client_is_cut_off(tmp_path: Path) -> None:
    data = random.Random(7).randbytes(10_000_000)
    async with setting(tmp_path, mean=30_000) as world, world.client() as client:
        async with asyncio.timeout(3 * SOON):
            result = await client.run(["cat"], input=data, capture_output=True)
        assert result.stdout == data and result.returncode == 0
        assert world.proxy.cuts > 50
        assert all(world.proxy.places[place] for place in PLACES), str(world.proxy)
        assert len(world.relay._clients) == 1
    assert not [request for request in world.guest.requests if request[0] == "process.signal"]


async def test_a_client_that_nobody_missed_takes_its_old_channels_place(tmp_path: Path) -> None:
    """It was cut off in a way that the keeper has not noticed."""
    async with setting(tmp_path) as world, SocketHost(world.path) as client:
        process = await start(client, "cat", stdin=True, stdout=True)
        assert process.stdio.stdin is not None and process.stdio.stdout is not None
        assert client.bridge._channel is not None
        silent = client.bridge._channel.transport.get_extra_info("socket").fileno()
        kept = os.dup(silent)  # with it open, the keeper reads no end
        client.bridge._channel.transport.abort()
        process.stdio.stdin.write(b"word")
        assert await asyncio.wait_for(process.stdio.stdout.readexactly(4), SOON) == b"word"
        assert len(world.relay._clients) == 1
        os.close(kept)
        await process.close()


@pytest.mark.behaviour("B43")
async def test_a_client_that_does_not_come_back_has_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the time that is stated: its calls are cancelled, what is tied to it is killed, the rest goes on."""
    monkeypatch.setattr(bridge, "RESUME_SECONDS", 0.3)
    async with setting(tmp_path) as world, world.client() as client:
        await client.bridge.call("vm.tie")
        tied = await start(client, "forever")
        played = world.guest.processes[tied.id]
        world.proxy.barred = True
        world.proxy.cut()
        with pytest.raises(ConnectionLost, match="no other one came within"):
            await asyncio.wait_for(tied.wait(), SOON)
        await world.others(0)
        async with asyncio.timeout(SOON):
            while not played.killed:
                await asyncio.sleep(0.002)
        await tied.close()


@pytest.mark.behaviour("B42")
async def test_a_keeper_that_ended_is_no_cut(tmp_path: Path) -> None:
    async with contextlib.AsyncExitStack() as stack:
        async with setting(tmp_path) as world:
            client = SocketHost(world.path)
            await client.start()
            stack.push_async_callback(client.close)
            process = await start(client, "forever")
            waiting = asyncio.create_task(process.wait())
        begin = time.monotonic()
        with pytest.raises(ConnectionLost):
            await waiting
        assert time.monotonic() - begin < 1.0
        await process.close()


_CLIENT = """
import asyncio
from byre import detached
from byre.parameters import ProcessParameters
from byre.process import start_process

async def main():
    _, bridge = await detached.attach("a")
    await bridge.call("vm.tie")
    await start_process(bridge, ProcessParameters(args=["forever"]))
    print("started", flush=True)
    await bridge.wait_lost()

asyncio.run(main())
"""


@pytest.mark.behaviour("B43")
async def test_a_client_that_was_killed_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process has ended, so its channel was not cut."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    await detached.start("a", keeper=KEEPER)
    try:
        killed = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _CLIENT), stdout=asyncio.subprocess.PIPE
        )
        assert killed.stdout is not None
        assert await asyncio.wait_for(killed.stdout.readline(), SOON) == b"started\n"
        killed.kill()
        await killed.wait()
        _, other = await detached.attach("a")
        begin = time.monotonic()
        while any(entry["exit"] is None for entry in await processes(other)):
            assert time.monotonic() - begin < 5.0, "it waits for a client that is dead"
            await asyncio.sleep(0.01)
        await other.close()
    finally:
        await detached.end("a")


async def processes(client: Bridge) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = (await client.call("process.list"))["processes"]
    return listed


async def test_an_attached_client_comes_back_to_its_keeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`detached.attach` dials again, and what it started is still its own."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    await detached.start("a", keeper=KEEPER)
    try:
        keeper = os.fspath(rundir.find("a").socket)
        with CuttingProxy(f"{tmp_path}/way", keeper) as proxy, monkeypatch.context() as patched:

            def through_the_proxy(_: str) -> socket.socket:
                sock = socket.socket(socket.AF_UNIX)
                sock.connect(proxy.path)
                return sock

            patched.setattr(rundir, "connect", through_the_proxy)
            _, client = await detached.attach("a")
            process = await start_process(client, ProcessParameters(args=["forever"], stdout=True))
            waiting = asyncio.create_task(process.wait())
            for _ in range(20):
                proxy.cut()
                await asyncio.wait_for(client.ping(SOON), SOON)
                assert len(await processes(client)) == 1
            assert proxy.connections == proxy.cuts + 1 > 10
            await process.signal(signal.SIGKILL)
            assert (await asyncio.wait_for(waiting, SOON)).signal == signal.SIGKILL
            await process.close()
            await client.close()
    finally:
        await detached.end("a")
