"""Bytes between the session's streams and the descriptors of processes, each way with its back-pressure.

    FromPipe   descriptor -> stream   reads only as much as the host has given credit for, and only while little
                                      waits to be sent: an unread stream stops its own writer and nothing else (B3)
    ToPipe     stream -> descriptor   gives credit back when the process has taken the bytes, not before

All pumps take turns of one chunk, so that no stream starves another.  Descriptors are non-blocking and
edge-triggered: a pump that may not read costs nothing, and needs no change in the epoll set.

Rule: what happens to a stream is always told to the other side: EOF with the total, STOP for a broken pipe (B15a).
"""

from __future__ import annotations

import errno
import os
from fcntl import fcntl, ioctl
from itertools import islice

from byre_proto import events, limits
from byre_proto.deques import deque
from byre_proto.streams import REASON_NONE, REASON_PROCESS_GONE

from .loop import EPOLLERR, EPOLLET, EPOLLHUP, EPOLLIN, EPOLLOUT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from byre_proto.session import Session

    from .loop import Loop

#: Read at once from a process: one DATA frame.
CHUNK = limits.MAX_DATA

#: Stream bytes that may wait to be sent before the pumps rest: enough for the channel to stay busy, little enough
#: that the agent's memory does not grow with the number of processes.
MAX_BACKLOG = 256 * 1024

#: fcntl(2); the fcntl module has a name for it from Python 3.10 on.
F_SETPIPE_SZ = 1031

#: ioctl_tty(2); of pipes as well.
FIONREAD = 0x541B

#: A stream that has carried this much gets a larger pipe: the process and the agent take turns less often.  Not
#: from the start: a thousand unread streams would fill the memory with what waits in their pipes.
GROW_AFTER = 256 * 1024
PIPE_SIZE = 256 * 1024

#: Buffers handed to one writev(2).
MAX_BUFFERS = 64


class Pumps:
    """All pumps of one connection, by stream id.  The server feeds it the session's events and gives it turns."""

    def __init__(self, loop: Loop, session: Session) -> None:
        self.loop = loop
        self.session = session
        self.ready: deque[FromPipe] = deque()
        self._by_stream: dict[int, FromPipe | ToPipe] = {}

    def add(self, pump: FromPipe | ToPipe) -> None:
        self._by_stream[pump.stream] = pump

    def drop(self, pump: FromPipe | ToPipe) -> None:
        self._by_stream.pop(pump.stream, None)

    def on_event(self, event: events.Event) -> None:
        """A stream's event; one of a stream that has ended here is nothing."""
        pump = self._by_stream.get(event.stream)  # type: ignore[attr-defined]
        if pump is not None:
            pump.on_event(event)

    def turn(self) -> None:
        """Read from processes, one chunk of each at a time, until enough waits to be sent."""
        ready, session = self.ready, self.session
        while ready and session.data_backlog < MAX_BACKLOG:
            pump = ready.popleft()
            pump.queued = False
            if pump.step():
                pump.queue()

    def close(self) -> None:
        """The connection is over: every process is let go of as by `process.release`."""
        for pump in list(self._by_stream.values()):
            pump.close()
        self.ready.clear()


