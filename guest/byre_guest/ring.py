"""The output of an init that nobody asked for: the last of it, in memory, with a count of what fell out (B20).

Rule: a reader names the byte that it wants to go on with, so that any number of them may read, or wait for more.
"""

from __future__ import annotations

import os

from . import detours
from .loop import EPOLLIN

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .loop import Loop

#: Kept of a container's output.  With every container at its limit of processes this is small beside the rest.
SIZE = 256 * 1024

#: Read at once; a container that writes without end gets one turn per round of the loop.
CHUNK = 64 * 1024


class Ring:
    """Reads a pipe into the last SIZE bytes."""

    def __init__(self, loop: Loop) -> None:
        self.dropped = 0
        self.ended = False  # nothing more will come
        self._loop = loop
        self._data = bytearray()
        self._fd = -1
        self._detoured = False
        self._waiting: dict[Callable[[], object], None] = {}  # in their order

    @property
    def total(self) -> int:
        """Bytes that were written in all; the first `dropped` of them are gone."""
        return self.dropped + len(self._data)

    def read(self, start: int) -> tuple[bytes, int]:
        """What is kept from byte `start` on, and how many bytes before it are gone."""
        first = max(start, self.dropped)
        return bytes(self._data[first - self.dropped :]), first - max(0, start)

    def wait(self, woken: Callable[[], object]) -> None:
        """Have `woken()` called once: when there is more, or the end."""
        self._waiting[woken] = None

    def wait_no_more(self, woken: Callable[[], object]) -> None:
        """Harmless when it was called."""
        self._waiting.pop(woken, None)

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
        self._wake()
        return True

    def finish(self) -> None:
        """Its writers have gone: take what the pipe holds.  What a detour holds comes a moment later."""
        while self._fd >= 0 and self._read():
            pass
        if not self._detoured:
            self.close()

    def close(self) -> None:
        """Read no more.  Harmless when repeated."""
        self.ended = True
        if self._fd >= 0:
            self._loop.remove(self._fd)
            os.close(self._fd)
            self._fd = -1
        self._wake()

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for woken in waiting:
            woken()
