"""The socket of a bridge, as asyncio sees it: large reads, writes that pause, an end that is awaited.

Rule: bytes only.  What they mean is its owner's, who is told of bytes, of room to write, and of the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterable
from typing import Protocol

from byre_proto.limits import MAX_DATA

#: Read at once from the socket: a virtio-serial port is fastest in large reads, and memory is one buffer.
READ_SIZE = 256 * 1024

#: Given to the socket at once, and left in asyncio's buffer before writing pauses; and what the kernel's buffer is
#: asked to be (it takes twice that for its own accounting).  A control frame waits behind all of it, some 340 KiB:
#: 3 ms at 100 MB/s.  With a smaller one the guest gets small pieces, and takes more of its processor's time
#: for them: with 32 KiB a third to a half more than with the kernel's default, which this is.
WRITE_BATCH = 64 * 1024
SEND_BUFFER = 208 * 1024

#: How long the last bytes may take to leave once the end was decided, in seconds.
CLOSE_GRACE = 1.0


#: Reads that empty a socket's buffer, whose size is some hundred KiB, after a write has failed.
LAST_READS = 16


class Owner(Protocol):
    """Who is told."""

    def channel_made(self, channel: Channel) -> None: ...

    def channel_received(self, data: memoryview) -> None: ...

    def channel_writable(self) -> None: ...

    def channel_lost(self, error: Exception | None) -> None: ...


class Channel(asyncio.BufferedProtocol):
    """See the module.  `room` is what to take from the session at once, `max_data` the DATA frames that suit it."""

    transport: asyncio.Transport
    room = WRITE_BATCH
    max_data = MAX_DATA

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self._buffer = memoryview(bytearray(READ_SIZE))
        self._closed = asyncio.Event()
        self._full = False
        self._abandoned = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.set_write_buffer_limits(high=WRITE_BATCH)
        self.owner.channel_made(self)

    @property
    def paused(self) -> bool:
        """Nothing should be written before `channel_writable`, or ever."""
        return self._full or self.transport.is_closing()

    def write(self, frames: Iterable[bytes]) -> None:
        self.transport.writelines(frames)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.owner.channel_received(self._buffer[:nbytes])

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        self.owner.channel_writable()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._abandoned:
            self._closed.set()
            return
        if exc is not None:
            self._hear_out()
        self._closed.set()
        self._full = True
        self.owner.channel_lost(exc)

    def end(self) -> None:
        """Close once what was written has left; by force when that takes too long."""
        self.transport.close()
        if not self._closed.is_set():
            asyncio.get_running_loop().call_later(CLOSE_GRACE, self.transport.abort)

    def _hear_out(self) -> None:
        """A write has failed.  What the peer said before, perhaps that it ends in order, is still to be read."""
        fd = self.transport.get_extra_info("socket").fileno()
        with contextlib.suppress(OSError):
            for _ in range(LAST_READS):
                count = os.readv(fd, [self._buffer])
                if not count:
                    return
                self.buffer_updated(count)

    def abandon(self) -> None:
        """Close at once: another channel has taken its place, and the owner hears no more of this one."""
        self._abandoned = True
        self.transport.abort()

    async def wait_closed(self) -> None:
        await self._closed.wait()
