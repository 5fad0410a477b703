"""What flows through the streams of a file operation: records, one after the other, without I/O.

    data      a header with DATA set and a length, then that many bytes
    message   a header with a length, then a msgpack list: a tag, and its fields

The messages, and what may follow each (`WIRE.md` has the operations):

    entry, NAME, KIND, MODE, UID, GID, MTIME_NS, SIZE, TARGET, [MAJOR, MINOR], {XATTR: bytes}
                   data follow when KIND is "file" and contents are carried: SIZE bytes in all
    end            of what the host sends: all of it is here.  A stream that ends before was cut
    result, {...}  the operation has succeeded; the last record
    error, CODE, MESSAGE, HINT, {...}  it has not; the last record

Rule: an end of file is never taken for success.  Names are paths relative to where the operation begins, "." for
that itself; owners are numbers, -1 for nobody in particular; other bytes than UTF-8 travel as in `encoding`.
"""

from __future__ import annotations

import stat

import msgpack

from .encoding import unpack
from .frames import RemoteProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: Bytes in one data record: a few frames of a stream, so that its header does not matter.
MAX_RECORD = 256 * 1024

#: Bytes of one message.  An entry has a name and a target of a path's length and the attributes, of which Linux
#: takes 64 KiB for each file system and value; ten times that is room.
MAX_MESSAGE = 1024 * 1024

#: In a header: what follows is data.
DATA = 1 << 31

#: Kinds of entries.
FILE, DIRECTORY, SYMLINK, LINK = "file", "dir", "symlink", "link"
FIFO, CHARACTER, BLOCK, SOCKET = "fifo", "char", "block", "socket"

#: By the type that stat(2) gives.
KINDS = {
    stat.S_IFREG: FILE,
    stat.S_IFDIR: DIRECTORY,
    stat.S_IFLNK: SYMLINK,
    stat.S_IFIFO: FIFO,
    stat.S_IFCHR: CHARACTER,
    stat.S_IFBLK: BLOCK,
    stat.S_IFSOCK: SOCKET,
}

#: Extended attributes that are carried: file systems' own and security labels mean nothing elsewhere.
XATTRS = ("user.", "system.posix_acl_", "security.capability")

_packer: Any = None  # one for all messages: each has a buffer of 1 MiB


def message(*fields: object) -> bytes:
    """One message, ready to be sent."""
    global _packer
    if _packer is None:
        _packer = msgpack.Packer(use_bin_type=True, unicode_errors="surrogateescape")
    payload: bytes = _packer.pack(fields)
    return len(payload).to_bytes(4, "big") + payload


def header(size: int) -> bytes:
    """What goes before `size` bytes of data, which are 1 to MAX_RECORD."""
    return (DATA | size).to_bytes(4, "big")


class Decoder:
    """Feed it what arrives, take what it makes of it: bytes are (a part of) a data record, a list is a message."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._data = 0  # bytes of the present data record that were not taken yet

    @property
    def idle(self) -> bool:
        """Whether the stream may end here, between two records."""
        return not self._buffer and not self._data

    def feed(self, data: bytes) -> None:
        """Bytes as they arrived."""
        self._buffer += data

    def take(self) -> bytes | list[Any] | None:
        """The next of it; None: feed more.  Raises `RemoteProtocolError`."""
        buffer = self._buffer
        if not self._data:
            if len(buffer) < 4:
                return None
            size = int.from_bytes(buffer[:4], "big")
            if not size & DATA:
                return self._message(size)
            self._data = size & ~DATA
            if not 0 < self._data <= MAX_RECORD:
                raise RemoteProtocolError(f"a data record of {self._data} bytes; {MAX_RECORD} is the most")
            del buffer[:4]
        if not buffer:
            return None
        piece = bytes(buffer[: self._data])
        del buffer[: len(piece)]
        self._data -= len(piece)
        return piece

    def _message(self, size: int) -> list[Any] | None:
        if size > MAX_MESSAGE:
            raise RemoteProtocolError(f"a record of {size} bytes; {MAX_MESSAGE} is the most")
        if len(self._buffer) < 4 + size:
            return None
        found = unpack(bytes(self._buffer[4 : 4 + size]))
        del self._buffer[: 4 + size]
        if not isinstance(found, list) or not found or not isinstance(found[0], str):
            raise RemoteProtocolError("a record is not a list that begins with its tag")
        return found
