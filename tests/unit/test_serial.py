"""The agent at the end of a tty, a bad line between, and the host at the other end: nothing is lost above it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import random
import signal
import socket
import sys
import threading
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import serial
import serial.rfc2217

from byre import ProcessParameters, errors
from byre.serialhost import SerialHost
from byre.transports.serial import open_port
from tests.bad_line import BadLine, agent_at, line_host

SOON = 20.0
KERNEL = b"[   12.345678] Out of memory: Killed process 4711 (sh)\r\n"


async def echoed(host: SerialHost, data: bytes) -> bytes:
    async with asyncio.timeout(3 * SOON):
        return (await host.run(["cat"], input=data, capture_output=True)).stdout


# -- the line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "size"), [(0.0, 500_000), (1e-4, 500_000), (1e-3, 200_000), (5e-3, 5000)])
async def test_bytes_pass_whole_whatever_becomes_of_them_on_the_line(rate: float, size: int) -> None:
    data = random.Random(7).randbytes(size)
    async with line_host(rate, seed=3) as (host, line):
        assert await echoed(host, data) == data
    assert line.hurt >= rate * size


async def test_a_real_speed() -> None:
    """115,200 baud: pings answer under full load, and bytes pass."""
    data = random.Random(7).randbytes(20_000)
    async with line_host(1e-4, baud=115_200) as (host, _):
        assert await echoed(host, data) == data
        async with await host.create_process(ProcessParameters(args=["cat", "/dev/zero"], stdout=True)) as process:
            reading = asyncio.ensure_future(process.stdio.stdout.readexactly(10_000))  # type: ignore[union-attr]
            for _ in range(3):
                await host.bridge.ping(SOON)
            assert await reading == bytes(10_000)
            await process.kill()


async def test_kernel_messages_in_between_do_no_harm_and_are_shown() -> None:
    data = random.Random(7).randbytes(200_000)
    async with line_host() as (host, line):
        talking = asyncio.create_task(chatter(line))
        try:
            assert await echoed(host, data) == data
        finally:
            talking.cancel()
        line.say(0, KERNEL + b"\x1b[2J the last words\r\n")
        async with asyncio.timeout(SOON):
            while "last words" not in host.console_tail():
                await host.run(["true"])  # something after it on the line
        shown = host.console_tail(400)
        assert KERNEL.decode().strip() in shown
        assert "\x1b" not in shown


async def chatter(line: BadLine) -> None:
    """A kernel that writes to both ends, wherever it meets a frame."""
    while True:
        for end in (0, 1):
            line.say(end, KERNEL)
        await asyncio.sleep(0.001)


# -- who comes and goes ------------------------------------------------------------------------------------


async def test_hosts_come_one_after_the_other_and_processes_go_on() -> None:
    with BadLine(1e-3) as line:
        async with agent_at(line.ends[1]):
            async with SerialHost(line.ends[0]) as first:
                process = await first.create_process(ProcessParameters(args=["sleep", "1000"]))
                pid = process.pid
            with pytest.raises(errors.ConnectionLost):
                await process.wait()
            await process.close()
            async with SerialHost(line.ends[0]) as second:
                os.kill(pid, 0)
                os.kill(pid, signal.SIGKILL)
                assert await echoed(second, b"still there") == b"still there"


async def test_an_agent_that_began_anew_ends_what_waits() -> None:
    with BadLine(1e-3) as line:
        async with agent_at(line.ends[1]) as agent:
            host = SerialHost(line.ends[0])
            await host.start()
            running = asyncio.create_task(host.run(["sleep", "1000"]))
            await host.run(["true"])
            agent.kill()
            await agent.wait()
        async with agent_at(line.ends[1]):
            with pytest.raises(errors.ConnectionLost):
                await asyncio.wait_for(running, SOON)
            await host.close()
            async with SerialHost(line.ends[0]) as again:
                assert await echoed(again, b"hello") == b"hello"


async def test_a_host_that_died_leaves_the_line_to_the_next_one() -> None:
    """Its last frames are still on the line, and the agent sends it some."""
    with BadLine() as line:
        async with agent_at(line.ends[1]):
            dead = SerialHost(line.ends[0])
            await dead.start()
            process = await dead.create_process(ProcessParameters(args=["cat", "/dev/zero"], stdout=True))
            await process.stdio.stdout.readexactly(1000)  # type: ignore[union-attr]
            assert dead._port is not None
            dead.bridge._redial = None  # the dead open nothing again
            await dead._port.close()  # without a word
            async with SerialHost(line.ends[0]) as host:
                assert await echoed(host, b"hello") == b"hello"
            await dead.close()
            with pytest.raises(errors.ConnectionLost):
                await process.wait()
            await process.close()


async def test_where_nobody_answers_the_wait_ends() -> None:
    with BadLine() as line:
        before = set(os.listdir("/proc/self/fd"))
        with pytest.raises(errors.DeadlineExceeded):
            await SerialHost(line.ends[0], start_timeout=0.5).start()
        assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("turns", [1, 3, 10])
async def test_cancelling_the_start_closes_the_port(turns: int) -> None:
    with BadLine() as line:
        before = set(os.listdir("/proc/self/fd"))
        starting = asyncio.create_task(SerialHost(line.ends[0]).start())
        for _ in range(turns):
            await asyncio.sleep(0.002)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        async with asyncio.timeout(SOON):
            while set(os.listdir("/proc/self/fd")) != before:  # pyserial opens it in a thread
                await asyncio.sleep(0.01)


async def test_it_starts_once_and_not_before() -> None:
    with BadLine() as line:
        async with agent_at(line.ends[1]):
            host = SerialHost(line.ends[0])
            with pytest.raises(errors.ConnectionLost, match="async with"):
                await host.run(["true"])
            async with host:
                with pytest.raises(errors.MachineFailed):
                    await host.start()
            await host.close()


# -- the port ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["/dev/no-such-tty", "/dev/null", "socket://127.0.0.1:1", "nonsense://"])
async def test_a_port_that_cannot_be_opened(url: str) -> None:
    with pytest.raises((errors.TransportUnavailable, errors.InvalidRequest), match=url):
        await open_port(url)


async def test_settings_that_there_are_not() -> None:
    with BadLine() as line, pytest.raises(errors.InvalidRequest):
        await open_port(line.ends[0], no_such_setting=1)


async def test_a_port_is_for_one_program() -> None:
    with BadLine() as line:
        port = await open_port(line.ends[0])
        with pytest.raises(errors.TransportUnavailable, match="lock"):
            await open_port(line.ends[0])
        port.socket.close()
        await port.close()
        await port.close()


@contextmanager
def served_over_tcp(device: str, *, rfc2217: bool) -> Iterator[str]:
    """A tty behind a TCP port, as a terminal server has it; pyserial's own server side of RFC 2217."""
    with socket.create_server(("127.0.0.1", 0)) as listener, Tty(device, timeout=0.02) as port:
        ended = threading.Event()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                manager = Manager(port, connection) if rfc2217 else None
                reading = threading.Thread(target=read, args=(connection, manager))
                reading.start()
                while data := connection.recv(4096):
                    port.write(b"".join(manager.filter(data)) if manager else data)
                ended.set()
                reading.join()

        def read(connection: socket.socket, manager: Any) -> None:
            while not ended.is_set():
                if data := port.read(port.in_waiting or 1):
                    try:
                        connection.sendall(b"".join(manager.escape(data)) if manager else data)
                    except OSError:
                        return

        serving = threading.Thread(target=serve)
        serving.start()
        scheme = "rfc2217" if rfc2217 else "socket"
        yield f"{scheme}://127.0.0.1:{listener.getsockname()[1]}"
        serving.join(SOON)
        assert not serving.is_alive()


