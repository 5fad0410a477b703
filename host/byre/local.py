"""`LocalHost`: the agent as a child process of this one, over a socket pair.  The same code with no VM.

Rule: nothing is isolated here; it is for tests, and for trying the interfaces.  The agent ends when its end of the
socket pair does, and kills what it started, so nothing outlives its owner, however that dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys

from .agenthost import AgentHost
from .bridge import Bridge

#: How long the agent may take to kill what it started, in seconds.
STOP_TIMEOUT = 10.0

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
                with contextlib.suppress(ProcessLookupError):
                    self._agent.kill()
                await self._agent.wait()


def _packages() -> str:
    """Where the agent's packages are, as the child's search path."""
    import msgpack

    import byre_guest
    import byre_proto

    files = [package.__file__ for package in (byre_guest, byre_proto, msgpack)]
    return ":".join(dict.fromkeys(os.path.dirname(os.path.dirname(file)) for file in files if file))
