"""`Share`: a directory of this host that a VM has, as its caller sees it."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self

from byre.errors import ConnectionLost, ShareLost

if TYPE_CHECKING:
    from byre.bridge import Bridge

#: For leaving ``async with``, in seconds: the guest may have pages to write back.
LEAVE_TIMEOUT = 60.0


class Share:
    """`path` is where the VM has it, `name` what the agent calls it.  An async context manager, or `close`."""

    def __init__(self, bridge: Bridge, name: str, path: str, directory: str) -> None:
        self.name = name
        self.path = path
        self.directory = directory
        self._bridge = bridge

    async def wait(self) -> None:
        """Until it is closed, or has gone with its container.  Raises `ShareLost` when its server has ended."""
        if (await self._bridge.call("share.wait", timeout=None, share=self.name))["lost"]:
            raise ShareLost(
                f"the server of {self.directory} has ended",
                hint="close the share, and make it anew",
                path=self.path,
            )

    async def close(self) -> None:
        """Unmount it in the VM; its server ends with that.  Raises `StorageFailed` while something is open there.

        Harmless when repeated.
        """
        try:
            await self._bridge.call("share.unmount", share=self.name)
        except ConnectionLost:
            return

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._bridge.finish(self.close(), LEAVE_TIMEOUT)

    def __repr__(self) -> str:
        return f"<Share {self.directory} at {self.path}>"
