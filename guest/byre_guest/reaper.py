"""Who died, and how: exits of the agent's children, and of the orphans that fall to it.

A child that somebody watches has a pidfd in the loop.  The agent is also PID 1 or a subreaper, so processes that
it never started become its children: a daemon, or what crun leaves running.  SIGCHLD, read through a signalfd,
is for those.  Nothing polls, no thread waits.

Rule: only this module waits for children.  Until it has, a pid cannot be used again, so whoever has not been told
of an exit may signal the pid.  The status of a child that nobody watches (yet) is kept, up to MAX_KEPT of them.
"""

from __future__ import annotations

import errno
import os
from time import monotonic

from . import linux
from .loop import EPOLLIN
from .signals import signals

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .loop import Loop

#: Statuses of unwatched children that are kept, newest first to stay: a container's init may end before the
#: agent learns its pid; orphans that nobody will ask for must not pile up.
MAX_KEPT = 1024

#: Seconds that killed children have to disappear before the agent ends without them.
LAST_WAIT = 2.0

#: Signals that the agent takes through its signalfd, and so blocks; a child must unblock them before exec.
BLOCKED = (signals.SIGCHLD, signals.SIGINT, signals.SIGTERM, signals.SIGHUP)

#: Signals that are ignored here: by Python, or since nohup(1) or a shell in the background started the agent.  A
#: child must restore their default (a broken pipe must end it).
IGNORED = tuple(n for n in signals.valid_signals() if signals.getsignal(n) == signals.SIG_IGN)


class Reaper:
    """See the module's text.  `on_signal(number)` is told of SIGINT, SIGTERM and SIGHUP."""

    def __init__(self, loop: Loop, on_signal: Callable[[int], object]) -> None:
        self._loop = loop
        self._on_signal = on_signal
        self._watched: dict[int, tuple[int, Callable[[int], object]]] = {}
        self._kept: dict[int, int] = {}
        signals.pthread_sigmask(signals.SIG_BLOCK, BLOCKED)

    def listen(self) -> None:
        """Take signals, and the orphans.  What came before has waited: nothing is lost by doing this late."""
        self._signals = linux.signalfd(BLOCKED)
        self._loop.add(self._signals, EPOLLIN, self._on_signals)
        linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)

    def watch(self, pid: int, done: Callable[[int], object]) -> None:
        """Call `done(status)` once, with the status of waitpid(2), when the child `pid` has ended.

        It is called later, never from within this.  Raises ProcessLookupError for what is not a child and has no
        kept status.
        """
        try:
            waited, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            if pid not in self._kept:
                raise ProcessLookupError(f"{pid} is not a child of the agent") from None
            waited, status = pid, self._kept.pop(pid)
        if waited:
            self._loop.call_soon(lambda: done(status))
            return
        self._kept.pop(pid, None)  # of an earlier process with this number
        self._watched[pid] = (self._open(pid), done)

    def _open(self, pid: int) -> int:
        """The child's pidfd, in the loop; -1 when the agent can open no more: then SIGCHLD tells of its end."""
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise
            return -1
        self._loop.add(pidfd, EPOLLIN, lambda _mask: self._collect(pid))
        return pidfd

    @property
    def idle(self) -> bool:
        """Whether no child is waited for."""
        return not self._watched

    def signal(self, pid: int, number: int) -> bool:
        """Signal a watched child; False when it has ended (B7).  By the module's rule it meets no other process."""
        if pid not in self._watched or os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False  # an end that nobody was told of yet is left to the loop: this is called from anywhere
        os.kill(pid, number)
        return True

    def sweep(self) -> bool:
        """Take the statuses of all children that have ended by now; whether others are left."""
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return False
            if ended is None:
                return True
            self._collect(ended.si_pid)

    def wait_for_all(self) -> None:
        """At the agent's end: give the children that were killed LAST_WAIT seconds to be gone."""
        deadline = monotonic() + LAST_WAIT
        while self.sweep() and monotonic() < deadline:
            signals.sigtimedwait((signals.SIGCHLD,), deadline - monotonic())

    def _collect(self, pid: int) -> None:
        try:
            waited, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            return  # the other of its two notices came first
        if not waited:
            return
        watched = self._watched.pop(pid, None)
        if watched is None:
            self._keep(pid, status)
            return
        pidfd, done = watched
        if pidfd >= 0:
            self._loop.remove(pidfd)
            os.close(pidfd)
        self._loop.guarded(lambda: done(status))  # others that have ended are told after it, whatever it does

    def _keep(self, pid: int, status: int) -> None:
        self._kept.pop(pid, None)
        self._kept[pid] = status
        if len(self._kept) > MAX_KEPT:
            del self._kept[next(iter(self._kept))]

    def _on_signals(self, _mask: int) -> None:
        try:
            records = os.read(self._signals, 16 * linux.SIGNALFD_SIGINFO_SIZE)
        except BlockingIOError:
            return
        for start in range(0, len(records), linux.SIGNALFD_SIGINFO_SIZE):
            number = int.from_bytes(records[start : start + 4], "little")
            if number != signals.SIGCHLD:
                self._on_signal(number)
        self.sweep()
