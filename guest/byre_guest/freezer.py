"""Holds everything but the agent still while the machine is saved, by the freezer of cgroup version 2.

A clone of a machine whose processes run would go on with random numbers, a clock and a name that are not its own
until its host has said what they are: so they are frozen before, and thawed by `system.configure`.  Until then the
agent serves nothing else, for whatever it starts begins in a frozen cgroup, the agent itself on the way there.

Rule: nothing here blocks.  Source: admin-guide/cgroup-v2.rst, cgroup.freeze and cgroup.events.
"""

from __future__ import annotations

from time import monotonic

from byre_proto.errors import DeadlineExceeded

from . import cgroups, trees

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from byre_proto.errors import ByreError

    from .server import Call, Server

#: Where all processes are that are not the agent's own.
ROOTS = (trees.VM_PROCESSES, cgroups.CONTAINERS)

#: For all of it to stand still, in seconds: milliseconds, but for what waits in the kernel for a file system that
#: does not answer.
PATIENCE = 5.0

#: Between two looks whether it does, in seconds.
LOOK_AGAIN = 0.002


class Freezer:
    """See the module's text."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._freezing = False

    def freeze(self, call: Call, done: Callable[[], object]) -> None:
        """Freeze; then call `done()` and reply.  What goes wrong thaws."""

        def give_up(error: ByreError) -> None:
            self.thaw()
            call.fail(error)

        self._freezing = self._server.holding = True
        call.on_cancel = give_up
        for root in ROOTS:
            cgroups.write(f"{root}/cgroup.freeze", "1")
        self._look(call, done, monotonic() + PATIENCE)

    def _look(self, call: Call, done: Callable[[], object], end: float) -> None:
        if call.answered:
            return
        if all(_frozen(root) for root in ROOTS):
            done()
            call.reply({})
        elif monotonic() > end:
            call.give_up(DeadlineExceeded(f"not every process could be stopped within {PATIENCE:g} s"))
        else:
            self._server.loop.call_later(LOOK_AGAIN, lambda: self._look(call, done, end))

    def thaw(self) -> None:
        """Let it go on.  Harmless when it does.  Raises OSError."""
        if self._freezing:
            for root in ROOTS:
                cgroups.write(f"{root}/cgroup.freeze", "0")
            self._freezing = False
            self._server.stop_holding()


def _frozen(root: str) -> bool:
    return cgroups.table(cgroups.read(f"{root}/cgroup.events")).get("frozen") == 1
