"""Files of cgroupfs that say when they change: the last process left, memory ran out.  Nothing polls.

Source: cgroups(7), "cgroup.events": a change is an EPOLLPRI, which lasts until the file is read again.
"""

from __future__ import annotations

import os

from .loop import EPOLLPRI

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .loop import Loop

#: Such files are smaller than this.
SIZE = 4096


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
