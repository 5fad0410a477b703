"""The shares of a VM.

    HeldShares     in the process that holds the VM: it has the servers
    KeeperShares   a client's view of those that a keeper holds

Rule: a share ends in the guest, by `share.unmount` or with its container, whoever asked for it; when the guest's
kernel has let go of it, the stream ends, and with it the server.  A server that ends before leaves the share to
fail, with EIO, until it is unmounted.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from byre.errors import ByreError
from byre.machines.spawn import in_thread
from byre.ports.connection import Connection
from byre.ports.splice import Local, splice

from .share import Share

if TYPE_CHECKING:
    from byre.bridge import Bridge

    from .server import Server

_log = logging.getLogger(__name__)

#: Deadline of a mount, in seconds: kernel modules, and a few messages, on a loaded guest.
MOUNT_TIMEOUT = 60.0


class Shares(abc.ABC):
    """See the module."""

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge

    @abc.abstractmethod
    async def share(self, directory: str, read_only: bool, cache: str) -> Share:
        """Serve an absolute path to the VM.

        Raises `PathNotFound`, `PathNotDirectory`, `PermissionRefused`, `ToolMissing`, `ShareFailed`,
        `StorageFailed`, `ResourceExhausted`.
        """

    def directories(self) -> list[str]:
        """Those that are shared now, where this process serves them."""
        return []


class HeldShares(Shares):
    """See the module."""

    def __init__(self, bridge: Bridge) -> None:
        super().__init__(bridge)
        self._mounted: set[Share] = set()

    def directories(self) -> list[str]:
        return sorted(share.directory for share in self._mounted)

    async def share(self, directory: str, read_only: bool, cache: str) -> Share:
        from . import server

        await in_thread(lambda: server.check(directory))
        diod = server.Server(directory, read_only)
        await diod.begin()
        try:
            near = Local(*await asyncio.open_unix_connection(sock=diod.sock))
            far = Connection(self._bridge)
        except BaseException:
            diod.sock.close()
            diod.kill()
            raise
        self._bridge.background(_carry(diod, near, far))
        try:
            found = await self._bridge.call("share.open", **far.streams)
            name = found["share"]
            await self._bridge.call(
                "share.mount",
                timeout=MOUNT_TIMEOUT,
                undo=lambda _: self._bridge.call("share.unmount", share=name),
                share=name,
                read_only=read_only,
                cache=cache,
            )
        except BaseException:
            diod.kill()
            raise
        share = Share(self._bridge, name, found["path"], directory)
        self._mounted.add(share)
        self._bridge.background(self._follow(share))
        return share

    async def _follow(self, share: Share) -> None:
        with contextlib.suppress(ByreError):  # lost: there is nothing behind it any more
            await share.wait()
        self._mounted.discard(share)


async def _carry(diod: Server, near: Local, far: Connection) -> None:
    """Between the two until either has ended; then the other ends, too."""
    carrying = asyncio.create_task(splice(near, far))
    ending = asyncio.create_task(diod.wait())
    try:
        await asyncio.wait({carrying, ending}, return_when=asyncio.FIRST_COMPLETED)
        if not carrying.done() and not diod.killed:
            _log.error("! the server of the shared directory %s %s", diod.directory, ending.result())
    finally:
        diod.kill()
        carrying.cancel()
        await asyncio.gather(carrying, ending, return_exceptions=True)


class KeeperShares(Shares):
    """See the module."""

    async def share(self, directory: str, read_only: bool, cache: str) -> Share:
        found = await self._bridge.call(
            "vm.share", timeout=MOUNT_TIMEOUT, directory=directory, read_only=read_only, cache=cache
        )
        return Share(self._bridge, found["share"], found["path"], directory)
