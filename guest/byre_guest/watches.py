"""Files of cgroupfs that say when they change: the last process left, memory ran out.  Nothing polls.

Source: cgroups(7), "cgroup.events": a change is an EPOLLPRI, which lasts until the file is read again.
"""

from __future__ import annotations

import os

from .loop import EPOLLPRI

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .loop import Loop, Timer

#: Such files are smaller than this.
SIZE = 4096

#: Between two notices of one count, in seconds: a container can make it rise without end.
PAUSE = 1.0


class Watches:
    """The watched files of one cgroup."""

    def __init__(self, loop: Loop, cgroup: str) -> None:
        self._loop = loop
        self._cgroup = cgroup
        self._fds: list[int] = []

    def add(self, name: str, changed: Callable[[], object]) -> None:
        """Call `changed()` whenever the file has changed."""
        fd = os.open(f"{self._cgroup}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        os.pread(fd, SIZE, 0)

        def on_event(_mask: int) -> None:
            os.pread(fd, SIZE, 0)
            changed()

        self._fds.append(fd)
        self._loop.add(fd, EPOLLPRI, on_event)

    def close(self) -> None:
        """Watch no more.  Harmless when repeated."""
        for fd in self._fds:
            self._loop.remove(fd)
            os.close(fd)
        self._fds.clear()


class Count:
    """A count that only rises.  `tell(by)` says by how much it has: at once, then every PAUSE seconds at most."""

    def __init__(self, loop: Loop, read: Callable[[], int], tell: Callable[[int], object]) -> None:
        self._loop = loop
        self._read = read
        self._tell = tell
        self._told = 0
        self._pause: Timer | None = None

    def changed(self) -> None:
        """It may have risen."""
        if self._pause is None and self._look():
            self._pause = self._loop.call_later(PAUSE, self._go_on)

    def close(self) -> None:
        """Tell what is not told yet, and no more."""
        if self._pause is not None:
            self._pause.cancel()
        self._look()

    def _look(self) -> bool:
        before, now = self._told, self._read()
        if now > before:
            self._told = now
            self._tell(now - before)
        return now > before

    def _go_on(self) -> None:
        self._pause = None
        self.changed()
