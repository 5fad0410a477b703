"""Frames on a line that changes, loses and inserts bytes: flags, byte stuffing, a checksum.  No I/O, no meaning.

    7e | body and its CRC-32, masked, stuffed | 7e

As in HDLC-like framing (RFC 1662, section 4): 7d stands before a byte that may not appear as it is, which then has
bit 5 inverted.  No control character is ever sent, so that a terminal driver in whatever mode has nothing to act on
(^C, XOFF, line ends), and whatever control character arrives was put in by the line and is taken out.  The mask
is for the data there is most of: zeros and text need no escape with it.

Rule: what is between two flags is a frame whose checksum is right, or noise.  Noise is no error: a kernel writes
its messages to the same line.  It is handed on, since it may be a console's text.
"""

from __future__ import annotations

import zlib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

FLAG = b"\x7e"
ESCAPE = b"\x7d"
FLIP = 0x20
CRC_SIZE = 4

#: What a line or a terminal driver may put in or swallow: C0 (XON and XOFF, ^C, line ends).
CONTROLS = bytes(range(0x20))

#: What every byte is XORed with before it is stuffed.
MASK = 0xAA

#: Never sent as they are.  7f is a terminal's erase, ff what it and telnet mark things with.
SPECIAL = (*ESCAPE, *FLAG, *CONTROLS, 0x7F, 0xFF)

_STUFFED = tuple((bytes((byte,)), bytes((ESCAPE[0], byte ^ FLIP))) for byte in SPECIAL)  # the escape is the first
_MASKED = bytes(byte ^ MASK for byte in range(256))
_PLAIN = {byte ^ FLIP: bytes((byte,)) for byte in SPECIAL}

#: Noise that nobody has taken; the oldest is dropped.  A kernel's panic is on the console of the machine as well,
#: or its last part is here.
MAX_NOISE_KEPT = 16 * 1024


def stuffed(body: bytes, seed: int) -> bytes:
    """A whole frame for the line.  `seed` is where the CRC starts: what both ends know and nobody sends."""
    data = (body + zlib.crc32(body, seed).to_bytes(CRC_SIZE, "big")).translate(_MASKED)
    for plain, pair in _STUFFED:
        if plain in data:
            data = data.replace(plain, pair)
    return FLAG + data + FLAG


def unstuffed(piece: bytes) -> bytes:
    """What stands between two flags, as it was before it was stuffed; b"" for what nobody sends."""
    head, *parts = piece.translate(None, CONTROLS).split(ESCAPE)
    plain = [head]
    for part in parts:
        byte = _PLAIN.get(part[0]) if part else None
        if byte is None:
            return b""
        plain += (byte, part[1:])
    return b"".join(plain).translate(_MASKED)


def checked(data: bytes, seed: int) -> bytes:
    """The body of an unstuffed frame; b"" when its checksum is wrong."""
    body = data[:-CRC_SIZE]
    return body if body and zlib.crc32(body, seed) == int.from_bytes(data[-CRC_SIZE:], "big") else b""


class Splitter:
    """Cuts what a line delivers at its flags.  `most`: the largest body that is sent; never holds much more."""

    def __init__(self, most: int) -> None:
        self._begun = bytearray()
        self._noise = bytearray()
        self._most = 2 * (most + CRC_SIZE)  # every byte escaped

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """What stood between flags and is complete now."""
        first, *others = data.split(FLAG)
        self._begin(first)
        for other in others:
            if self._begun:
                yield bytes(self._begun)
                self._begun.clear()
            self._begin(other)

    def _begin(self, data: bytes) -> None:
        self._begun += data
        if len(self._begun) > self._most:  # not a frame, whatever follows: a boot's messages
            self.noise(self._begun)
            self._begun.clear()

    def noise(self, piece: bytes | bytearray) -> None:
        """Keep what was no frame."""
        self._noise += piece
        del self._noise[:-MAX_NOISE_KEPT]

    def take_noise(self) -> bytes:
        """What was no frame since the last call, without the flags in it."""
        if not self._noise:
            return b""
        taken, self._noise = bytes(self._noise), bytearray()
        return taken
