"""What the host writes, into the descriptors of processes: credit goes back when the process has taken the bytes.

Rule: a chunk may be a view into the channel's buffer until `write_out`, which comes before the next read; what is
kept longer is copied there.
"""

from __future__ import annotations

import os
from itertools import islice

from byre_proto import events
from byre_proto.deques import deque
from byre_proto.streams import REASON_NONE, REASON_PROCESS_GONE

from . import detours
from .loop import EPOLLERR, EPOLLET, EPOLLOUT
from .pumps import BULK_AFTER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .pumps import Pumps

#: Buffers handed to one writev(2).
MAX_BUFFERS = 64


class ToPipe:
    """Carries what the host writes.  `on_end()` is called when the descriptor is closed.

    `at_eof` gives bytes to write before closing (a terminal's end-of-file character), from the last byte written.
    """

    def __init__(
        self,
        pumps: Pumps,
        fd: int,
        stream: int,
        on_end: Callable[[], object],
        at_eof: Callable[[bytes], bytes] | None = None,
    ) -> None:
        self.stream = stream
        self._pumps = pumps
        self._fd = fd
        self._on_end = on_end
        self._at_eof = at_eof
        self._chunks: deque[bytes | memoryview] = deque()
        self._eof = False
        self._writable = True
        self._carried = 0
        self._bulk = at_eof is not None  # a terminal is none
        self._grown = 0
        self._borrowed = False  # some chunks are views into the channel's buffer
        self._last: bytes | memoryview = b""  # the byte written last
        self.detoured = False
        pumps.add(self)
        self._watch(fd)

    def _watch(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._pumps.loop.add(fd, EPOLLOUT | EPOLLET, self._on_ready)

    def detour(self) -> None:
        """From now on a thread writes to the pipe.  Raises OSError: then nothing has changed."""
        if self._fd >= 0 and not self.detoured:
            self._fd = detours.switch(self._pumps.loop, self._fd, self._watch, reading=False)
            self.detoured = True

    def _on_ready(self, mask: int) -> None:
        if mask & EPOLLERR:
            self._broken()
            return
        self._writable = True
        self._write()

    def on_event(self, event: events.Event) -> None:
        """Data, its end, or its loss."""
        if isinstance(event, events.DataReceived):
            if not self._borrowed:
                self._borrowed = True
                self._pumps.to_write.append(self)
            self._chunks.append(event.data)
        elif isinstance(event, events.EofReceived):
            self._eof = True
            if not self._chunks:
                self._finish()
        elif isinstance(event, events.ResetReceived):
            self.close()

    def write_out(self) -> None:
        """Write what the process takes now; the rest is copied, for it lies in a buffer that is used again."""
        self._borrowed = False
        self._write()
        if self._chunks:
            self._chunks = deque(bytes(chunk) for chunk in self._chunks)

    def _write(self) -> None:
        chunks = self._chunks
        while chunks and self._writable:
            try:
                if len(chunks) == 1:
                    written = os.write(self._fd, chunks[0])
                else:
                    written = os.writev(self._fd, list(islice(chunks, MAX_BUFFERS)))
            except BlockingIOError:
                self._writable = False
                return
            except OSError as error:  # EPIPE of a pipe, EIO of a terminal, ECONNRESET and others of a socket
                self._broken(error.errno)
                return
            self._taken(written)
        if self._eof and not chunks:
            self._finish()

    def _taken(self, written: int) -> None:
        """The process's pipe has taken bytes: they count as consumed."""
        chunks, rest = self._chunks, written
        while rest:
            chunk = chunks.popleft()
            if len(chunk) > rest:
                chunks.appendleft(memoryview(chunk)[rest:])
                break
            rest -= len(chunk)
            self._last = chunk[-1:]
        self._pumps.session.consume(self.stream, written)
        self._carried += written
        if not self._bulk and self._carried >= BULK_AFTER:
            self._bulk = True
            self._grown = self._pumps.grow(self._fd)

    def _finish(self) -> None:
        if self._at_eof is not None:
            try:
                os.write(self._fd, self._at_eof(bytes(self._last)))
            except OSError:
                pass  # nobody reads there: then its end matters to nobody
        self._end()

    def _broken(self, _number: int | None = None) -> None:
        self._pumps.session.stop(self.stream, REASON_PROCESS_GONE)
        self._end()

    def close(self) -> None:
        """Write no more; the process reads an end of file."""
        if self._fd >= 0:
            self._pumps.session.stop(self.stream, REASON_NONE)
            self._end()

    def _end(self) -> None:
        if self._fd < 0:
            return
        self._chunks.clear()
        self._pumps.loop.remove(self._fd)
        os.close(self._fd)
        self._fd = -1
        self._pumps.drop(self)
        self._pumps.shrunk(self._grown)
        self._on_end()