class FromPipe:
    """Carries what a process writes.  `on_end(total)` is called at EOF, with -1 when the host stopped it."""

    def __init__(
        self, pumps: Pumps, fd: int, stream: int, on_end: Callable[[int], object], *, terminal: bool = False
    ) -> None:
        self.stream = stream
        self.queued = False
        self._pumps = pumps
        self._fd = fd
        self._on_end = on_end
        self._terminal = terminal
        self._readable = False
        self._hung_up = False
        self._carried = 0
        self._grown = terminal
        os.set_blocking(fd, False)
        pumps.add(self)
        pumps.loop.add(fd, EPOLLIN | EPOLLET, self._on_ready)

    def _on_ready(self, mask: int) -> None:
        self._readable = True
        if mask & (EPOLLHUP | EPOLLERR):
            self._hung_up = True
        self.queue()

    def on_event(self, event: events.Event) -> None:
        """Credit: go on.  Stop: the process gets a broken pipe (B4), or its terminal hangs up."""
        if isinstance(event, events.CreditReceived):
            self.queue()
        elif isinstance(event, events.StopReceived):
            self._end(-1)

    def queue(self) -> None:
        """Ask for a turn."""
        if not self.queued and self._readable:
            self.queued = True
            self._pumps.ready.append(self)

    def step(self) -> bool:
        """Carry one chunk; whether another may follow now."""
        if not self._readable:
            return False
        session = self._pumps.session
        credit = session.credit(self.stream)
        if credit <= 0:
            return False  # CreditReceived will ask for a turn
        wanted = min(credit, CHUNK)
        try:
            data = os.read(self._fd, wanted)
        except BlockingIOError:
            self._readable = False
            return False
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            data = b""  # a terminal that nobody holds open any more
        if not data:
            self._end(session.send_eof(self.stream))
            return False
        session.send(self.stream, data)
        self._carried += len(data)
        if not self._grown and self._carried >= GROW_AFTER:
            self._grown = True
            _grow(self._fd)
        if len(data) < wanted and not (self._terminal or self._hung_up):
            self._readable = False  # it was empty; what comes later is a new edge
        return self._readable

    def drain(self) -> None:
        """Carry what is there now, as far as credit goes: its writer has ended and may be reported (B2)."""
        self._readable = self._fd >= 0
        self._hung_up = True  # a short read no longer means that it is empty: the end may follow
        while self.step():
            pass

    @property
    def written(self) -> int:
        """Bytes that were written to it until now, those that wait for credit in its pipe too; -1 after its end."""
        return (
            self._carried + int.from_bytes(ioctl(self._fd, FIONREAD, bytes(4)), "little") if self._fd >= 0 else -1
        )

    def close(self) -> None:
        """Read no more; the process gets a broken pipe.  The stream ends as incomplete."""
        if self._fd >= 0:
            self._pumps.session.reset(self.stream)
            self._end(-1)

    def _end(self, total: int) -> None:
        if self._fd < 0:
            return
        self._readable = False
        self._pumps.loop.remove(self._fd)
        os.close(self._fd)
        self._fd = -1
        self._pumps.drop(self)
        self._on_end(total)


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
        self._grown = at_eof is not None
        self._last: bytes | memoryview = b""  # the chunk written last
        os.set_blocking(fd, False)
        pumps.add(self)
        pumps.loop.add(fd, EPOLLOUT | EPOLLET, self._on_ready)

    def _on_ready(self, mask: int) -> None:
        if mask & EPOLLERR:
            self._broken()
            return
        self._writable = True
        self._write()

    def on_event(self, event: events.Event) -> None:
        """Data, its end, or its loss."""
        if isinstance(event, events.DataReceived):
            self._chunks.append(event.data)
            if self._writable and len(self._chunks) == 1:
                self._write()
        elif isinstance(event, events.EofReceived):
            self._eof = True
            if not self._chunks:
                self._finish()
        elif isinstance(event, events.ResetReceived):
            self.close()

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
            except OSError as error:  # EPIPE of a pipe, EIO of a terminal
                if error.errno not in (errno.EPIPE, errno.EIO):
                    raise
                self._broken()
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
            self._last = chunk
        self._pumps.session.consume(self.stream, written)
        self._carried += written
        if not self._grown and self._carried >= GROW_AFTER:
            self._grown = True
            _grow(self._fd)

    def _finish(self) -> None:
        if self._at_eof is not None:
            try:
                os.write(self._fd, self._at_eof(bytes(self._last[-1:])))
            except OSError:
                pass  # nobody reads there: then its end matters to nobody
        self._end()

    def _broken(self) -> None:
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
        self._on_end()


def _grow(fd: int) -> None:
    """Make a pipe larger, where its owner may: the kernel bounds what ordinary users' pipes hold together."""
    try:
        fcntl(fd, F_SETPIPE_SZ, PIPE_SIZE)
    except OSError:
        pass
