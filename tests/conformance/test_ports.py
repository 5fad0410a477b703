"""Ports and sockets: connections of this host to sockets of a place and the other way round, with no network card.

The server and the clients inside are `sockets_there`; those outside are asyncio's.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import os
import re
import socket
import struct
import sys
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from byre import ProcessParameters, errors
from byre_proto.limits import INITIAL_WINDOW

from .sockets_there import command
from .test_process import SOON

MIB = 1024 * 1024

#: Several windows of a stream, and no more than a serial line carries in a quarter of a minute.
MUCH = 512 * 1024

_numbers = itertools.count()


@pytest.fixture
def there(place: str, request: pytest.FixtureRequest) -> Any:
    """The place, with a Python in it; a container has a network of its own."""
    return request.getfixturevalue("python_container" if place.endswith("/container") else "host")


@pytest.fixture
async def python_container(vm: Any, debian: str) -> AsyncIterator[Any]:
    async with await vm.create_container(image=debian, args=["sleep", "infinity"]) as running:
        await running.start()
        yield running


@pytest.fixture
def python(place: str) -> str:
    return sys.executable if place in ("local", "sync", "line") else "python3"


@pytest.fixture
def free_path() -> str:
    """The path of a UNIX socket that nobody has, here or there."""
    return f"/tmp/byre-ports-{os.getpid()}-{next(_numbers)}.sock"


@contextlib.asynccontextmanager
async def running(host: Any, *args: str) -> AsyncIterator[Any]:
    parameters = ProcessParameters(args=args, stdin=True, stdout=True)
    async with await host.create_process(parameters) as process:
        try:
            yield process
        finally:
            await process.kill()
            async with asyncio.timeout(SOON):
                await process.wait()


async def said(process: Any) -> str:
    async with asyncio.timeout(SOON * 3):
        line: bytes = await process.stdio.stdout.readuntil(b"\n")
    return line.decode().strip()


@pytest.fixture
async def server(there: Any, python: str) -> AsyncIterator[tuple[Any, int]]:
    """`sockets_there` as a server there: its process and its port."""
    async with running(there, *command(python, "serve", "127.0.0.1:0")) as process:
        yield process, int((await said(process)).removeprefix("ready "))


async def finish(connection: Any, how: str = "close") -> None:
    result = getattr(connection, how)()
    if inspect.isawaitable(result):
        await result


async def digest_of(reader: Any, writer: Any, data: bytes) -> bytes:
    """What a "d" server answers."""
    writer.write(b"d" + data)
    await writer.drain()
    if hasattr(writer, "write_eof"):
        writer.write_eof()
    async with asyncio.timeout(SOON * 3):
        answer: bytes = await reader.read()
    return answer


def expected(data: bytes) -> bytes:
    return f"{len(data)} {zlib.crc32(data)}".encode()


# -- connect -----------------------------------------------------------------------------------------------


async def test_a_connection_carries_bytes_both_ways(there: Any, server: tuple[Any, int]) -> None:
    connection = await there.connect(server[1])
    reader, writer = connection
    data = os.urandom(MUCH)
    writer.write(b"e" + data)
    received = bytearray()
    async with asyncio.timeout(SOON * 3):
        while len(received) < len(data):
            received += await reader.read(65536)
    await writer.drain()
    assert received == data
    await finish(connection)


async def test_half_close_by_this_side_first(there: Any, server: tuple[Any, int]) -> None:
    connection = await there.connect(f"127.0.0.1:{server[1]}")
    reader, writer = connection
    data = os.urandom(MUCH)
    writer.write(b"d" + data)
    await writer.drain()
    await finish(connection, "write_eof")
    async with asyncio.timeout(SOON):
        assert await reader.read() == expected(data), "after our end the answer still comes"
    await finish(connection)


async def test_half_close_by_the_other_side_first(there: Any, server: tuple[Any, int]) -> None:
    process, port = server
    connection = await there.connect(("127.0.0.1", port))
    reader, writer = connection
    writer.write(b"f")
    await writer.drain()
    async with asyncio.timeout(SOON):
        assert await reader.read() == b"first"
    data = os.urandom(MUCH)
    writer.write(data)
    await writer.drain()
    await finish(connection, "write_eof")
    assert await said(process) == f"read {len(data)} {zlib.crc32(data)}", "after its end it still gets ours"
    await finish(connection)


async def test_a_reset_there_is_not_an_end(there: Any, server: tuple[Any, int]) -> None:
    connection = await there.connect(server[1])
    reader, writer = connection
    writer.write(b"r")
    await writer.drain()
    with pytest.raises(ConnectionResetError):
        async with asyncio.timeout(SOON):
            await reader.read()
    await finish(connection, "abort")


async def test_giving_up_here_is_a_reset_there(there: Any, server: tuple[Any, int]) -> None:
    process, port = server
    connection = await there.connect(port)
    connection.writer.write(b"w and more")
    await connection.writer.drain()
    await finish(connection, "abort")
    assert await said(process) == "reset"


async def test_who_stops_reading_stops_the_sender(there: Any, server: tuple[Any, int]) -> None:
    process, port = server
    connection = await there.connect(port)
    connection.writer.write(b"z")
    await connection.writer.drain()
    async with asyncio.timeout(SOON):
        assert await connection.reader.read(65536)
    await finish(connection)
    assert await said(process) in ("stopped", "reset")


@pytest.mark.behaviour("B3")
@pytest.mark.not_on("sync")  # its files read ahead
async def test_a_reader_that_does_not_read_stops_only_its_own_sender(there: Any, server: tuple[Any, int]) -> None:
    unread = await there.connect(server[1])
    unread.writer.write(b"z")
    other = await there.connect(server[1])
    for _ in range(100):
        other.writer.write(b"e" * 1000)
        async with asyncio.timeout(SOON):
            assert await other.reader.readexactly(1000 if _ else 999)
    assert unread.reader.received <= INITIAL_WINDOW
    unread.abort()
    other.close()


async def test_nobody_listens(there: Any) -> None:
    with pytest.raises(errors.ConnectionRefused) as refused:
        await there.connect(1)
    assert isinstance(refused.value, ConnectionRefusedError)
    assert refused.value.hint
    with pytest.raises(errors.PathNotFound):
        await there.connect("/no/such.sock")
    with pytest.raises(errors.PathRefused):
        await there.connect("/etc/passwd")
    for address in ("example.org:80", "127.0.0.1:0"):
        with pytest.raises(errors.InvalidRequest):
            await there.connect(address)


async def test_wait_for_port(there: Any, python: str, free_path: str) -> None:
    with pytest.raises(errors.DeadlineExceeded) as late:
        await there.wait_for_port(1, timeout=2)
    assert isinstance(late.value, TimeoutError)
    assert "nobody listens" in late.value.data["last"]
    waiting = asyncio.ensure_future(there.wait_for_port(free_path, timeout=SOON * 3))
    async with running(there, *command(python, "serve", free_path)) as process:
        await waiting
        assert await said(process) == "ready"
        await there.wait_for_port(free_path, timeout=SOON)
    await there.run(["rm", "-f", free_path])


# -- this host listens -------------------------------------------------------------------------------------


@pytest.mark.not_on("serial")  # 4 MiB, minutes there; the tests of half-close show what it carries
async def test_a_forward_serves_200_clients_at_once(there: Any, server: tuple[Any, int]) -> None:
    async with there.forward("127.0.0.1:0", server[1]) as forward:
        assert forward.address.host == "127.0.0.1"
        assert forward.port == forward.address.port > 0

        async def client() -> None:
            data = os.urandom(20_000)
            reader, writer = await asyncio.open_connection("127.0.0.1", forward.port)
            assert await digest_of(reader, writer, data) == expected(data)
            writer.close()

        await asyncio.gather(*(client() for _ in range(200)))
        assert forward.refused == 0
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", forward.port)


async def test_a_forward_keeps_half_close(there: Any, server: tuple[Any, int]) -> None:
    process, port = server
    async with there.forward(0, port) as forward:
        reader, writer = await asyncio.open_connection("127.0.0.1", forward.port)
        writer.write(b"f")
        async with asyncio.timeout(SOON):
            assert await reader.read() == b"first"
        data = os.urandom(MUCH)
        writer.write(data)
        writer.write_eof()
        assert await said(process) == f"read {len(data)} {zlib.crc32(data)}"
        writer.close()


async def test_resets_pass_a_forward_both_ways(there: Any, server: tuple[Any, int]) -> None:
    process, port = server
    async with there.forward(0, port) as forward:
        reader, writer = await asyncio.open_connection("127.0.0.1", forward.port)
        writer.write(b"r")
        with pytest.raises(ConnectionResetError):
            async with asyncio.timeout(SOON):
                await reader.read()
        writer.close()
        with socket.create_connection(("127.0.0.1", forward.port)) as client:
            client.sendall(b"w and more")
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert await said(process) == "reset"


async def is_reset(port: int) -> None:
    """Whether a client is, be it while it still connects."""
    with pytest.raises(ConnectionResetError):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            async with asyncio.timeout(SOON):
                await reader.read()
        finally:
            writer.close()


async def test_a_forward_to_nobody_is_a_reset(there: Any) -> None:
    async with there.forward(0, 1) as forward:
        await is_reset(forward.port)
        assert forward.refused == 1


async def test_a_forward_has_a_limit(there: Any, server: tuple[Any, int]) -> None:
    async with there.forward(0, server[1], max_connections=2) as forward:
        kept = []
        for _ in range(2):
            reader, writer = await asyncio.open_connection("127.0.0.1", forward.port)
            writer.write(b"eecho")
            async with asyncio.timeout(SOON):
                assert await reader.readexactly(4) == b"echo"
            kept.append(writer)
        await is_reset(forward.port)
        assert (forward.connections, forward.refused) == (2, 1)
        for each in kept:
            each.close()


@pytest.mark.behaviour("B3")
@pytest.mark.not_on("line")  # what the client's kernel takes before it counts as unread takes half a minute
@pytest.mark.not_on("serial")  # minutes there
async def test_a_client_that_does_not_read_holds_little_here(there: Any, server: tuple[Any, int]) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    process, port = server
    async with there.forward(0, port) as forward:
        before = resident()
        with socket.create_connection(("127.0.0.1", forward.port)) as client:
            client.sendall(b"z")
            reader, writer = await asyncio.open_connection("127.0.0.1", forward.port)
            writer.write(b"e")
            for _ in range(200):
                writer.write(b"x" * 1000)
                async with asyncio.timeout(SOON):
                    await reader.readexactly(1000)
            writer.close()
            assert resident() - before < 32 * MIB
        assert await said(process) == "reset", "what it had not read was thrown away"


async def test_a_port_in_use_is_an_error_of_its_own(there: Any, tmp_path: Path) -> None:
    async with there.forward("127.0.0.1:0", 80) as first:
        with pytest.raises(errors.AddressInUse) as used:
            async with there.forward(first.address, 80):
                pass
        assert used.value.hint
    path = tmp_path / "a.sock"
    async with there.forward(path, 80):
        assert path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(errors.AddressInUse):
            async with there.forward(path, 80):
                pass
        assert path.exists(), "it is the other one's"
    assert not path.exists()


async def test_unix_sockets_through_a_forward(there: Any, python: str, free_path: str, tmp_path: Path) -> None:
    async with running(there, *command(python, "serve", free_path)) as process:
        assert await said(process) == "ready"
        async with there.forward(tmp_path / "here.sock", free_path):
            data = os.urandom(MUCH)
            reader, writer = await asyncio.open_unix_connection(tmp_path / "here.sock")
            assert await digest_of(reader, writer, data) == expected(data)
            writer.close()
    await there.run(["rm", "-f", free_path])


# -- it listens there --------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def listening(path: Path | None = None) -> AsyncIterator[tuple[int, list[str]]]:
    """A server of this host: its port, and what became of its connections.  It answers "d" and "h"."""
    outcomes: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            kind = await reader.read(1)
            if kind == b"h":
                assert await reader.read() == b""
                data = b"x" * MUCH
                writer.write(data)
                await writer.drain()
                outcomes.append("end")
            else:
                writer.write(expected(await reader.read()))
        except ConnectionResetError:
            outcomes.append("reset")
        writer.close()

    if path is not None:
        server = await asyncio.start_unix_server(serve, path, backlog=256)
    else:
        server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=256)
    async with server:
        yield 0 if path is not None else server.sockets[0].getsockname()[1], outcomes


@pytest.mark.not_on("serial")  # 4 MiB, minutes there; the tests of half-close show what it carries
async def test_an_exposure_serves_200_clients_at_once(there: Any, python: str) -> None:
    async with (
        listening() as (port, _),
        there.expose(port, 0) as exposure,
        running(there, *command(python, "ask", str(exposure.address), "200", "20000")) as clients,
    ):
        assert await said(clients) == "ok 200"


async def test_an_exposure_keeps_half_close(there: Any, python: str) -> None:
    async with (
        listening() as (port, outcomes),
        there.expose(port, 0) as exposure,
        running(there, *command(python, "hold", str(exposure.address))) as client,
    ):
        assert await said(client) == f"got {MUCH} {zlib.crc32(b'x' * MUCH)}"
        assert outcomes == ["end"]


async def test_an_exposure_to_nobody_is_a_reset(there: Any, python: str) -> None:
    async with (
        there.expose(1, 0) as exposure,
        running(there, *command(python, "hold", str(exposure.address))) as client,
    ):
        assert await said(client) == "reset"
        assert exposure.refused == 1


async def test_unix_sockets_through_an_exposure(there: Any, python: str, free_path: str, tmp_path: Path) -> None:
    async with listening(tmp_path / "here.sock"):
        async with there.expose(tmp_path / "here.sock", free_path):
            with pytest.raises(errors.AddressInUse):
                async with there.expose(tmp_path / "here.sock", free_path):
                    pass
            async with running(there, *command(python, "ask", free_path, "5", "100000")) as clients:
                assert await said(clients) == "ok 5"
            listed = await there.run(["ls", "-l", free_path], capture_output=True)
            assert re.match(rb"srw-rw-rw-", listed.stdout)
        async with asyncio.timeout(SOON):
            while not (await there.run(["ls", free_path], capture_output=True)).returncode:
                pass
    with pytest.raises(errors.PathNotFound):
        async with there.expose(1, "/no/such/directory/x.sock"):
            pass


async def test_a_port_in_use_there(there: Any, server: tuple[Any, int]) -> None:
    with pytest.raises(errors.AddressInUse) as used:
        async with there.expose(1, server[1]):
            pass
    assert used.value.hint


# -- nothing stays -----------------------------------------------------------------------------------------


async def descriptors(host: Any) -> int:
    """Of the agent."""
    pid = getattr(host, "pid", None) or 1
    if pid != 1:
        return len(os.listdir(f"/proc/{pid}/fd"))
    return len((await host.run(["ls", "/proc/1/fd"], capture_output=True)).stdout.split())


@pytest.mark.behaviour("B16")
@pytest.mark.not_on("sync")
@pytest.mark.not_on("line")  # half a minute, and no affair of the channel
@pytest.mark.not_on("serial")
async def test_nothing_stays_of_a_thousand_connections(there: Any, server: tuple[Any, int], place: str) -> None:
    agent = there if place in ("local", "vm") or not place.endswith("/container") else None
    before = await descriptors(agent) if agent else 0
    ours = len(os.listdir("/proc/self/fd"))
    streams = len(there.bridge.session.streams)
    async with there.forward(0, server[1]) as forward:

        async def client(number: int) -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", forward.port)
            if number % 3 == 0:
                writer.transport.abort()
                return
            assert await digest_of(reader, writer, b"x") == expected(b"x")
            writer.close()

        for _ in range(10):
            await asyncio.gather(*(client(n) for n in range(100)))
        async with asyncio.timeout(SOON):
            while forward.connections:
                await asyncio.sleep(0)
    async with asyncio.timeout(SOON):
        while len(there.bridge.session.streams) > streams:
            await there.run(["true"])
        while agent and await descriptors(agent) > before:
            pass
        while len(os.listdir("/proc/self/fd")) > ours:
            await asyncio.sleep(0)
