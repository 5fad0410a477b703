"""Two connections made one: what comes from either goes to the other, and so do their ends.

    end, in good order    half-close of the other; the opposite direction goes on
    cut off, reset        both are reset
    nobody reads there    this side is read no more; the opposite direction goes on

Rule: what waits here is bounded, by asyncio's buffers and the stream's window; who does not read stops who writes.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from typing import Protocol

from byre.errors import ByreError

#: Read and passed on at once.
CHUNK = 256 * 1024

#: struct linger: closing throws away what is not sent, and resets a TCP connection (socket(7)).
_LINGER_NOT = struct.pack("ii", 1, 0)


class End(Protocol):
    """One connection: `Local`, or `connection.Connection`."""

    @property
    def reader(self) -> asyncio.StreamReader: ...
    @property
    def writer(self) -> asyncio.StreamWriter: ...
    def stop_reading(self) -> None: ...
    def abort(self) -> None: ...


class Local:
    """A connection of this host."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def stop_reading(self) -> None:
        """Its reader's buffer fills, and then its sender waits for the end."""

    def abort(self) -> None:
        """Reset it, where it has such an end: a UNIX socket is closed."""
        sock = self.writer.get_extra_info("socket")
        with contextlib.suppress(OSError):
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
        self.writer.transport.abort()


async def splice(one: End, other: End) -> None:
    """Carry both ways until both have ended; cancelled, both connections are reset."""
    ways = [asyncio.create_task(_carry(one, other)), asyncio.create_task(_carry(other, one))]
    try:
        await asyncio.gather(*ways)
        for end in (one, other):
            end.writer.close()
        for end in (one, other):
            with contextlib.suppress(OSError):
                await end.writer.wait_closed()
    except BaseException:
        for way in ways:
            way.cancel()
        one.abort()
        other.abort()
        raise


async def _carry(source: End, sink: End) -> None:
    try:
        while data := await source.reader.read(CHUNK):
            try:
                sink.writer.write(data)
                await sink.writer.drain()
            except OSError:
                source.stop_reading()
                return
        sink.writer.write_eof()
    except (OSError, ByreError):
        source.abort()
        sink.abort()
