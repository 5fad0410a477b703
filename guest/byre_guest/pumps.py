"""Bytes between the session's streams and the descriptors of processes, each way with its back-pressure.

    FromPipe   descriptor -> stream   reads only as much as the host has given credit for, and only while little
                                      waits to be sent: an unread stream stops its own writer and nothing else (B3)
    ToPipe     stream -> descriptor   gives credit back when the process has taken the bytes, not before (`inputs`)

All pumps take turns of one chunk, so that no stream starves another.  Descriptors are non-blocking and
edge-triggered: a pump that may not read costs nothing, and needs no change in the epoll set.

Rule: what happens to a stream is always told to the other side: EOF with the total, STOP for a broken pipe (B15a).
"""

from __future__ import annotations

import errno
import os
from fcntl import fcntl, ioctl

from byre_proto import events, frames, limits
from byre_proto.deques import deque

from . import detours
from .loop import EPOLLERR, EPOLLET, EPOLLHUP, EPOLLIN, EPOLLRDHUP

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from byre_proto.session import Session

    from .channels import Channel
    from .inputs import ToPipe
    from .loop import Loop

#: Stream bytes that may wait to be sent before the pumps rest: enough for the channel to stay busy, little enough
#: that the agent's memory does not grow with the number of processes.
MAX_BACKLOG = 128 * 1024

#: A stream that has carried this much is a bulk stream: it gets a larger pipe, because under an emulator one change
#: between the process and the agent costs more than 64 KiB of bytes do.  Not from the start, and only as long as
#: the budget of all streams lasts: what waits in unread pipes must not fill the memory.
BULK_AFTER = 256 * 1024
PIPE_SIZE = 1024 * 1024
PIPES_BUDGET = 16 * 1024 * 1024

#: fcntl(2); the fcntl module has a name for it from Python 3.10 on.
F_SETPIPE_SZ = 1031

#: ioctl_tty(2); of pipes as well.
FIONREAD = 0x541B

#: Read at once from a bulk stream.  All that its pipe holds carries no more, and a control frame waits twice as
#: long.
BULK_FRAMES = 2
BULK_SIZE = BULK_FRAMES * limits.MAX_DATA

#: Read at once from any other stream: more would be new memory each time, whose pages cost more than the read.
CHUNK = 64 * 1024

#: What is read from a bulk stream goes to the channel from where it is; smaller pieces are gathered with others.
DIRECT_FROM = 16 * 1024


class Pumps:
    """All pumps of one connection, by stream id.  The server feeds it the session's events and gives it turns."""

    def __init__(self, loop: Loop, session: Session, channel: Channel) -> None:
        self.loop = loop
        self.session = session
        self.channel = channel
        self.ready: deque[FromPipe] = deque()
        self.to_write: list[ToPipe] = []  # given data that they have not yet tried to write
        self.frames = Frames()
        self._by_stream: dict[int, FromPipe | ToPipe] = {}
        self._pipes_budget = PIPES_BUDGET

    def add(self, pump: FromPipe | ToPipe) -> None:
        self._by_stream[pump.stream] = pump

    def drop(self, pump: FromPipe | ToPipe) -> None:
        self._by_stream.pop(pump.stream, None)

    def accept_pair(self, fd: int, stdin: int, stdout: int) -> int:
        """The two streams of what is carried both ways; a second descriptor, for the directions end independently.

        Raises `InvalidRequest`, `ResourceExhausted`, OSError: then nothing has changed but that they have ended.
        """
        session = self.session
        session.accept_stream(stdin, sending=False, receiving=True)
        try:
            session.accept_stream(stdout, sending=True, receiving=False)
            return os.dup(fd)
        except BaseException:
            session.stop(stdin)
            session.reset(stdout)
            raise

    def on_event(self, event: events.Event) -> None:
        """A stream's event; one of a stream that has ended here is nothing."""
        pump = self._by_stream.get(event.stream)  # type: ignore[attr-defined]
        if pump is not None:
            pump.on_event(event)

    def turn(self) -> None:
        """Read from processes, one chunk of each at a time, until enough waits to be sent.

        Called while the channel is idle and nothing is queued.  What goes to the channel directly must not overtake
        what is queued, so it begins the turn and ends it.
        """
        ready, session, channel = self.ready, self.session, self.channel
        while ready and channel.idle and session.data_backlog < MAX_BACKLOG:
            if ready[0].bulk and session.pending:
                return  # that comes first
            pump = ready.popleft()
            pump.queued = False
            if pump.step():
                pump.queue()

    def write_out(self) -> None:
        """Give processes what has come in for them, each all at once.  What they do not take is kept as a copy."""
        writers, self.to_write = self.to_write, []
        for writer in writers:
            writer.write_out()

    def grow(self, fd: int) -> int:
        """Make a bulk stream's pipe larger, where there is budget left and the kernel lets us.

        Returns what it took from the budget, to be given back to `shrunk` when the pipe is closed.
        """
        if self._pipes_budget < PIPE_SIZE:
            return 0
        try:
            fcntl(fd, F_SETPIPE_SZ, PIPE_SIZE)
        except OSError:  # what ordinary users' pipes hold together is bounded
            return 0
        self._pipes_budget -= PIPE_SIZE
        return PIPE_SIZE

    def shrunk(self, size: int) -> None:
        self._pipes_budget += size

    def close(self) -> None:
        """The connection is over: every process is let go of as by `process.release`."""
        for pump in list(self._by_stream.values()):
            pump.close()
        self.ready.clear()


