"""Log lines for the host: the agent's own and the kernel's, within the session's budget (B50).

Levels are those of Python's logging module.  What is written before a host is there is kept, a little; what does
not fit is dropped and counted, here and in the session.

Rule: logging never fails and never blocks; it is no place to keep data.
"""

from __future__ import annotations

import os

from .loop import EPOLLIN

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType

    from byre_proto.session import Session

    from .loop import Loop

DEBUG = 10
INFO = 20
WARNING = 30
ERROR = 40
CRITICAL = 50

#: Kernel levels (0 emergency ... 7 debug, linux/kern_levels.h) as Python's.  The kernel's "info" is one line per
#: device and mount: debugging for us; "notice" is what a user should know.
KERNEL_LEVELS = (CRITICAL, CRITICAL, CRITICAL, ERROR, WARNING, INFO, DEBUG, DEBUG)

#: Lines kept for a host that is not connected yet.
MAX_EARLY = 200

#: Kernel lines taken per wake-up, so that a flood of them does not hold up the loop.
MAX_KERNEL_LINES = 64

#: Frames of a traceback that are shown.
MAX_FRAMES = 24

#: The longest record that /dev/kmsg gives (PRINTK_MESSAGE_MAX of the kernel is 2 KiB, before escapes).
KMSG_RECORD = 8192


class Logs:
    """See the module's text."""

    def __init__(self) -> None:
        self.level = INFO
        self.session: Session | None = None
        self._early: list[tuple[str, int, str]] = []
        self._kmsg = -1

    def log(self, level: int, message: str, source: str = "agent") -> None:
        """Offer a line to the host."""
        if level < self.level:
            return
        if self.session is not None:
            self.session.log(source, level, message)
        elif len(self._early) < MAX_EARLY:
            self._early.append((source, level, message))

    def connected(self, session: Session) -> None:
        """A host is there: it gets what was kept, then the rest as it comes."""
        self.session = session
        early, self._early = self._early, []
        for source, level, message in early:
            session.log(source, level, message)

    def disconnected(self) -> None:
        self.session = None

    def failure(self, what: str, error: BaseException) -> None:
        """An error of the agent's own, with where it came from."""
        self.log(ERROR, f"{what}: {describe(error)}")

    def follow_kernel(self, loop: Loop) -> None:
        """Pass on kernel lines from now on (those of the boot are on the console)."""
        self._kmsg = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.lseek(self._kmsg, 0, os.SEEK_END)
        loop.add(self._kmsg, EPOLLIN, lambda _mask: self._read_kernel())

    def _read_kernel(self) -> None:
        for _ in range(MAX_KERNEL_LINES):
            try:
                record = os.read(self._kmsg, KMSG_RECORD)
            except BlockingIOError:
                return
            except BrokenPipeError:
                self.log(WARNING, "lines of the kernel were overwritten before they could be read", "kernel")
                continue
            head, _, text = record.partition(b";")
            priority = head.partition(b",")[0]
            if priority.isdigit():
                line = text.partition(b"\n")[0].decode(errors="replace")
                source = "kmsg" if int(priority) >> 3 else "kernel"  # facility 0 is the kernel itself (syslog(3))
                self.log(KERNEL_LEVELS[int(priority) & 7], line, source)


def describe(error: BaseException) -> str:
    """One line for the error, one per frame.  The traceback module would cost each boot its imports."""
    lines = [f"{type(error).__name__}: {error}"]
    trace: TracebackType | None = error.__traceback__
    while trace is not None and len(lines) <= MAX_FRAMES:
        code = trace.tb_frame.f_code
        lines.append(f"  {code.co_filename}:{trace.tb_lineno} in {code.co_name}")
        trace = trace.tb_next
    return "\n".join(lines)
