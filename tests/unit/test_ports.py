"""Ports without a VM: addresses, what a relay and a keeper make of them, limits, loss, and wrong requests."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from byre import LocalHost, detached, errors
from byre.bridge import Bridge
from byre.ports.address import Address
from byre.relay import Relay
from byre_guest import addresses, errands, sockets
from tests.conformance.test_ports import is_reset

from .agent_client import AgentClient
from .test_keeper_relay import Attached, pair

TIMEOUT = 30.0
KEEPER = "tests.unit.played_keeper"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (80, "127.0.0.1:80"),
        ("80", "127.0.0.1:80"),
        (":80", "127.0.0.1:80"),
        ("0.0.0.0:0", "0.0.0.0:0"),
        ("localhost:80", "localhost:80"),
        ("[::1]:80", "[::1]:80"),
        (("::1", 80), "[::1]:80"),
        ("/run/x.sock", "/run/x.sock"),
        ("unix:/run/x.sock", "/run/x.sock"),
        ("./x.sock", "./x.sock"),
        (Path("x.sock"), "x.sock"),
        (Address("::1", 80), "[::1]:80"),
    ],
)
def test_addresses(value: Any, text: str) -> None:
    assert str(Address.of(value)) == text


@pytest.mark.parametrize("value", ["", "x", "x:", "x:y", -1, 1 << 16, "1:65536", "1:-1", True, None])
def test_what_is_no_address(value: Any) -> None:
    with pytest.raises(errors.InvalidRequest) as refused:
        Address.of(value)
    assert refused.value.hint


def test_a_socket_that_is_connected_to_itself_is_refused() -> None:
    """By chance a port in which nobody listens is also our own end's."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.connect(sock.getsockname())
        assert addresses.connect_error(sock) == errno.ECONNREFUSED


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


