"""`SocketHost`: an agent that listens on a UNIX socket, on this machine or behind a tunnel that begins in one.

    there:  python3 -m byre_guest --listen /run/agent        (and, from elsewhere, ssh -L ./agent:/run/agent there)
    here:   async with SocketHost("./agent") as host: await host.run(["uname", "-a"])

Rule: the agent is not ours: it goes on after us, and takes the next one.  Its processes go on as well.  A cut of
the socket is survived; that nobody listens any more is the agent's end.
"""

from __future__ import annotations

import asyncio
import os
import socket

from .agenthost import START_TIMEOUT, AgentHost
from .bridge import Bridge
from .errors import ConnectionLost


class SocketHost(AgentHost):
    """A `ProcessHost` behind a UNIX socket.  An async context manager."""

    def __init__(self, path: str | os.PathLike[str], *, start_timeout: float = START_TIMEOUT) -> None:
        super().__init__(start_timeout)
        self.path = os.fspath(path)

    async def _reach(self) -> Bridge:
        """Dial the agent.  Raises `ConnectionLost` when nobody listens."""
        return Bridge(await self._dial(), label=self.path, redial=self._dial)

    async def _dial(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, self.path)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            sock.close()
            raise ConnectionLost(f"no agent listens on {self.path}: {error.strerror}") from error
        except BaseException:
            sock.close()
            raise
        return sock
