"""All that one command has started: signalled and killed together (B15b).

    in the VM       every process begins in a cgroup of its own, which nothing that it starts can leave unless it
                    is root and means to; `cgroup.kill` ends all of it at once
    elsewhere       best effort: the agent's descendants that descend from the process or are of its session.  What
                    made itself a session *and* lost its parent is not found

Rule: nothing is signalled that does not descend from the agent: a pid or session number may have been used again.
Source: cgroups(7), Documentation/admin-guide/cgroup-v2.rst, proc(5).
"""

from __future__ import annotations

import errno
import os

from . import reserve
from .signals import signals

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

SIGKILL = int(signals.SIGKILL)

#: Signal numbers are below this.
SIGNALS = signals.NSIG

#: Below this, in the VM, are the cgroups of the processes that run in the VM itself.
VM_PROCESSES = "/sys/fs/cgroup/processes"

#: A tree that forks while it is killed is looked through this often; a fork bomb outside a cgroup may win.
MAX_ROUNDS = 8


class Tree:
    """What descends from the process `pid`; with a cgroup of its own where `cgroup` is not ""."""

    def __init__(self, pid: int, cgroup: str = "") -> None:
        self.pid = pid
        self.cgroup = cgroup
        self.made_here = False
        self.entrance = -1  # its cgroup.procs, where that was opened ahead


class Trees:
    """Makes trees and takes them away."""

    def __init__(self) -> None:
        self._parent = ""  # the cgroup below which each process gets its own
        self._home_fd = -1  # cgroup.procs of the agent's own cgroup
        self._ahead: Tree | None = None  # one that nobody has yet
        self._made = 0
        self._lingering: list[str] = []  # cgroups in which something of an ended process still runs

    def use_cgroups(self, parent: str, home: str) -> None:
        """Give each process from now on a cgroup below `parent`; `home` is the agent's."""
        self._parent = parent
        self._home_fd = os.open(f"{home}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)

    def new(self) -> Tree:
        """A tree for a process to be."""
        tree, self._ahead = self._ahead or self._make(), None
        return tree

    def _make(self) -> Tree:
        tree = Tree(0)
        if self._parent:
            self._made += 1
            tree.cgroup = f"{self._parent}/{self._made}"
            os.mkdir(tree.cgroup)
            tree.made_here = True
        return tree

    def make_ahead(self) -> None:
        """Make the next process's tree now: that takes a tenth of the time that a small process does."""
        if self._ahead is None and self._parent:
            self._ahead = self._make()
            self._ahead.entrance = _entrance(self._ahead)

    def enter(self, tree: Tree) -> None:
        """Until `leave`, what the agent forks begins in the tree's cgroup: so nothing that it does is outside.

        Moving oneself is the quickest way there is.  clone3(2) could fork into a cgroup, but a program that is
        spawned without a copy of the agent's memory comes from libc, which cannot.
        """
        if tree.made_here:
            fd = tree.entrance if tree.entrance >= 0 else _entrance(tree)
            tree.entrance = -1
            try:
                os.write(fd, b"0")
            finally:
                os.close(fd)

    def leave(self) -> None:
        """Back to the agent's own cgroup.  Harmless when it is there."""
        if self._home_fd >= 0:
            os.write(self._home_fd, b"0")

    def ended(self, tree: Tree) -> None:
        """Its process has ended (or never was); what it left running keeps its cgroup until it ends too."""
        if tree.made_here:
            self._lingering.append(tree.cgroup)
            self._lingering = [path for path in self._lingering if not _removed(path)]
            try:
                self.make_ahead()
            except OSError:
                pass  # it is made when it is needed

    def kill_all(self) -> None:
        """Everything that descends from the agent."""
        self.signal(Tree(os.getpid()), SIGKILL)

    def signal(self, tree: Tree, number: int) -> bool:
        """Send a signal to all of it; whether there was anybody.  0 only asks."""
        with reserve.LENT:
            return self._signal(tree, number)

    @staticmethod
    def _signal(tree: Tree, number: int) -> bool:
        if tree.cgroup:
            return _signal_cgroup(tree.cgroup, number)
        met: set[int] = set()
        for _ in range(MAX_ROUNDS if number == SIGKILL else 1):
            found = descendants(tree.pid) - met
            if not _signal_all(found, number):
                break
            met |= found
        return bool(met)


def _entrance(tree: Tree) -> int:
    return os.open(f"{tree.cgroup}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)


def _removed(path: str) -> bool:
    try:
        os.rmdir(path)
    except OSError as error:
        return error.errno != errno.EBUSY
    return True


def _signal_cgroup(path: str, number: int) -> bool:
    try:
        pids = members(path)
        if pids and number == SIGKILL:
            with open(f"{path}/cgroup.kill", "wb", buffering=0) as file:
                file.write(b"1")
            return True
    except FileNotFoundError:  # the cgroup has gone with its last process
        return False
    return _signal_all(pids, number)


def members(path: str) -> list[int]:
    """The pids in a cgroup (not in those below it).  Raises FileNotFoundError when it is gone."""
    try:
        with open(f"{path}/cgroup.procs", "rb") as file:
            return [int(line) for line in file]
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
        raise FileNotFoundError(path) from None


def _signal_all(pids: Iterable[int], number: int) -> bool:
    sent = False
    for pid in pids:
        try:
            os.kill(pid, number)
            sent = True
        except (ProcessLookupError, PermissionError):
            pass
    return sent


def descendants(leader: int) -> set[int]:
    """The agent's descendants that descend from `leader` (itself included) or are of its session."""
    children: dict[int, list[int]] = {}
    session: set[int] = set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            parent, its_session, state = _stat(name)
            if state not in "ZX":
                children.setdefault(parent, []).append(int(name))
                if its_session == leader:
                    session.add(int(name))
    return _below(os.getpid(), children) & (_below(leader, children) | session | {leader})


def _below(root: int, children: dict[int, list[int]]) -> set[int]:
    found: set[int] = set()
    todo = [root]
    while todo:
        for pid in children.get(todo.pop(), ()):
            if pid not in found:
                found.add(pid)
                todo.append(pid)
    return found


def _stat(pid: str) -> tuple[int, int, str]:
    """`(parent, session, state)` of a process; what has ended counts as a zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return 0, 0, "Z"
    return int(fields[1]), int(fields[3]), fields[0].decode()
