"""The relay between a keeper's clients and the guest: real bridges on both sides, only the guest is played."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import pytest

from byre.bridge import Bridge
from byre.errors import ConnectionLost, DeadlineExceeded, NotSupported, ProgramNotFound
from byre.parameters import ProcessParameters
from byre.process import GuestProcess, GuestProcessHost
from byre.relay import Relay
from byre.streams import HIGH_WATER
from byre.testing import Command, FakeGuest, FakeProcess, Handler
from byre_proto.limits import INITIAL_WINDOW, MAX_WINDOW

TIMEOUT = 20.0


class Attached(GuestProcessHost):
    """A client of the relay."""

    def __init__(self, bridge: Bridge) -> None:
        self._client = bridge

    @property
    def bridge(self) -> Bridge:
        return self._client

    async def start(self, *args: str, **streams: bool) -> GuestProcess:
        return await self.start_process(ProcessParameters(args=args, **(streams or {"stdout": True})))  # type: ignore[arg-type]


class Setting:
    """A played guest, a relay to it, and as many clients as a test attaches."""

    def __init__(self, guest: FakeGuest, relay: Relay, upstream: Bridge) -> None:
        self.guest = guest
        self.relay = relay
        self.upstream = upstream
        self._attending: list[asyncio.Task[None]] = []
        self._clients: list[Attached] = []

    async def attach(self) -> Attached:
        ours, theirs = pair()
        self._attending.append(asyncio.create_task(self.relay.attend(theirs)))
        client = Attached(Bridge(ours))
        await client.bridge.open(TIMEOUT)
        self._clients.append(client)
        return client

    async def close(self) -> None:
        for client in self._clients:
            await client.bridge.close()
        await asyncio.gather(*self._attending)
        await self.relay.close("the test is over")


def pair() -> tuple[socket.socket, socket.socket]:
    ends = socket.socketpair()
    for end in ends:
        end.setblocking(False)
    return ends


@contextlib.asynccontextmanager
async def setting(
    commands: Mapping[str, Command] | None = None,
    handlers: Mapping[str, Handler] | None = None,
    own: Mapping[str, Any] | None = None,
) -> AsyncIterator[Setting]:
    ours, theirs = pair()
    guest, upstream = FakeGuest(theirs, commands, handlers), Bridge(ours, label="guest")
    await asyncio.gather(guest.open(), upstream.open(TIMEOUT))
    made = Setting(guest, Relay(upstream, dict(own or {})), upstream)
    try:
        yield made
    finally:
        await made.close()
        await upstream.close()
        await guest.close()


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(TIMEOUT):
            await test()

    asyncio.run(bounded())


async def until(condition: Callable[[], object]) -> None:
    """Turn the loop until the condition holds; the test's own timeout ends it otherwise."""
    while not condition():
        await asyncio.sleep(0)


async def cat(process: FakeProcess) -> int:
    assert process.stdin is not None and process.stdout is not None
    while data := await process.stdin.read(65536):
        process.stdout.write(data)
        await process.stdout.drain()
    return 7


async def yes(process: FakeProcess) -> int:
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        while True:
            process.stdout.write(b"y\n" * 2048)
            await process.stdout.drain()
    return 141


async def forever(_: FakeProcess) -> int:
    await asyncio.Event().wait()
    return 0


def test_streams_pass_unchanged_in_both_directions_with_their_ends_and_the_exit() -> None:
    async def test() -> None:
        data = os.urandom(5 * 1024 * 1024 + 17)
        async with setting({"cat": cat}) as made:
            client = await made.attach()
            result = await client.run(["cat"], input=data, capture_output=True)
            assert hashlib.sha256(result.stdout).digest() == hashlib.sha256(data).digest()
            assert result.returncode == 7
            await until(lambda: not made.upstream.session.streams)  # and nothing is left of them

    run(test)


def test_many_clients_each_have_their_own_stream_numbers() -> None:
    async def test() -> None:
        async with setting({"cat": cat}) as made:
            clients = [await made.attach() for _ in range(4)]
            results = await asyncio.gather(
                *(
                    client.run(["cat"], input=b"%d.%d" % (i, j), capture_output=True)
                    for i, client in enumerate(clients)
                    for j in range(8)
                )
            )
            assert [r.stdout for r in results] == [b"%d.%d" % (i, j) for i in range(4) for j in range(8)]

    run(test)