class Frames:
    """A buffer for some DATA frames one behind the other: read between the headers, then written as one piece."""

    def __init__(self) -> None:
        frame = frames.HEADER_SIZE + limits.MAX_DATA
        self._starts = [number * frame for number in range(BULK_FRAMES)]
        self._buffer = memoryview(bytearray(BULK_FRAMES * frame))
        self._payloads = [self._buffer[at + frames.HEADER_SIZE : at + frame] for at in self._starts]

    def read(self, fd: int, most: int) -> int:
        """Read up to `most` bytes into the payloads."""
        if most >= BULK_SIZE:
            return os.readv(fd, self._payloads)
        whole, rest = divmod(most, limits.MAX_DATA)
        return os.readv(fd, [*self._payloads[:whole], self._payloads[whole][:rest]])

    def finish(self, count: int, header: Callable[[int], bytes]) -> memoryview:
        """The frames of the `count` bytes that were read; `header(size)` makes each one's."""
        end = 0
        for start in self._starts:
            if not count:
                break
            size = min(count, limits.MAX_DATA)
            end = start + frames.HEADER_SIZE + size
            self._buffer[start : start + frames.HEADER_SIZE] = header(size)
            count -= size
        return self._buffer[:end]

    def copy(self, count: int) -> bytes:
        """The first `count` bytes that were read, of the first frame."""
        return bytes(self._payloads[0][:count])


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
        self.detoured = False
        self.bulk = False
        #: Whether it is bulk is not asked any more.  Nothing is, where the channel's frames are small, or kept.
        kept = pumps.session.outbox.keep_for_replay
        self._settled = terminal or kept or pumps.channel.max_data < limits.MAX_DATA
        self._grown = 0
        pumps.add(self)
        self._watch(fd)

    def _watch(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._pumps.loop.add(fd, EPOLLIN | EPOLLRDHUP | EPOLLET, self._on_ready)

    def detour(self) -> None:
        """From now on a thread reads the pipe.  Raises OSError: then nothing has changed."""
        if self._fd >= 0 and not self.detoured:
            self._fd = detours.switch(self._pumps.loop, self._fd, self._watch, reading=True)
            self.detoured = True

    def _on_ready(self, mask: int) -> None:
        self._readable = True
        if mask & (EPOLLHUP | EPOLLERR | EPOLLRDHUP):
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
        try:
            count = self._read_bulk(credit) if self.bulk else self._read(min(credit, CHUNK))
        except BlockingIOError:
            self._readable = False
            return False
        except OSError:  # of a socket: what follows is lost
            self.close()
            return False
        if not count:
            self._at_end()
            return False
        self._carried += count
        if self._carried >= BULK_AFTER and not self._settled:
            self.bulk = self._settled = True
            self._grown = self._pumps.grow(self._fd)
        return self._readable

    def _at_end(self) -> None:
        self._end(self._pumps.session.send_eof(self.stream))

    def _read(self, wanted: int) -> int:
        """Read and queue; returns the bytes, 0 at the end."""
        try:
            data = os.read(self._fd, wanted)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return 0  # a terminal that nobody holds open any more
        self._pumps.session.send(self.stream, data)
        self._note(len(data), wanted)
        return len(data)

    def _read_bulk(self, wanted: int) -> int:
        """Read, and give the channel what is large; it is idle and nothing is queued.  Returns the bytes."""
        pumps, session = self._pumps, self._pumps.session
        wanted = min(wanted, BULK_SIZE)
        count = pumps.frames.read(self._fd, wanted)
        if count >= DIRECT_FROM:
            pumps.channel.write([pumps.frames.finish(count, lambda size: session.send_header(self.stream, size))])
        elif count:
            session.send(self.stream, pumps.frames.copy(count))
        self._note(count, wanted)
        return count

    def _note(self, count: int, wanted: int) -> None:
        if count < wanted and not (self._terminal or self._hung_up):
            self._readable = False  # it was empty; what comes later is a new edge

    def drain(self) -> None:
        """Queue what is there now, as far as credit goes: its writer has ended and may be reported (B2)."""
        self.bulk, self._settled = False, True  # the channel may be in the midst of what was read so
        self._readable = self._fd >= 0
        self._hung_up = True  # a short read no longer means that it is empty: the end may follow
        while self.step():
            pass

    @property
    def written(self) -> int:
        """Bytes that were written to it until now, those that wait for credit in its pipe too; -1: not known."""
        if self._fd < 0 or self.detoured:
            return -1
        return self._carried + int.from_bytes(ioctl(self._fd, FIONREAD, bytes(4)), "little")

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
        self._pumps.shrunk(self._grown)
        self._on_end(total)