class TerminalServer:
    """A tty behind a TCP port whose connections are cut.  What comes while there is none is lost."""

    def __init__(self, device: str) -> None:
        self.url = ""
        self.connections = 0
        self._tty = os.open(device, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
        self._writer: asyncio.StreamWriter | None = None

    async def __aenter__(self) -> TerminalServer:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1")
        self.url = f"socket://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        asyncio.get_running_loop().add_reader(self._tty, self._from_tty)
        return self

    async def __aexit__(self, *_: object) -> None:
        asyncio.get_running_loop().remove_reader(self._tty)
        self._server.close()
        self.cut()
        os.close(self._tty)

    def cut(self) -> None:
        if self._writer is not None:
            self._writer.transport.abort()

    def _from_tty(self) -> None:
        data = os.read(self._tty, 4096)
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(data)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self.connections += 1
        with contextlib.suppress(OSError):  # cut
            while data := await reader.read(4096):
                with contextlib.suppress(BlockingIOError):
                    os.write(self._tty, data)
        writer.close()


async def test_a_line_whose_way_is_cut_goes_on_where_it_was() -> None:
    """The port is opened again, the line begins anew, and the session goes on over it."""
    data = random.Random(7).randbytes(200_000)
    with BadLine(1e-3) as line:
        async with agent_at(line.ends[1]), TerminalServer(line.ends[0]) as server, SerialHost(server.url) as host:
            process = await host.create_process(ProcessParameters(args=["cat"], stdin=True, stdout=True))
            stdin, stdout = process.stdio.stdin, process.stdio.stdout
            assert stdin is not None and stdout is not None
            came = b""
            for at in range(0, len(data), 20_000):
                stdin.write(data[at : at + 20_000])
                server.cut()
                came += await asyncio.wait_for(stdout.readexactly(20_000), SOON)
            stdin.close()
            assert came == data
            assert (await asyncio.wait_for(process.wait(), SOON)).code == 0
            assert server.connections > 5
            await process.close()


class Tty(serial.Serial):  # type: ignore[misc]
    """A pty has no modem lines to ask for."""

    cts = dsr = ri = cd = dtr = rts = break_condition = False


class Manager(serial.rfc2217.PortManager):  # type: ignore[misc]
    """It writes its answers to a file-like object."""

    def __init__(self, port: serial.Serial, connection: socket.socket) -> None:
        self.write = connection.sendall
        super().__init__(port, self)


@pytest.mark.filterwarnings("ignore:set[DN]a:DeprecationWarning")  # pyserial's, of its threads
@pytest.mark.parametrize("rfc2217", [False, True], ids=["socket", "rfc2217"])
async def test_a_tty_behind_a_network(rfc2217: bool) -> None:
    data = random.Random(7).randbytes(50_000)
    with BadLine(1e-3) as line, served_over_tcp(line.ends[0], rfc2217=rfc2217) as url:
        async with agent_at(line.ends[1]), SerialHost(url) as host:
            assert await echoed(host, data) == data
    assert "byre-serial" not in [thread.name for thread in threading.enumerate()]


async def test_a_port_that_goes_away_ends_what_waits() -> None:
    master, slave = pty.openpty()
    tty.setraw(slave)
    starting = asyncio.create_task(SerialHost(os.ttyname(slave), start_timeout=SOON).start())
    loop = asyncio.get_running_loop()
    heard = asyncio.Event()
    loop.add_reader(master, heard.set)
    await asyncio.wait_for(heard.wait(), SOON)
    loop.remove_reader(master)
    os.close(master)
    os.close(slave)
    with pytest.raises(ConnectionError, match="the channel ended"):
        await asyncio.wait_for(starting, SOON)


# -- the agent ---------------------------------------------------------------------------------------------


async def test_the_agent_ends_with_its_tty_and_what_it_started_ends_with_it() -> None:
    with BadLine() as line:
        async with agent_at(line.ends[1]) as agent:
            async with SerialHost(line.ends[0]) as host:
                process = await host.create_process(ProcessParameters(args=["sleep", "1000"]))
                pid = process.pid
            await process.close()
            line.hang_up(1)
            assert await asyncio.wait_for(agent.wait(), SOON) == 0
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/dev/no-such-tty"], "No such file"),
        (["/dev/null"], "not a terminal"),
        (["/dev/ptmx", "12345"], "no 12345 bits per second"),
        ([], "usage"),
    ],
)
async def test_what_the_agent_says_of_a_line_that_there_is_not(arguments: list[str], words: str) -> None:
    agent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "byre_guest", "--serial", *arguments), stderr=asyncio.subprocess.PIPE
    )
    _, said = await asyncio.wait_for(agent.communicate(), SOON)
    assert agent.returncode == 1
    assert words in said.decode()
