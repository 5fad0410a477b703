"""The networks of a VM.

    HeldNetworks     in the process that holds the VM: it has the cables' other ends
    KeeperNetworks   a client's view of those that a keeper holds

Rule: a network ends in the guest, by `network.close` or with the container or the pod that was made with it; then
the streams end, and with them slirp.  One whose slirp has ended before has lost its card.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from byre.errors import ByreError
from byre_proto import limits

from .network import Network

if TYPE_CHECKING:
    from byre.bridge import Bridge
    from byre.ports.connection import Connection

    from .slirp import Slirp

_log = logging.getLogger(__name__)

#: Of a frame's length, before it on a stream (WIRE.md).
PREFIX = 2

#: A frame with its length fits the credit that a stream has at least, when half of it has come back.
MAX_FRAME = limits.INITIAL_WINDOW // 2 - PREFIX
MIN_FRAME = 14

#: As large as a frame can be: each costs an emulated guest far more than its bytes do.
MTU = 8000

#: Deadline of `network.open`, in seconds: a kernel module and a device, on a loaded guest.
OPEN_TIMEOUT = 60.0


class Networks(abc.ABC):
    """See the module."""

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge

    @abc.abstractmethod
    async def open(self, *, own: bool) -> Network:
        """A new one: for a container or a pod to be made with, or `own`, the VM's own.

        Raises `ToolMissing`, `NetworkFailed`, `StorageFailed`, `ResourceExhausted`, `InvalidRequest` when the VM
        has its own already.
        """

    @property
    def count(self) -> int:
        """Of those that there are now, where this process holds them."""
        return 0


class HeldNetworks(Networks):
    """See the module."""

    def __init__(self, bridge: Bridge) -> None:
        super().__init__(bridge)
        self._cables: set[asyncio.Task[None]] = set()

    @property
    def count(self) -> int:
        return len(self._cables)

    async def open(self, *, own: bool) -> Network:
        from byre.ports.connection import Connection

        from . import filter as passing
        from . import slirp  # all of it only for those who have one

        running = await slirp.started(MTU)
        try:
            far = Connection(self._bridge)
        except BaseException:
            running.sock.close()
            running.kill()
            raise
        cable = self._bridge.background(_carry(running, far))
        self._cables.add(cable)
        cable.add_done_callback(self._cables.discard)
        try:
            answer = await self._bridge.call(
                "network.open",
                timeout=OPEN_TIMEOUT,
                undo=lambda found: self._bridge.call("network.close", network=found["network"]),
                own=own,
                address=passing.ADDRESS,
                gateway=passing.GATEWAY,
                nameserver=passing.NAMESERVER,
                mtu=MTU,
                **far.streams,
            )
        except BaseException:
            running.kill()
            raise
        return Network(self._bridge, answer["network"])


async def _carry(slirp: Slirp, far: Connection) -> None:
    """Between the two until either has ended; then the other ends, too."""
    out, back = asyncio.create_task(_out(slirp, far)), asyncio.create_task(_in(slirp, far))
    ending = asyncio.create_task(slirp.wait())
    try:
        await asyncio.wait({out, back, ending}, return_when=asyncio.FIRST_COMPLETED)
        if ending.done() and not slirp.killed:
            _log.error("! the network's %s", ending.result())
    finally:
        slirp.kill()
        out.cancel()
        back.cancel()
        await asyncio.gather(out, back, ending, return_exceptions=True)
        slirp.sock.close()
        far.abort()


async def _out(slirp: Slirp, far: Connection) -> None:
    """What the guest sends, less what may not pass."""
    from . import filter as passing

    loop = asyncio.get_running_loop()
    judge = passing.Filter()
    with contextlib.suppress(OSError, EOFError, ByreError):  # either has ended
        while True:
            size = int.from_bytes(await far.reader.readexactly(PREFIX), "big")
            if not MIN_FRAME <= size <= MAX_FRAME:
                _log.error("! the guest sent a frame of %d bytes, and loses its network", size)
                return
            frame = await far.reader.readexactly(size)
            if judge.passes(frame):
                await loop.sock_sendall(slirp.sock, frame)
            elif not far.writer.transport.get_write_buffer_size():  # who does not read is not told
                _send(far, passing.refusal(frame))


async def _in(slirp: Slirp, far: Connection) -> None:
    """What comes back.  What is too large for a frame is none of slirp's."""
    loop = asyncio.get_running_loop()
    with contextlib.suppress(OSError, ByreError):
        while frame := await loop.sock_recv(slirp.sock, MAX_FRAME + 1):
            if MIN_FRAME <= len(frame) <= MAX_FRAME:
                _send(far, frame)
                await far.writer.drain()


def _send(far: Connection, frame: bytes) -> None:
    if frame:
        far.writer.write(len(frame).to_bytes(PREFIX, "big") + frame)


class KeeperNetworks(Networks):
    """See the module."""

    async def open(self, *, own: bool) -> Network:
        answer = await self._bridge.call(
            "vm.network",
            timeout=OPEN_TIMEOUT,
            undo=lambda found: self._bridge.call("network.close", network=found["network"]),
            own=own,
        )
        return Network(self._bridge, answer["network"])
