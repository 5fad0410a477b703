"""The output of an init that nobody asked for: the last of it, in memory, with a count of what fell out (B20)."""

from __future__ import annotations

import os

from . import detours
from .loop import EPOLLIN

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .loop import Loop

#: Kept of a container's output.  With every container at its limit of processes this is small beside the rest.
SIZE = 256 * 1024

#: Read at once; a container that writes without end gets one turn per round of the loop.
CHUNK = 64 * 1024


class Ring:
    """Reads a pipe into the last SIZE bytes."""

    def __init__(self, loop: Loop) -> None:
        self.dropped = 0
        self._loop = loop
        self._data = bytearray()
        self._fd = -1
        self._detoured = False

    @property
    def data(self) -> bytes:
        """What is kept, oldest first; `dropped` bytes came before it."""
        return bytes(self._data)

    def pipe(self) -> int:
        """The end of a new pipe to write to; close it once the process has it."""
        self._fd, writing = detours.from_process()
        self._detoured = detours.needed
        os.set_blocking(self._fd, False)
        self._loop.add(self._fd, EPOLLIN, lambda _mask: self._read())
        return writing

    def _read(self) -> bool:
        try:
            chunk = os.read(self._fd, CHUNK)
        except BlockingIOError:
            return False
        if not chunk:
            self.close()
            return False
        self._data += chunk
        excess = len(self._data) - SIZE
        if excess > 0:
            del self._data[:excess]
            self.dropped += excess
        return True

    def finish(self) -> None:
        """Its writers have gone: take what the pipe holds.  What a detour holds comes a moment later."""
        while self._fd >= 0 and self._read():
            pass
        if not self._detoured:
            self.close()

    def close(self) -> None:
        """Read no more.  Harmless when repeated."""
        if self._fd >= 0:
            self._loop.remove(self._fd)
            os.close(self._fd)
            self._fd = -1
