"""Pipes of processes that may see a share: threads stand between them and the loop.

    process  pipe  thread  socket pair  loop

While sendfile(2) or splice(2) moves data between a file and a pipe, the kernel holds the pipe's mutex, and whoever
reads the pipe waits for it, O_NONBLOCK or not.  Where the file is on a share, the data come through this agent: it
would wait for itself, for ever (`busybox cat` is enough).  A thread may wait there; the loop sees a socket, which
nobody locks for longer than a copy takes.

Rule: while there is a share, every process and every container's log has them; what is older than the first share
is switched over when that is opened.  All others have plain pipes, which are faster, and whose fill can be counted:
to ask a pipe for it would wait for the mutex too.  Source: linux/fs/splice.c, splice_file_to_pipe and
iter_file_splice_write; linux/fs/pipe.c, pipe_ioctl.
"""

from __future__ import annotations

import errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .loop import Loop

#: Moved at once.
CHUNK = 64 * 1024

#: Of a thread, in bytes: it does nothing but read and write.
STACK = 256 * 1024


#: Whether there is a share; `shares` says so.
needed = False


def around(pipe: int, *, reading: bool) -> int:
    """A descriptor for the loop in the place of `pipe`, which from now on a thread reads from, or else writes to.

    Raises OSError: then nothing has changed.
    """
    import _socket
    import _thread

    ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
    source, sink = (pipe, theirs.fileno()) if reading else (theirs.fileno(), pipe)
    try:
        _thread.stack_size(STACK)
        _thread.start_new_thread(_carry, (source, sink))
    except RuntimeError as error:
        ours.close()
        theirs.close()
        raise OSError(errno.EAGAIN, str(error)) from error
    theirs.detach()
    return ours.detach()


def switch(loop: Loop, pipe: int, watch: Callable[[int], object], *, reading: bool) -> int:
    """Lead a pipe of ours `around` that `loop` watches: have `watch` begin with what takes its place, which is
    returned.  Raises OSError: then it is watched as before."""
    loop.remove(pipe)
    fd = pipe
    try:
        fd = around(pipe, reading=reading)
    finally:
        watch(fd)
    return fd


def _carry(source: int, sink: int) -> None:
    """Until either end is gone."""
    try:
        for fd in (source, sink):
            os.set_blocking(fd, True)
        while data := os.read(source, CHUNK):
            view = memoryview(data)
            while view:
                view = view[os.write(sink, view) :]
    except OSError:
        pass  # who has gone is seen by the other, by the ends that are closed now
    finally:
        os.close(source)
        os.close(sink)
