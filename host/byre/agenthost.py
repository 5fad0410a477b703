"""What `LocalHost`, `SerialHost` and `SocketHost` have in common: one bridge to an agent that is no VM's.

Rule: begun once, and closed whatever happens: after an error or a cancellation of the start nothing is left open.
"""

from __future__ import annotations

import abc
import asyncio
from typing import TYPE_CHECKING, Self

from .bridge import Bridge
from .errors import ConnectionLost, MachineFailed, host_failed
from .process import GuestProcessHost

if TYPE_CHECKING:
    from types import TracebackType

#: How long the agent may take to answer, in seconds: it is a Python program of a few hundred ms on a slow host, a
#: bad line loses some of what it asks every two seconds, and one on a socket may have another host.
START_TIMEOUT = 30.0


class AgentHost(GuestProcessHost, abc.ABC):
    """A `ProcessHost` that is an async context manager; `_reach` makes its bridge."""

    def __init__(self, start_timeout: float = START_TIMEOUT) -> None:
        self._start_timeout = start_timeout
        self._bridge: Bridge | None = None

    @property
    def bridge(self) -> Bridge:
        if self._bridge is None:
            name = type(self).__name__
            raise ConnectionLost("the agent is not connected", hint=f"use: async with {name}(...) as host")
        return self._bridge

    @abc.abstractmethod
    async def _reach(self) -> Bridge:
        """The bridge, yet to be opened."""

    async def start(self) -> None:
        """Reach the agent and shake hands.  Raises `DeadlineExceeded` when it does not answer."""
        if self._bridge is not None:
            raise MachineFailed(f"a {type(self).__name__} starts once", hint="make another one")
        with host_failed("the agent cannot be reached"):
            self._bridge = await self._reach()
        try:
            await self._bridge.open(self._start_timeout)
        except BaseException:
            await asyncio.shield(self.close())
            raise

    async def close(self) -> None:
        """Let the agent go.  Harmless when repeated (B51)."""
        if self._bridge is not None:
            await self._bridge.close(f"the {type(self).__name__} was closed")

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
