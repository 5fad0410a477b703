"""`LocalHost`: the agent as a child process of this one, over a socket pair.  The same code with no VM.

Rule: nothing is isolated here; it is for tests, and for trying the interfaces.  The agent ends when its end of the
socket pair does, and kills what it started, so nothing outlives its owner, however that dies.  An agent that hangs
is killed with what descends from it; one that somebody else kills by force leaves its processes to the system.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys

from .agenthost import AgentHost
from .bridge import Bridge

#: How long the agent may take to kill what it started, in seconds: it takes milliseconds.
STOP_TIMEOUT = 4.0

#: The child finds the packages where this process found them; its environment stays as it is, since the processes
#: that it makes inherit it.
_PROGRAM = (
    "import runpy, sys; sys.path[:0] = sys.argv.pop(1).split(':'); "
    "runpy.run_module('byre_guest', None, '__main__', True)"
)


class LocalHost(AgentHost):
    """A `ProcessHost` whose processes run on this host, as this user.  An async context manager."""

    def __init__(self) -> None:
        super().__init__()
        self._agent: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        """The agent's process id."""
        return self._agent.pid if self._agent is not None else None

    async def _reach(self) -> Bridge:
        """Start the agent."""
        ours, theirs = socket.socketpair()
        with theirs:
            ours.setblocking(False)
            command = [sys.executable, "-I", "-S", "-c", _PROGRAM, _packages(), "--fd", str(theirs.fileno())]
            try:
                self._agent = await asyncio.create_subprocess_exec(*command, pass_fds=(theirs.fileno(),))
            except BaseException:
                ours.close()
                raise
        return Bridge(ours, label="local")

    async def close(self) -> None:
        """End the agent and all that it started.  Harmless when repeated (B51)."""
        await super().close()
        if self._agent is not None and self._agent.returncode is None:
            try:
                async with asyncio.timeout(STOP_TIMEOUT):
                    await self._agent.wait()
            except TimeoutError:
                for pid in _descendants(self._agent.pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                await self._agent.wait()


def _descendants(pid: int) -> list[int]:
    """A process and all that descends from it, parents first."""
    found = [pid]
    for each in found:
        with contextlib.suppress(OSError):  # it has ended
            for task in os.listdir(f"/proc/{each}/task"):
                with open(f"/proc/{each}/task/{task}/children") as children:
                    found += map(int, children.read().split())
    return found


def _packages() -> str:
    """Where the agent's packages are, as the child's search path."""
    import msgpack

    import byre_guest
    import byre_proto

    files = [package.__file__ for package in (byre_guest, byre_proto, msgpack)]
    return ":".join(dict.fromkeys(os.path.dirname(os.path.dirname(file)) for file in files if file))
