"""Pipes of processes that may see a share: threads stand between them and the loop.

    process  pipe  thread  socket pair  loop

While sendfile(2) or splice(2) moves data between a file and a pipe, the kernel holds the pipe's mutex, and whoever
reads the pipe waits for it, O_NONBLOCK or not.  Where the file is on a share, the data come through this agent: it
would wait for itself, for ever (`busybox cat` is enough).  A thread may wait there; the loop sees a socket, which
nobody locks for longer than a copy takes.

Rule: for processes that are made while there is a share; all others have plain pipes, which are faster, and whose
fill can be counted.  Source: linux/fs/splice.c, splice_file_to_pipe and iter_file_splice_write.
"""

from __future__ import annotations

import errno
import os

#: Moved at once.
CHUNK = 64 * 1024

#: Of a thread, in bytes: it does nothing but read and write.
STACK = 256 * 1024


#: Whether there is a share; `shares` says so.
needed = False


def from_process() -> tuple[int, int]:
    """`(our end, to read from; what the process writes to)`, a pipe where no detour is needed."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    if not needed:
        return reading, writing
    import _socket

    ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
    _start(reading, theirs.detach(), [ours.fileno(), writing])
    return ours.detach(), writing


def to_process() -> tuple[int, int]:
    """`(what the process reads from; our end, to write to)`, a pipe where no detour is needed."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    if not needed:
        return reading, writing
    import _socket

    ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
    _start(theirs.detach(), writing, [reading, ours.fileno()])
    return reading, ours.detach()


def _start(source: int, sink: int, others: list[int]) -> None:
    import _thread

    try:
        _thread.stack_size(STACK)
        _thread.start_new_thread(_carry, (source, sink))
    except RuntimeError as error:
        for fd in (source, sink, *others):
            os.close(fd)
        raise OSError(errno.EAGAIN, str(error)) from error


def _carry(source: int, sink: int) -> None:
    """Until either end is gone."""
    try:
        while data := os.read(source, CHUNK):
            view = memoryview(data)
            while view:
                view = view[os.write(sink, view) :]
    except OSError:
        pass  # who has gone is seen by the other, by the ends that are closed now
    finally:
        os.close(source)
        os.close(sink)
