"""One child process that lives no longer than its owner, watched by a thread of its own (B41, B43).

The parent-death signal follows the *thread* that spawned the child.  So the thread that spawns QEMU does nothing
else but watch it until it ends: the child dies with the whole owner, and with nothing less.  `setpriv` sets the
signal before the program starts, and a shell then looks whether the owner is still the parent, which closes the
race in which it died first.  No code of ours runs between fork and exec.

Rule: what the child writes is read here, whatever the owner's event loop is doing, so a hung loop neither stops
the guest at a full console nor loses the last words of a crash.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import selectors
import signal
import subprocess
import threading
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from byre.machines.namespaces import Apart

logger = logging.getLogger(__name__)

T = TypeVar("T")

_READ_SIZE = 64 * 1024
#: Read from each stream after the child's end at most this often: what is buffered is far less.
_LAST_READS = 64

#: $0 is the owner's process id.
_ALIVE_OWNER = 'test "$PPID" = "$0" && exec "$@"'


def owned(argv: Sequence[str], *, apart: Apart | None = None) -> list[str]:
    """`argv`, to be spawned by a thread that outlives it, made to die with this process.

    `apart`: in namespaces of its own (`namespaces`).  The signal is set after those have been made, for a change of
    credentials may clear it.
    """
    before, powers = apart or ((), ())
    alive = ("--", "sh", "-c", _ALIVE_OWNER, str(os.getpid()))
    return [*before, "setpriv", *powers, "--pdeathsig", "KILL", *alive, *argv]


async def in_thread(function: Callable[[], T]) -> T:
    """`function()` in a thread of its own, which ends with it.  The loop's executor would keep its thread."""
    result: concurrent.futures.Future[T] = concurrent.futures.Future()
    result.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result.set_result(function())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="byre-probe", daemon=True).start()
    return await asyncio.wrap_future(result)


class Stopped(BaseException):
    """What `check` raises in the thread of `stoppable` whose caller was cancelled; not for anybody to handle."""


async def stoppable(function: Callable[[Callable[[], None]], T], undo: Callable[[T], object] = lambda _: None) -> T:
    """`in_thread`, for a function that calls `check`, which it is given, all along: a cancellation of this makes
    that raise, and goes on when the thread has ended.  A result that came nevertheless goes to `undo`."""
    stop = threading.Event()

    def check() -> None:
        if stop.is_set():
            raise Stopped

    work = asyncio.ensure_future(in_thread(lambda: function(check)))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        stop.set()
        while not work.done():
            try:
                await asyncio.wait({work})
            except asyncio.CancelledError:  # once is enough, and the end is near
                continue
        if work.exception() is None:
            undo(work.result())
        raise


class OwnedProcess:
    """A child process in a session of its own: a terminal's Ctrl-C is for the owner to handle.

    ``output`` takes what it writes to stdout and stderr, and ``sinks`` maps further descriptors to what takes their
    bytes; all are called in the watching thread.  ``handed`` are the child's ends of sockets and files, inherited
    under the same numbers.  All descriptors given here are closed here, whatever happens.  ``apart``: see `owned`.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        output: Callable[[bytes], None],
        sinks: Mapping[int, Callable[[bytes], None]] | None = None,
        handed: Sequence[int] = (),
        apart: Apart | None = None,
    ) -> None:
        self._argv = owned(argv, apart=apart)
        self._output = output
        self._sinks = dict(sinks or {})
        self._handed = tuple(handed)
        self._lock = threading.Lock()
        self._pidfd: int | None = None
        self._killed = False
        #: The child's return code in subprocess' sense, or OSError if it could not be spawned.
        self.exit: concurrent.futures.Future[int] = concurrent.futures.Future()
        self.exit.set_running_or_notify_cancel()  # so that no waiter can cancel it for the others
        self._thread = threading.Thread(target=self._run, name="byre-machine", daemon=True)
        #: The child's process id, once it is there.
        self.pid: int | None = None

    def start(self) -> None:
        """Spawn it, in its thread; the outcome is in `exit`."""
        try:
            self._thread.start()
        except BaseException:
            self._close_all()
            raise

    def kill(self) -> None:
        """SIGKILL, now or as soon as it is spawned; harmless when repeated and after the end."""
        with self._lock:
            self._killed = True
            if self._pidfd is not None:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def join(self) -> None:
        """Wait for the thread, which has nothing left to do once `exit` is set."""
        self._thread.join()

    def _run(self) -> None:
        try:
            code = self._spawn_and_watch()
        except BaseException as error:
            self.exit.set_exception(error)
        else:
            self.exit.set_result(code)

    def _spawn_and_watch(self) -> int:
        try:
            reader, writer = os.pipe()
            self._sinks[reader] = self._output
            self._handed = (*self._handed, writer)
            process = subprocess.Popen(
                self._argv,
                stdin=subprocess.DEVNULL,
                stdout=writer,
                stderr=writer,
                pass_fds=self._handed,
                start_new_session=True,
            )
            for fd in self._handed:
                os.close(fd)
            self._handed = ()
            self.pid = process.pid
            try:
                self._watch(process.pid)
            except BaseException:
                process.kill()  # not reaped yet, so the number is still its own
                raise
            finally:
                process.wait()
            return process.returncode
        finally:
            self._close_all()

    def _watch(self, pid: int) -> None:
        pidfd = os.pidfd_open(pid)
        try:
            with self._lock:
                self._pidfd = pidfd
                if self._killed:
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            self._read_until_end(pidfd)
        finally:
            with self._lock:
                self._pidfd = None
            os.close(pidfd)

    def _read_until_end(self, pidfd: int) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(pidfd, selectors.EVENT_READ)
            for fd in self._sinks:
                os.set_blocking(fd, False)
                selector.register(fd, selectors.EVENT_READ)
            ended = False
            while not ended:
                for key, _ in selector.select():
                    if key.fd == pidfd:
                        ended = True
                    elif self._read(key.fd) is False:
                        selector.unregister(key.fd)
        for fd in self._sinks:
            for _ in range(_LAST_READS):
                if not self._read(fd):
                    break

    def _read(self, fd: int) -> bool | None:
        """True: something was read; None: nothing now; False: nothing ever again."""
        try:
            data = os.read(fd, _READ_SIZE)
        except BlockingIOError:
            return None
        except OSError:
            return False
        if not data:
            return False
        try:
            self._sinks[fd](data)
        except Exception:
            logger.exception("! a machine's output was not taken")
        return True

    def _close_all(self) -> None:
        for fd in (*self._sinks, *self._handed):
            os.close(fd)
        self._sinks, self._handed = {}, ()
