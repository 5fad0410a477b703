"""asyncio's own StreamReader and StreamWriter over one stream of a bridge.

Rule: credit goes back to the guest only for bytes that somebody took, or waits for.  So a stream that is not read
holds what its window allows and no more, and only its own process stops (B3).  Nothing here knows of processes.

The reader is a subclass that counts, around the public methods.  The writer is asyncio's class as it is, over a
transport whose `pause_writing` follows the stream's credit and the bridge's backlog.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any

from byre_proto.limits import MAX_DATA, MAX_WINDOW
from byre_proto.streams import REASON_CLOSED

if TYPE_CHECKING:
    from .bridge import Bridge

#: Longest line that `readline` and `readuntil` take, in bytes: asyncio's 64 KiB is short for JSON lines, and the
#: largest window is held by a stream that is read anyway.
MAX_LINE = MAX_WINDOW

#: Bytes that a writer buffers before `drain` waits: one frame goes while the next is gathered.
HIGH_WATER = MAX_DATA


class BridgeReader(asyncio.StreamReader):
    """A StreamReader that gives the guest credit for what its reader took."""

    _buffer: bytearray  # asyncio's own, since Python 3.4

    def __init__(self, bridge: Bridge, number: int) -> None:
        super().__init__(limit=MAX_LINE)
        self._bridge = bridge
        self._number = number
        self._wanted = 0  # bytes that a waiting method needs to see in the buffer before it takes any
        self.received = 0  # bytes that arrived in all
        self._credited = 0
        self.ended = False  # the guest's EOF has arrived, or `stop` was called

    async def read(self, n: int = -1) -> bytes:
        try:
            return await super().read(n)
        finally:
            self._settle()

    async def readexactly(self, n: int) -> bytes:
        return await self._wanting(n, super().readexactly(n))

    async def readuntil(self, separator: Any = b"\n") -> bytes:  # a tuple of separators from Python 3.13 on
        return await self._wanting(2 * MAX_LINE, super().readuntil(separator))

    async def readline(self) -> bytes:
        try:
            return await super().readline()
        finally:
            self._settle()  # it drops a line that is too long

    def feed_data(self, data: Any) -> None:  # bytes; typeshed allows any iterable of integers
        if self.ended or self.exception() is not None:
            return
        super().feed_data(data)
        self.received += len(data)
        if self._wanted:
            self._settle()

    def feed_eof(self) -> None:
        self.ended = True
        super().feed_eof()

    def stop(self) -> None:
        """Read no more: what is buffered stays readable, then the end (B4).  Harmless when repeated."""
        self._bridge.streams.stop_reading(self._number)
        if not self.ended and self.exception() is None:
            self.feed_eof()

    def fail(self, error: Exception) -> None:
        """The connection was lost, or the guest gave up: whoever reads hears of it, unless the end came before."""
        if not self.ended:
            self.set_exception(error)

    async def _wanting(self, wanted: int, reading: Any) -> bytes:
        self._wanted = wanted
        self._settle()
        try:
            result: bytes = await reading
            return result
        finally:
            self._wanted = 0
            self._settle()

    def _settle(self) -> None:
        """Give credit for all but what lies in the buffer beyond what is wanted."""
        kept = max(0, len(self._buffer) - self._wanted)
        taken = self.received - kept - self._credited
        if taken > 0:
            self._credited += taken
            self._bridge.streams.consumed(self._number, taken)


class StreamTransport(asyncio.Transport):
    """The write side of one stream.  Its protocol is asyncio's StreamReaderProtocol."""

    def __init__(self, bridge: Bridge, number: int, protocol: asyncio.BaseProtocol) -> None:
        super().__init__()
        self._bridge = bridge
        self._number = number
        self._protocol = protocol
        self._buffer: deque[bytes | memoryview] = deque()
        self._buffered = 0
        self._high, self._low = HIGH_WATER, HIGH_WATER // 4
        self._paused = False
        self._closing = False  # no more writes; EOF follows what is buffered
        self._lost = False

    # -- what StreamWriter calls ---------------------------------------------------------------------------

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        """Send as soon as there is credit.  After the end it is dropped; `drain` says why."""
        if self._closing or not data:
            return
        piece = bytes(data)
        self._buffer.append(piece)
        self._buffered += len(piece)
        self.pump()
        if self._buffered > self._high and not self._paused and not self._lost:
            self._paused = True
            self._protocol.pause_writing()

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        """EOF after what is buffered.  One direction is all there is, so this closes."""
        self.close()

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self.pump()

    def abort(self) -> None:
        """Give up what is buffered."""
        if not self._lost:
            self._bridge.session.reset(self._number, REASON_CLOSED)
            self._bridge.flush_soon()
            self.fail(None)

    def is_closing(self) -> bool:
        return self._closing

    def is_reading(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return self._buffered

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._low, self._high

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = HIGH_WATER if high is None else high
        self._low = self._high // 4 if low is None else low

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol

    # -- what the bridge calls -----------------------------------------------------------------------------

    def pump(self) -> None:
        """Hand over what credit and backlog allow; called again on credit, and when the backlog is small."""
        if self._lost:
            return
        session = self._bridge.session
        while self._buffer:
            room = min(session.credit(self._number), MAX_DATA)
            if room <= 0:
                break
            if self._bridge.streams.congested:
                self._bridge.streams.call_when_clear(self)
                break
            piece = self._take(room)
            session.send(self._number, piece)
        self._bridge.flush_soon()
        if self._paused and self._buffered <= self._low:
            self._paused = False
            self._protocol.resume_writing()
        if self._closing and not self._buffer:
            session.send_eof(self._number)
            self.fail(None)

    def fail(self, error: Exception | None) -> None:
        """The end: a broken pipe (B15a), the loss of the connection, or, without an error, ours."""
        if self._lost:
            return
        self._lost = self._closing = True
        self._buffer.clear()
        self._buffered = 0
        self._bridge.streams.forget_writer(self._number)
        self._protocol.connection_lost(error)

    def _take(self, room: int) -> bytes:
        """Up to `room` bytes for one frame: small writes that had to wait are joined."""
        pieces: list[bytes | memoryview] = []
        while self._buffer and room:
            first = self._buffer.popleft()
            if len(first) > room:
                self._buffer.appendleft(memoryview(first)[room:])
                first = first[:room]
            pieces.append(first)
            self._buffered -= len(first)
            room -= len(first)
        return b"".join(pieces) if len(pieces) > 1 else bytes(pieces[0])


def open_writer(
    bridge: Bridge, number: int = 0, kind: type[StreamTransport] | None = None
) -> tuple[int, asyncio.StreamWriter, StreamTransport]:
    """A stream towards the peer: its number, its writer, its transport.  Raises `ResourceExhausted`.

    `number` is given where the peer's request named it; else it is a new one.  `kind` is the transport's class.
    """
    if number:
        bridge.session.accept_stream(number, sending=True, receiving=False)
    else:
        number = bridge.session.new_stream(sending=True, receiving=False)
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(loop=loop)  # carries the error to `drain`; nothing is read
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    transport = (kind or StreamTransport)(bridge, number, protocol)
    protocol.connection_made(transport)
    bridge.streams.writers[number] = transport
    return number, asyncio.StreamWriter(transport, protocol, reader, loop), transport


def open_reader(bridge: Bridge, number: int = 0) -> tuple[int, BridgeReader]:
    """A stream from the peer: its number and its reader; see `open_writer`."""
    if number:
        bridge.session.accept_stream(number, sending=False, receiving=True)
    else:
        number = bridge.session.new_stream(sending=False, receiving=True)
    reader = bridge.streams.readers[number] = BridgeReader(bridge, number)
    return number, reader
