"""Serial lines: the second 16550 of a machine, and any port that pyserial can open.

    Serial       a machine's: its UART ends in a socket pair, as virtio-serial's port does
    open_port    a device or a URL of pyserial's: raw bytes between it and a socket

Rule: bytes only, and no promise about them: a line may lose some, so what cannot be passed on at once is dropped.
`byre_proto.line` makes it a channel.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from typing import Any

from byre.errors import InvalidRequest, TransportUnavailable
from byre.machines.spawn import in_thread
from byre.transports.base import Wiring
from byre.transports.pair import PairTransport

#: Bits per second where none are named: what everybody's console has.
BAUDRATE = 115_200

READ_SIZE = 64 * 1024

#: How often a thread that reads from a port without a descriptor looks whether it is still wanted, in seconds.
POLL = 0.2


class Serial(PairTransport):
    """The machine's second serial port; the first one is its console.

    Raw bytes: what the guest's kernel writes to the same port is in between (where `console=` names it).
    When it is hung up, the agent goes on greeting, and a clone's host hears it.
    """

    name = "serial"
    lossy = True

    def open(self, bus: str, *, had_host: bool = False) -> Wiring:
        fd = self._make_pair().detach()
        return Wiring(
            arguments=(
                *("-chardev", f"socket,id=bridge,fd={fd}"),
                *("-device", "isa-serial,chardev=bridge,index=1"),
            ),
            kernel_argument=f"byre.channel={self.name}:ttyS1",
            handed=(fd,),
        )


async def open_port(url: str, baudrate: int = BAUDRATE, **settings: Any) -> SerialPort:
    """A device ("/dev/ttyUSB0") or a URL ("rfc2217://host:port", "socket://host:port"), raw, for us alone.

    `settings` are pyserial's.  Raises `TransportUnavailable`, `InvalidRequest` for settings that there are not.
    """
    import serial  # here: only who has a port needs it

    settings = {"exclusive": True, **settings, "timeout": POLL}
    opening = asyncio.ensure_future(in_thread(lambda: serial.serial_for_url(url, baudrate=baudrate, **settings)))
    try:
        port = await asyncio.shield(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(lambda done: done.exception() or done.result().close())
        raise
    except OSError as error:  # SerialException is one
        raise TransportUnavailable(f"the serial port {url} cannot be opened: {error}") from error
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"the serial port {url} cannot be opened so: {error}") from error
    return SerialPort(port)


class SerialPort:
    """An open port whose bytes pass through `socket`, the user's to close.  It ends when either side does.

    Ports with a descriptor (a tty, a TCP connection) are served by the event loop, others by two threads.
    """

    def __init__(self, port: Any) -> None:
        self.socket, self._inner = socket.socketpair()
        self.socket.setblocking(False)
        self._port = port
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._threads: list[threading.Thread] = []
        self._unwritten = b""
        try:
            self._fd = port.fileno()
        except OSError:  # io.UnsupportedOperation
            self._fd = -1
            for work in (self._read_in_thread, self._write_in_thread):
                self._threads.append(threading.Thread(target=work, name="byre-serial", daemon=True))
                self._threads[-1].start()
        else:
            self._inner.setblocking(False)
            self._loop.add_reader(self._fd, self._on_port)
            self._loop.add_reader(self._inner, self._on_socket)

    async def close(self) -> None:
        """Close the port.  Harmless when repeated."""
        if self._threads:
            self._end()
            await in_thread(self._join)
        elif not self._closed:
            for fd in (self._fd, self._inner.fileno()):
                self._loop.remove_reader(fd)
            self._loop.remove_writer(self._fd)
            self._end()
        self._inner.close()
        await in_thread(self._close_port)

    def _close_port(self) -> None:
        """pyserial sleeps when it closes a TCP connection, and leaves one open that the other side has ended."""
        connection = getattr(self._port, "_socket", None)
        self._port.close()
        if connection is not None:
            connection.close()

    def _join(self) -> None:
        for thread in self._threads:
            thread.join()

    def _end(self) -> None:
        """The user reads the end of the socket, and so do the threads."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._inner.shutdown(socket.SHUT_RDWR)

    # -- by the event loop ---------------------------------------------------------------------------------

    def _on_port(self) -> None:
        try:
            data = os.read(self._fd, READ_SIZE)
        except BlockingIOError:
            return
        except OSError:  # EIO: unplugged
            data = b""
        if not data:
            self._stop()
            return
        try:
            self._inner.send(data)
        except BlockingIOError:
            pass  # lost, as on any line whose reader is too slow
        except OSError:
            self._stop()

    def _on_socket(self) -> None:
        try:
            self._unwritten = self._inner.recv(READ_SIZE)
        except BlockingIOError:
            return
        except OSError:
            self._unwritten = b""
        if not self._unwritten:
            self._stop()
            return
        self._loop.remove_reader(self._inner)
        self._loop.add_writer(self._fd, self._on_room)

    def _on_room(self) -> None:
        try:
            self._unwritten = self._unwritten[os.write(self._fd, self._unwritten) :]
        except BlockingIOError:
            return
        except OSError:
            self._stop()
            return
        if not self._unwritten:
            self._loop.remove_writer(self._fd)
            self._loop.add_reader(self._inner, self._on_socket)

    def _stop(self) -> None:
        """Nothing more to come from one side."""
        if not self._closed:
            self._loop.remove_reader(self._fd)
            self._loop.remove_writer(self._fd)
            self._loop.remove_reader(self._inner)
            self._end()

    # -- by threads ----------------------------------------------------------------------------------------

    def _read_in_thread(self) -> None:
        with contextlib.suppress(OSError):
            while not self._closed:
                data = self._port.read(1)
                if data:
                    self._inner.sendall(data + self._port.read(self._port.in_waiting))
        self._end()

    def _write_in_thread(self) -> None:
        with contextlib.suppress(OSError):
            while data := self._inner.recv(READ_SIZE):
                self._port.write(data)
        self._end()
