"""What every transport promises, with a socket at the other end that plays the emulator.

vsock needs a kernel that has it; there it runs as part of the machine's own tests.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Iterator

import pytest

from byre.errors import TransportUnavailable
from byre.transports.base import Transport
from byre.transports.memory import MemoryTransport
from byre.transports.serial import Serial
from byre.transports.virtio_serial import VirtioSerial

#: Opens the transport; gives the guest's end of its stream.
Open = Callable[[], tuple[Transport, socket.socket]]


def open_memory() -> tuple[Transport, socket.socket]:
    transport = MemoryTransport()
    transport.open()
    assert transport.guest is not None
    return transport, transport.guest


def open_virtio_serial() -> tuple[Transport, socket.socket]:
    transport = VirtioSerial()
    wiring = transport.open("device")
    assert any(f"fd={wiring.handed[0]}" in argument for argument in wiring.arguments)
    return transport, socket.socket(fileno=wiring.handed[0])


def open_serial() -> tuple[Transport, socket.socket]:
    transport = Serial()
    wiring = transport.open("device")
    assert any(f"fd={wiring.handed[0]}" in argument for argument in wiring.arguments)
    return transport, socket.socket(fileno=wiring.handed[0])


@pytest.fixture(params=[open_memory, open_virtio_serial, open_serial])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Transport, socket.socket]]:
    before = set(os.listdir("/proc/self/fd"))
    transport, guest = request.param()
    yield transport, guest
    guest.close()
    transport.close()
    assert set(os.listdir("/proc/self/fd")) == before


def test_bytes_pass_both_ways_and_the_socket_does_not_block(pair: tuple[Transport, socket.socket]) -> None:
    transport, guest = pair

    async def main() -> None:
        with await transport.connect() as host:
            assert not host.getblocking()
            await asyncio.get_running_loop().sock_sendall(host, b"to the guest")
            assert guest.recv(100) == b"to the guest"
            guest.sendall(b"to the host")
            assert await asyncio.get_running_loop().sock_recv(host, 100) == b"to the host"

    asyncio.run(main())


def test_the_next_connection_continues_and_the_guest_sees_no_end(pair: tuple[Transport, socket.socket]) -> None:
    """The port has no connections: what was under way stays, and closing one leaks nothing in the guest."""
    transport, guest = pair
    guest.setblocking(False)

    async def main() -> None:
        for number in range(200):  # a port is dead after 128 disconnections
            with await transport.connect() as host:
                if number:
                    assert host.recv(100) == b"%d" % (number - 1)
            guest.sendall(b"%d" % number)
            with pytest.raises(BlockingIOError):
                guest.recv(1)

    asyncio.run(main())


def test_closed_it_refuses_and_the_guest_sees_the_end(pair: tuple[Transport, socket.socket]) -> None:
    transport, guest = pair
    transport.close()
    transport.close()
    assert guest.recv(1) == b""
    with pytest.raises(TransportUnavailable):
        asyncio.run(transport.connect())


@pytest.mark.parametrize("kind", [MemoryTransport, VirtioSerial, Serial])
def test_before_it_is_open(kind: type[Transport]) -> None:
    transport = kind()
    assert kind.unavailable() is None
    assert transport.secret is None
    with pytest.raises(TransportUnavailable):
        asyncio.run(transport.connect())
    transport.close()
