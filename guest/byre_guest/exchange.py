"""The records that the child of a file operation exchanges with the host, by its stdin and stdout.

Rule: blocking, and in the child only.  What comes is the host's and trusted; that it comes whole is not.
"""

from __future__ import annotations

import io
import os

from byre_proto import records
from byre_proto.errors import Cancelled, InvalidRequest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

#: Read from stdin at once, and gathered before it is written to stdout.
CHUNK = 256 * 1024


class Sink:
    """What is sent to the host."""

    def __init__(self, fd: int) -> None:
        self._file = io.BufferedWriter(io.FileIO(fd, "wb", closefd=False), CHUNK)

    def message(self, *fields: object) -> None:
        """One message."""
        self._file.write(records.message(*fields))

    def data(self, data: bytes) -> None:
        """1 to MAX_RECORD bytes."""
        self._file.write(records.header(len(data)))
        self._file.write(data)

    def finish(self, *fields: object) -> None:
        """The last message."""
        self.message(*fields)
        self._file.flush()


class Source:
    """What the host sends.  Its end without the record that says so is a cut: `Cancelled`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._decoder = records.Decoder()

    def _next(self) -> bytes | list[Any]:
        while True:
            found = self._decoder.take()
            if found is not None:
                return found
            data = os.read(self._fd, CHUNK)
            if not data:
                raise Cancelled("the host did not send all of it")
            self._decoder.feed(data)

    def data(self) -> bytes:
        """Some bytes of data; b"" at the end."""
        found = self._next()
        if isinstance(found, bytes):
            return found
        if found[0] != "end":
            raise InvalidRequest("another record stands where data were expected")
        return b""

    def entries(self) -> Iterator[list[Any]]:
        """The entries; the data of each are to be read before the next."""
        while True:
            found = self._next()
            if isinstance(found, bytes) or found[0] not in ("entry", "end"):
                raise InvalidRequest("something else stands where an entry was expected")
            if found[0] == "end":
                return
            yield found
