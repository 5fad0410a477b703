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
from typing import TYPE_CHECKING, Self

from .bridge import Bridge
from .errors import ConnectionLost, MachineFailed
from .process import GuestProcessHost

if TYPE_CHECKING:
    from types import TracebackType

#: How long the agent may take to answer, in seconds: it may have another host.
START_TIMEOUT = 30.0


class SocketHost(GuestProcessHost):
    """A `ProcessHost` behind a UNIX socket.  An async context manager."""

    def __init__(self, path: str | os.PathLike[str], *, start_timeout: float = START_TIMEOUT) -> None:
        self.path = os.fspath(path)
        self._start_timeout = start_timeout
        self._bridge: Bridge | None = None

    @property
    def bridge(self) -> Bridge:
        if self._bridge is None:
            raise ConnectionLost("the agent is not connected", hint="use: async with SocketHost(path) as host")
        return self._bridge

    async def start(self) -> None:
        """Dial the agent.  After an error or a cancellation nothing is left open.

        Raises `ConnectionLost` when nobody listens, `DeadlineExceeded` when the agent does not answer.
        """
        if self._bridge is not None:
            raise MachineFailed("a SocketHost starts once", hint="make another one")
        self._bridge = Bridge(await self._dial(), label=self.path, redial=self._dial)
        try:
            await self._bridge.open(self._start_timeout)
        except BaseException:
            await asyncio.shield(self.close())
            raise

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

    async def close(self) -> None:
        """Let the agent go.  Harmless when repeated (B51)."""
        if self._bridge is not None:
            await self._bridge.close("the SocketHost was closed")

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