@pytest.fixture
async def port() -> AsyncIterator[int]:
    """Of a server that says what it hears."""
    async with await asyncio.start_server(echo, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


# -- over a relay ------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def relayed(*names: str) -> AsyncIterator[tuple[LocalHost, list[Attached]]]:
    """Clients of a relay whose guest is a real agent."""
    async with LocalHost() as host, asyncio.timeout(TIMEOUT):
        relay = Relay(host.bridge, {})
        clients, attending = [], []
        for _ in names:
            ours, theirs = pair()
            attending.append(asyncio.create_task(relay.attend(theirs)))
            clients.append(Attached(Bridge(ours)))
            await clients[-1].bridge.open(TIMEOUT)
        try:
            yield host, clients
        finally:
            for client in clients:
                await client.bridge.close()
            await asyncio.gather(*attending)
            await relay.close("the test is over")


async def spoken(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    assert await reader.readexactly(len(data)) == data


async def test_connections_pass_a_relay_with_their_ends(port: int) -> None:
    async with relayed("a") as (host, (client,)):
        data = os.urandom(3_000_000)
        async with client.forward(0, port) as forward, client.expose(port, 0) as exposure:
            for address in (forward.address, exposure.address):
                reader, writer = await asyncio.open_connection(address.host, address.port)
                reading = asyncio.ensure_future(reader.read())
                writer.write(data)
                writer.write_eof()
                assert await reading == data
                writer.close()
        while host.bridge.session.streams or client.bridge.session.streams:
            await asyncio.sleep(0)


async def test_what_a_client_had_of_sockets_ends_with_it(port: int) -> None:
    async with relayed("a", "b") as (host, (first, second)):
        connections = [await client.connect(port) for client in (first, second)]
        for connection in connections:
            await spoken(connection.reader, connection.writer, b"here")
        exposure = first.expose(port, 0)
        await exposure.start()
        taken = await asyncio.open_connection("127.0.0.1", exposure.port)
        await spoken(*taken, b"exposed")
        await first.bridge.close()
        with pytest.raises(ConnectionResetError):
            await taken[0].read()
        taken[1].close()
        with pytest.raises(errors.ConnectionRefused):
            while True:
                (await second.connect(exposure.port)).abort()
        await spoken(connections[1].reader, connections[1].writer, b"the other's goes on")
        connections[1].close()
        while host.bridge.session.streams:
            await asyncio.sleep(0)


async def test_a_keeper_holds_what_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    await detached.start("a", {}, keeper=KEEPER)
    try:
        client, bridge = await detached.attach("a")
        first = await client.ports(bridge).publish("", "127.0.0.1:0", 80)
        path = await client.ports(bridge).publish("", tmp_path / "x.sock", "/run/y.sock")
        await bridge.close()
        client, bridge = await detached.attach("a")
        ports = client.ports(bridge)
        found = {(str(p.host), str(p.guest), p.container) for p in await ports.published()}
        assert found == {(str(first), "127.0.0.1:80", ""), (f"{tmp_path}/x.sock", "/run/y.sock", "")}
        with pytest.raises(errors.AddressInUse):
            await ports.publish("", first, 81)
        with pytest.raises(errors.InvalidRequest):
            await ports.unpublish(1)
        await is_reset(first.port)  # its guest has no sockets
        await ports.unpublish(first)
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(first.host, first.port)
        assert [p.host for p in await ports.published()] == [path]
        await bridge.close()
    finally:
        await detached.end("a")
    assert not (tmp_path / "x.sock").exists()


# -- limits, loss, wrong requests --------------------------------------------------------------------------


async def test_the_agent_has_a_limit_of_connections() -> None:
    """A server that closes at once leaves it with the half that is still ours."""
    closing = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0, backlog=512)
    async with closing, LocalHost() as host, asyncio.timeout(TIMEOUT):
        port = closing.sockets[0].getsockname()[1]
        kept: list[Any] = []
        for _ in range(sockets.MAX_CONNECTIONS // 128):
            kept += await asyncio.gather(*(host.connect(port) for _ in range(128)))
        with pytest.raises(errors.ResourceExhausted) as refused:
            await host.connect(port)
        assert refused.value.hint
        kept.pop().close()
        while True:  # a request overtakes what was said on a stream
            with contextlib.suppress(errors.ResourceExhausted):
                await host.wait_for_port(port)
                break
        for connection in kept:
            connection.close()


@pytest.mark.behaviour("B47")
async def test_listeners_that_do_not_accept_hold_a_few_helpers_for_their_deadline(tmp_path: Path) -> None:
    path = tmp_path / "full.sock"
    with socket.socket(socket.AF_UNIX) as full, socket.socket(socket.AF_UNIX) as first:
        full.bind(str(path))
        full.listen(0)
        first.connect(str(path))
        async with LocalHost() as host, asyncio.timeout(TIMEOUT):
            opening = [asyncio.ensure_future(host.connect(path, timeout=2)) for _ in range(3 * errands.MAX_ERRANDS)]
            helpers = Path(f"/proc/{host.pid}/task/{host.pid}/children")
            while len(helpers.read_text().split()) < errands.MAX_ERRANDS:
                await host.bridge.ping(TIMEOUT)
            for _ in range(50):
                await host.bridge.ping(TIMEOUT)
                assert len(helpers.read_text().split()) == errands.MAX_ERRANDS
            for each in opening:
                with pytest.raises(errors.DeadlineExceeded):
                    await each
            while helpers.read_text().split():
                await host.bridge.ping(TIMEOUT)
            full.accept()[0].close()
            (await host.connect(path)).close()


@pytest.mark.behaviour("B42")
async def test_the_loss_of_the_agent_is_no_end_of_a_connection(port: int) -> None:
    async with LocalHost() as host, asyncio.timeout(TIMEOUT):
        connection = await host.connect(port)
        forward, exposure = host.forward(0, port), host.expose(port, 0)
        await forward.start()
        await exposure.start()
        reader, writer = await asyncio.open_connection("127.0.0.1", forward.port)
        await spoken(reader, writer, b"here")
        assert host.pid is not None
        os.kill(host.pid, 9)
        with pytest.raises(errors.ConnectionLost):
            await connection.reader.read()
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()
        await forward.ended.wait()
        await exposure.ended.wait()
        with pytest.raises(errors.ConnectionLost):
            await host.connect(port)


@pytest.mark.behaviour("B15")
async def test_a_connection_whose_opening_was_cancelled_leaves_nothing(port: int) -> None:
    async with LocalHost() as host, asyncio.timeout(TIMEOUT):
        (await host.connect(port)).close()  # what is loaded with the first one stays
        before = len(os.listdir(f"/proc/{host.pid}/fd"))
        for turns in range(6):
            opening = asyncio.ensure_future(host.connect(port))
            for _ in range(turns):
                await asyncio.sleep(0)
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening
        exposure = host.expose(port, 0)
        starting = asyncio.ensure_future(exposure.start())
        await asyncio.sleep(0)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        while host.bridge.session.streams:
            await asyncio.sleep(0)
        while len(os.listdir(f"/proc/{host.pid}/fd")) > before:
            await host.bridge.ping(TIMEOUT)


def test_wrong_requests_fail_alone() -> None:
    with AgentClient() as client:
        session = client.connection.session
        for method, arguments in (
            ("socket.connect", {"host": "example.org", "port": 80}),
            ("socket.connect", {"host": "127.0.0.1", "port": 1 << 16}),
            ("socket.connect", {"path": "relative"}),
            ("socket.connect", {"path": "/nul\0"}),
            ("socket.listen", {"host": "::1::", "port": 0}),
            ("socket.accept", {"listener": 7}),
        ):
            with pytest.raises(errors.InvalidRequest):
                client.call(method, **arguments)
        stdin = session.new_stream(sending=True, receiving=False)
        stdout = session.new_stream(sending=False, receiving=True)
        with pytest.raises(errors.SocketFailed):
            client.call("socket.accept", listener=7, stdin=stdin, stdout=stdout)
        with pytest.raises((errors.NotSupported, errors.ContainerNotFound)):  # without cgroup v2, with it
            client.call("socket.connect", container="nosuch", port=80)
        assert client.call("socket.close", listener=7) == {}