def test_a_client_that_does_not_read_stops_only_its_own_process_and_the_relay_stays_small() -> None:
    async def test() -> None:
        written = 0

        async def count(process: FakeProcess) -> int:
            nonlocal written
            assert process.stdout is not None
            while True:
                process.stdout.write(bytes(4096))
                await process.stdout.drain()
                written += 4096

        async with setting({"count": count, "cat": cat}) as made:
            lazy, busy = await made.attach(), await made.attach()
            process = await lazy.start("count")
            await busy.run(["cat"], input=bytes(4 * MAX_WINDOW), capture_output=True)
            # Each of relay and client hold a window that never grew; the guest's writer has its own buffer.
            assert written < 4 * INITIAL_WINDOW + 2 * HIGH_WATER
            assert await process.kill()
            assert (await process.wait()).code == 137
            await process.close()

    run(test)


@pytest.mark.parametrize("by", ["close_stdout", "close"])
def test_a_reader_that_closes_gives_the_writer_a_broken_pipe(by: str) -> None:
    async def test() -> None:
        async with setting({"yes": yes}) as made:
            client = await made.attach()
            process = await client.start("yes")
            stdout = process.stdio.stdout
            assert stdout is not None
            await stdout.readexactly(10)
            guest = made.guest.processes[1]
            await getattr(process, by)()
            assert guest.task is not None
            await guest.task
            if by == "close_stdout":
                assert (await process.wait()).code == 141
                await process.close()

    run(test)


def test_a_process_that_reads_no_more_breaks_the_clients_pipe() -> None:
    async def test() -> None:
        async def deaf(process: FakeProcess) -> int:
            process.stdin.stop()  # type: ignore[union-attr]
            return await forever(process)

        async with setting({"deaf": deaf}) as made:
            client = await made.attach()
            process = await client.start("deaf", stdin=True)
            stdin = process.stdio.stdin
            assert stdin is not None
            with pytest.raises(BrokenPipeError):
                while True:
                    stdin.write(bytes(65536))
                    await stdin.drain()
            await process.kill()
            await process.close()

    run(test)


def test_errors_arrive_as_their_class_and_leave_no_stream() -> None:
    async def test() -> None:
        async with setting() as made:
            client = await made.attach()
            with pytest.raises(ProgramNotFound, match="nothing"):
                await client.run(["nothing"], capture_output=True)
            with pytest.raises(NotSupported):
                await client.bridge.call("container.state", container="web")
            await until(lambda: not made.upstream.session.streams)
            assert not made.upstream.streams.readers and not made.upstream.streams.writers

    run(test)


@pytest.mark.behaviour("B15")
@pytest.mark.parametrize("how", ["cancelled", "gone"])
def test_a_creation_that_nobody_wants_any_longer_is_undone_if_it_happened(how: str) -> None:
    async def test() -> None:
        reached = asyncio.Event()

        async def slow(arguments: dict[str, Any]) -> dict[str, Any]:
            reached.set()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            return made.guest._create(arguments)  # too late to cancel: it was made

        async with setting({"forever": forever}, {"process.create": slow}) as made:
            client = await made.attach()
            task = asyncio.create_task(client.start("forever"))
            await reached.wait()
            if how == "cancelled":
                task.cancel()
            else:
                await client.bridge.close()
            with pytest.raises((asyncio.CancelledError, ConnectionLost)):
                await task
            await until(lambda: len(made.guest.requests) >= 3 and not made.guest.processes)
            assert ("process.signal", {"process": 1, "signal": 9, "tree": True}) in made.guest.requests
            await until(lambda: not made.upstream.session.streams)

    run(test)


def test_a_deadline_is_the_guests_too_and_fails_alone() -> None:
    async def test() -> None:
        async def never(_: dict[str, Any]) -> None:
            await asyncio.Event().wait()

        async with setting({"cat": cat}, {"system.stacks": never}) as made:
            client = await made.attach()
            with pytest.raises(DeadlineExceeded):
                await client.bridge.call("system.stacks", timeout=0.05)
            assert (await client.run(["cat"], input=b"on", capture_output=True)).stdout == b"on"

    run(test)


