"""Frames: twelve bytes of header, then the payload.  No I/O, no meaning: only lengths and types.

    0       4      5       6        8           12
    +-------+------+-------+--------+-----------+---------
    | length| type | flags | zero   | stream id | payload
    +-------+------+-------+--------+-----------+---------

All integers are big-endian.  `FrameBuffer` never holds more than one frame beyond what it was fed, and refuses a
length over the type's limit from the header alone, before anything is allocated for it.
"""

from __future__ import annotations

import struct

from .errors import ByreError
from .limits import MAX_CONTROL, MAX_DATA

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

HEADER = struct.Struct("!IBBHI")
HEADER_SIZE = HEADER.size

HELLO = 1
REQUEST = 2
REPLY = 3
ERROR = 4
CANCEL = 5
EVENT = 6
LOG = 7
DATA = 8
EOF = 9
RESET = 10
STOP = 11
WINDOW = 12
PING = 13
PONG = 14
ACK = 15
CLOSE = 16

#: Name and largest payload of every frame type; a type that is not here closes the connection.
TYPES = {
    HELLO: ("HELLO", 64 * 1024),
    REQUEST: ("REQUEST", MAX_CONTROL),
    REPLY: ("REPLY", MAX_CONTROL),
    ERROR: ("ERROR", 64 * 1024),
    CANCEL: ("CANCEL", 4),
    EVENT: ("EVENT", MAX_CONTROL),
    LOG: ("LOG", 64 * 1024),
    DATA: ("DATA", MAX_DATA),
    EOF: ("EOF", 8),
    RESET: ("RESET", 4),
    STOP: ("STOP", 4),
    WINDOW: ("WINDOW", 4),
    PING: ("PING", 8),
    PONG: ("PONG", 8),
    ACK: ("ACK", 8),
    CLOSE: ("CLOSE", 64 * 1024),
}

#: Types whose payload is one unsigned integer, and its size.
INTEGERS = {CANCEL: 4, EOF: 8, RESET: 4, STOP: 4, WINDOW: 4, PING: 8, PONG: 8, ACK: 8}

#: Types that belong to a stream; all others have stream id 0.
STREAM_TYPES = frozenset((DATA, EOF, RESET, STOP, WINDOW))

#: Types that a resumed session repeats: what changes state.  The others are about the connection itself.
REPLAYED = frozenset((REQUEST, REPLY, ERROR, CANCEL, EVENT, DATA, EOF, RESET, STOP, WINDOW))


class ProtocolError(ByreError, ConnectionError):
    """Somebody broke the protocol."""

    code = "protocol-error"


class RemoteProtocolError(ProtocolError):
    """The peer broke the protocol; the connection is closed with this reason (B45)."""


class LocalProtocolError(ProtocolError):
    """The program on this side asked for what the protocol does not allow; nothing was sent."""


def encode(kind: int, stream: int, payload: bytes) -> bytes:
    """One frame as bytes.  Raises `LocalProtocolError` over the type's limit."""
    name, limit = TYPES[kind]
    if len(payload) > limit:
        raise LocalProtocolError(f"a {name} frame carries at most {limit} bytes, not {len(payload)}")
    return HEADER.pack(len(payload), kind, 0, 0, stream) + payload


def encode_integer(kind: int, stream: int, value: int) -> bytes:
    """A frame whose payload is one unsigned integer."""
    return encode(kind, stream, value.to_bytes(INTEGERS[kind], "big"))


class FrameBuffer:
    """Cuts a byte stream into frames: `feed` bytes, then iterate over `(type, stream, payload)`."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._start = 0

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Add received bytes; next, iterate `frames()` until it ends."""
        if self._start:
            del self._buffer[: self._start]
            self._start = 0
        self._buffer += data

    def rest(self) -> bytes:
        """What was fed and is not yet part of a complete frame (for another parser to continue with)."""
        return bytes(self._buffer[self._start :])

    def frames(self) -> Iterator[tuple[int, int, bytes]]:
        """Complete frames so far.  Raises `RemoteProtocolError` on a header that no peer may send."""
        buffer = self._buffer
        while len(buffer) - self._start >= HEADER_SIZE:
            length, kind, flags, zero, stream = HEADER.unpack_from(buffer, self._start)
            _check_header(length, kind, flags | zero, stream)
            begin = self._start + HEADER_SIZE
            if len(buffer) - begin < length:
                return
            self._start = begin + length
            with memoryview(buffer) as view:
                payload = bytes(view[begin : begin + length])
            yield kind, stream, payload


def _check_header(length: int, kind: int, reserved: int, stream: int) -> None:
    known = TYPES.get(kind)
    if known is None:
        raise RemoteProtocolError(f"unknown frame type {kind}")
    name, limit = known
    if length > limit:
        raise RemoteProtocolError(f"a {name} frame of {length} bytes is over the limit of {limit}")
    if kind in INTEGERS and length != INTEGERS[kind]:
        raise RemoteProtocolError(f"a {name} frame has {INTEGERS[kind]} bytes, not {length}")
    if reserved:
        raise RemoteProtocolError(f"reserved bits are set in a {name} frame")
    if (stream != 0) != (kind in STREAM_TYPES):
        raise RemoteProtocolError(f"a {name} frame with stream id {stream}")
