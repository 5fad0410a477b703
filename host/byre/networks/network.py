"""`Network`: a way out of a VM, as its caller sees it."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self

from byre.errors import ConnectionLost

if TYPE_CHECKING:
    from byre.bridge import Bridge

#: For leaving ``async with``, in seconds.
LEAVE_TIMEOUT = 60.0


class Network:
    """`name` is what the agent calls it.  An async context manager, or `close`."""

    def __init__(self, bridge: Bridge, name: str) -> None:
        self.name = name
        self._bridge = bridge

    async def close(self) -> None:
        """Take it away: what is connected through it is cut off.  Harmless when repeated."""
        try:
            await self._bridge.call("network.close", network=self.name)
        except ConnectionLost:
            return

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._bridge.finish(self.close(), LEAVE_TIMEOUT)

    def __repr__(self) -> str:
        return f"<Network {self.name}>"
