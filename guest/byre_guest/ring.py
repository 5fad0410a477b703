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

    from .loop import Loop, Timer

#: Kept of a container's output.  With every container at its limit of processes this is small beside the rest.
SIZE = 256 * 1024

#: For the last bytes to come through a detour when their writers have gone, in seconds: a thread's work of
#: microseconds, and there is no telling how long it waits for a processor.
LAST_SECONDS = 5.0

#: Read at once; a container that writes without end gets one turn per round of the loop.
CHUNK = 64 * 1024


class Ring:
    """Reads a pipe into the last SIZE bytes.  `closing`: its writers have gone, and the rest is on its way."""

    def __init__(self, loop: Loop) -> None:
        self.dropped = 0
        self.ended = False  # nothing more will come
        self.closing = False
        self._loop = loop
        self._data = bytearray()
        self._fd = -1
        self._detoured = False
        self._timer: Timer | None = None
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
        """The end of a new pipe to write to; close it once the process has it.  Raises OSError."""
        self._let_go()  # of an attempt that failed
        self._fd, writing = os.pipe2(os.O_CLOEXEC)
        self.ended = self._detoured = False
        self._watch(self._fd)
        if detours.needed:
            try:
                self.detour()
            except OSError:
                os.close(writing)
                raise
        return writing

    def _watch(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._loop.add(fd, EPOLLIN, lambda _mask: self._read())

    def detour(self) -> None:
        """From now on a thread reads the pipe.  Raises OSError: then nothing has changed."""
        if self._fd >= 0 and not self._detoured:
            self._fd = detours.switch(self._loop, self._fd, self._watch, reading=True)
            self._detoured = True

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
        if self._fd >= 0 and self._detoured:
            self.closing = True
            self._timer = self._loop.call_later(LAST_SECONDS, self.close)
        else:
            self.close()

    def close(self) -> None:
        """Read no more.  Harmless when repeated."""
        self.ended, self.closing = True, False
        if self._timer is not None:
            self._timer.cancel()
        self._let_go()
        self._wake()

    def _let_go(self) -> None:
        if self._fd >= 0:
            self._loop.remove(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for woken in waiting:
            woken()
