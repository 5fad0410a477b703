"""What is struck, and worked on: a VM of this process, a keeper's VM with this process as a client, or LocalHost.

Rule: a place tells the phases nothing but where they work.  It ends in byre's own way, except for a keeper that a
strike has stopped, which is killed at once: `detached.end` does the same after half a minute.
"""

from __future__ import annotations

import abc
import contextlib
import itertools
import os
import shutil
import signal
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import byre
from byre import detached, rundir
from byre.errors import VMNotFound

#: Seconds that a guest has to end in order.
PATIENCE = 1.0

_numbers = itertools.count(1)


class Place(abc.ABC):
    """`vm` is the `ProcessHost`, `folder` where files may be written, `usual` what its guest has in any case."""

    vm: Any
    folder = "/tmp"

    def __init__(self, options: dict[str, Any], deadline: float | None = None) -> None:
        self.options = options
        self._deadline = deadline
        self.usual: Counter[str] = Counter()

    @abc.abstractmethod
    async def start(self) -> None: ...

    async def shutdown(self) -> None:
        """In order, with what goes on in it."""
        await self.vm.shutdown(timeout=2)

    async def close(self) -> None:
        await self.vm.close()

    def another(self, deadline: float) -> Place:
        """A second one, yet to be started."""
        return type(self)(self.options, deadline)


class Own(Place):
    """A VM that belongs to this process."""

    async def start(self) -> None:
        self.vm = byre.UtilityVM(**self.options, boot_timeout=self._deadline)
        await self.vm.start()

    async def close(self) -> None:
        if hasattr(self, "vm"):
            await self.vm.close()


class Kept(Place):
    """A VM that belongs to a keeper."""

    name = ""

    async def start(self) -> None:
        self.name = f"kept{next(_numbers)}"
        self.vm = byre.UtilityVM(name=self.name, detached=True, **self.options, boot_timeout=self._deadline)
        await self.vm.start()

    @property
    def keeper(self) -> int:
        """Its process id; 0: there is none yet."""
        return int(rundir.find(self.name).info().get("pid", 0)) if self.name else 0

    async def close(self) -> None:
        if not self.name:
            return
        await self.vm.close()
        if is_stopped(self.keeper):
            os.kill(self.keeper, signal.SIGKILL)
        with contextlib.suppress(VMNotFound):
            await detached.end(self.name, PATIENCE)


class Attached(Kept):
    """The same in another client, which does not end it; a second VM is the client's own."""

    def __init__(self, options: dict[str, Any], name: str) -> None:
        super().__init__(options)
        self.name = name

    async def start(self) -> None:
        self.vm = await byre.UtilityVM.attach(self.name)

    def another(self, deadline: float) -> Place:
        return Own(self.options, deadline)

    async def close(self) -> None:
        await self.vm.close()


class Local(Place):
    """The agent as a child process of this one."""

    async def start(self) -> None:
        self.folder = tempfile.mkdtemp()
        self._others = set(descendants())
        self.vm = byre.LocalHost()
        await self.vm.start()

    async def shutdown(self) -> None:
        await self.vm.close()

    async def close(self) -> None:
        """An agent that was killed leaves what it was writing, and its processes."""
        if not hasattr(self, "vm"):
            return
        hangs = is_stopped(self.vm.pid or 0)  # then byre kills it, with its processes
        await self.vm.close()
        shutil.rmtree(self.folder)
        if not hangs:
            for pid in set(descendants()) - self._others:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def descendants() -> list[int]:
    """Whatever has this process's own directory of temporary files in its environment, dead ones' children too."""
    mark = os.fsencode(f"XDG_RUNTIME_DIR={os.environ['XDG_RUNTIME_DIR']}")
    found = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):  # ended, or not ours
            if entry.isdigit() and mark in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0"):
                found.append(int(entry))
    return found


def is_stopped(pid: int) -> bool:
    try:
        return pid > 0 and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def emulators() -> frozenset[int]:
    """Process ids of this process's children that are emulators."""
    return frozenset(child for child in children() if name_of(child).startswith("qemu-system"))


def children() -> frozenset[int]:
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that has ended
            found.update(map(int, (task / "children").read_text().split()))
    return frozenset(found)


def name_of(pid: int) -> str:
    try:
        return os.path.basename(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode())
    except OSError:
        return ""
