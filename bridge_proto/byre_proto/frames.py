"""Frames: twelve bytes of header, then the payload.  No I/O, no meaning: only lengths and types.

    0       4      5       6        8           12
    +-------+------+-------+--------+-----------+---------
    | length| type | flags | zero   | stream id | payload
    +-------+------+-------+--------+-----------+---------

All integers are big-endian.  `FrameBuffer` never holds more than one incomplete frame, and refuses a length over
the type's limit from the header alone, before anything is kept for it.
"""

from __future__ import annotations

import struct

from .errors import BY_CODE, ByreError
from .limits import MAX_CONTROL, MAX_DATA

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

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
    CANCEL: ("CANCEL", 8),
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
INTEGERS = {CANCEL: 8, EOF: 8, RESET: 4, STOP: 4, WINDOW: 4, PING: 8, PONG: 8, ACK: 8}

#: Types that belong to a stream; all others have stream id 0.
STREAM_TYPES = frozenset((DATA, EOF, RESET, STOP, WINDOW))

#: Types that are numbered and that a resumed session repeats.  The others are about the connection itself.
REPLAYED = frozenset((REQUEST, REPLY, ERROR, CANCEL, EVENT, LOG, DATA, EOF, RESET, STOP, WINDOW))

#: A payload below this is copied behind its header: one small buffer is cheaper to write than two.
JOINED_BELOW = 4096

#: The first four bytes of a preface, where a frame's length would be.
_PREFACE_LENGTH = int.from_bytes(b"\x89BYR", "big")


class ProtocolError(ByreError, ConnectionError):
    """Somebody broke the protocol."""

    code = "protocol-error"


class RemoteProtocolError(ProtocolError):
    """The peer broke the protocol; the connection is closed with this reason (B45)."""


class LocalProtocolError(ProtocolError):
    """The program on this side asked for what the protocol does not allow; nothing was sent."""


BY_CODE[ProtocolError.code] = ProtocolError  # a peer's CLOSE names it: who was wrong is for the reader to judge


def encode(kind: int, stream: int, payload: bytes) -> bytes:
    """One frame as bytes.  Raises `LocalProtocolError` over the type's limit."""
    name, limit = TYPES[kind]
    if len(payload) > limit:
        raise LocalProtocolError(f"a {name} frame carries at most {limit} bytes, not {len(payload)}")
    return HEADER.pack(len(payload), kind, 0, 0, stream) + payload


def encode_integer(kind: int, stream: int, value: int) -> bytes:
    """A frame whose payload is one unsigned integer."""
    return encode(kind, stream, value.to_bytes(INTEGERS[kind], "big"))


def encode_data(stream: int, payload: bytes) -> tuple[bytes, ...]:
    """A DATA frame as one buffer, or as header and payload where a copy would cost more.  At most MAX_DATA."""
    header = HEADER.pack(len(payload), DATA, 0, 0, stream)
    return (header + payload,) if len(payload) < JOINED_BELOW else (header, payload)


class FrameBuffer:
    """Cuts a byte stream into frames.

    Large payloads are not copied: that of a DATA frame is a view into what was read or, of a frame that began in
    an earlier read, into what was kept of it.
    """

    def __init__(self) -> None:
        self._begun = bytearray()  # a frame whose end has not come yet

    @property
    def lacking(self) -> int:
        """Bytes that the frame which has begun still lacks, or its header; 0 between frames."""
        begun = len(self._begun)
        if begun < HEADER_SIZE:
            return HEADER_SIZE - begun if begun else 0
        return HEADER_SIZE + int.from_bytes(self._begun[:4], "big") - begun

    def frames(self, data: bytes | bytearray | memoryview) -> Iterator[tuple[int, int, Any]]:
        """The frames that `data` completes, as `(type, stream, payload)`; the rest waits for the next data.

        A payload is bytes, except that of DATA.

        Exhaust it, or give the buffer up.  Raises `RemoteProtocolError` on a header that no peer may send.
        """
        view = memoryview(data)
        at, size = 0, len(view)
        begun = self._begun
        if begun:
            at = max(HEADER_SIZE - len(begun), 0)
            begun += view[:at]
            if len(begun) < HEADER_SIZE:
                return
            length, kind, flags, zero, stream = HEADER.unpack_from(begun)
            _check_header(length, kind, flags | zero, stream)
            end = at + HEADER_SIZE + length - len(begun)
            begun += view[at:end]
            if end > size:
                return
            at = end
            payload = memoryview(begun)[HEADER_SIZE:]
            begun = self._begun = bytearray()
            yield kind, stream, payload if kind == DATA else payload.tobytes()
        while size - at >= HEADER_SIZE:
            length, kind, flags, zero, stream = HEADER.unpack_from(view, at)
            if kind != DATA or length > MAX_DATA or not stream or flags | zero:
                _check_header(length, kind, flags | zero, stream)
            end = at + HEADER_SIZE + length
            if end > size:
                break
            payload = view[at + HEADER_SIZE : end]
            at = end
            yield kind, stream, payload if kind == DATA else payload.tobytes()
        begun += view[at:]


def _check_header(length: int, kind: int, reserved: int, stream: int) -> None:
    known = TYPES.get(kind)
    if known is None:
        if length == _PREFACE_LENGTH:
            raise RemoteProtocolError("the peer began a new connection on this channel")
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