def test_no_exit_overtakes_the_reply_that_names_its_process() -> None:
    async def test() -> None:
        async def at_once(_: FakeProcess) -> int:
            return 3

        async with setting({"at_once": at_once}) as made:
            client = await made.attach()
            for _ in range(50):
                assert (await client.run(["at_once"])).returncode == 3

    run(test)


@pytest.mark.behaviour("B43")
def test_a_client_that_dies_leaves_its_process_running_and_its_stream_held() -> None:
    async def test() -> None:
        async with setting({"yes": yes}) as made:
            client, other = await made.attach(), await made.attach()
            await (await client.start("yes")).stdio.stdout.readexactly(10)  # type: ignore[union-attr]
            client.bridge._sock.shutdown(socket.SHUT_RDWR)  # as kill -9 does
            await client.bridge.wait_lost()
            listed = (await other.bridge.call("process.list"))["processes"]
            assert [entry[0] for entry in listed] == [1]
            assert not made.guest.processes[1].task.done()  # type: ignore[union-attr]

            # Once it ends, nothing of it is left.
            await other.bridge.call("process.signal", process=1, signal=9)
            await until(lambda: not made.guest.processes and not made.upstream.session.streams)

    run(test)


@pytest.mark.behaviour("B43")
def test_what_a_tied_client_started_is_killed_when_it_dies() -> None:
    async def test() -> None:
        async with setting({"forever": forever}) as made:
            client = await made.attach()
            await client.bridge.call("vm.tie")
            process = await client.start("forever")
            client.bridge._sock.shutdown(socket.SHUT_RDWR)
            await until(lambda: not made.guest.processes)
            assert ("process.signal", {"process": 1, "signal": 9, "tree": True}) in made.guest.requests
            with pytest.raises(ConnectionLost):
                await process.wait()
            await process.close()

    run(test)


@pytest.mark.behaviour("B43")
def test_the_calls_of_a_client_that_dies_are_cancelled() -> None:
    async def test() -> None:
        reached, cancelled = asyncio.Event(), asyncio.Event()

        async def never(_: dict[str, Any]) -> None:
            reached.set()
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        async with setting(handlers={"container.wait": never}) as made:
            client = await made.attach()
            call = asyncio.create_task(client.bridge.call("container.wait", container="c"))
            await reached.wait()
            await client.bridge.close()
            await cancelled.wait()
            with pytest.raises(ConnectionLost):
                await call

    run(test)


def test_exits_of_containers_reach_every_client_and_one_to_be_removed_is() -> None:
    async def test() -> None:
        handlers: dict[str, Handler] = {"container.create": lambda _: {}, "container.delete": lambda _: {}}
        async with setting(handlers=handlers) as made:
            first, second = await made.attach(), await made.attach()
            await first.bridge.call("container.create", container="c", spec={})
            await first.bridge.call("vm.remove_at_exit", container="c")
            heard: list[Any] = []
            for client in (first, second):
                client.bridge.subscribe("container.exit", "c", heard.append)
            made.guest.bridge.tell("container.exit", {"container": "c", "code": 5, "signal": 0})
            await until(lambda: len(heard) == 2)
            assert {event["code"] for event in heard} == {5}
            await until(lambda: ("container.delete", {"container": "c"}) in made.guest.requests)

    run(test)


def test_the_keepers_own_methods_are_served_here_and_every_client_hears_why_it_ends() -> None:
    async def test() -> None:
        async def info(_: dict[str, Any]) -> dict[str, Any]:
            return {"info": {"name": "web"}}

        async def broken(_: dict[str, Any]) -> dict[str, Any]:
            raise RuntimeError("a defect")

        async with setting(own={"vm.info": info, "vm.pause": broken}) as made:
            client = await made.attach()
            assert (await client.bridge.call("vm.info"))["info"] == {"name": "web"}
            with pytest.raises(Exception, match="the keeper failed"):
                await client.bridge.call("vm.pause")
            heard: list[Any] = []
            client.bridge.subscribe("vm.exit", None, heard.append)
            await made.relay.close("the VM was shut down")
            await client.bridge.wait_lost()
            assert heard[0] == {"reason": "the VM was shut down"}
            assert made.guest.requests == []

    run(test)
