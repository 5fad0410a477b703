"""What every host of processes can do with sockets: a mixin of `GuestProcessHost`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from byre.errors import ConnectionRefused, DeadlineExceeded, PathNotFound

if TYPE_CHECKING:
    from byre.bridge import Bridge

    from .address import AddressLike
    from .connection import Connection
    from .forward import Exposure, Forward

#: How long a server may take to listen, in seconds, unless the caller says: databases begin with a recovery.
READY_TIMEOUT = 60.0

#: Between two tries whether somebody listens: from the first to the second, in seconds.
PAUSES = (0.02, 0.5)

#: One try, in seconds: a packet filter may let it wait.
TRY_TIMEOUT = 5.0


class Sockets:
    """`forward`, `expose`, `connect`, `wait_for_port`.

    An address is a port of 127.0.0.1, "HOST:PORT", or the path of a UNIX socket.  In a container it is one of the
    container's own network and root, in a VM one of the VM's, of a `LocalHost` one of this host.
    """

    _container = ""

    @property
    def bridge(self) -> Bridge:
        raise NotImplementedError

    def forward(self, host: AddressLike, guest: AddressLike, *, max_connections: int | None = None) -> Forward:
        """Listen at `host`, on this host, and connect what comes to `guest`, there.

            async with container.forward("127.0.0.1:0", 80) as web:
                print(web.address)

        Port 0 is a free one.  It ends with the block, with the container, and with the VM.  Raises `AddressInUse`,
        `PermissionRefused`, `ContainerNotFound`, ... when it starts.  Where nobody listens at `guest` a client sees
        a reset (see `wait_for_port`), as it does past `max_connections`.
        """
        from .forward import MAX_CONNECTIONS, Forward

        return Forward(lambda: self.bridge, self._container, host, guest, max_connections or MAX_CONNECTIONS)

    def expose(
        self, host: AddressLike, guest: AddressLike, *, max_connections: int | None = None, mode: int = 0o666
    ) -> Exposure:
        """Listen at `guest`, there, and connect what comes to `host`, on this host, and to nothing else.

            async with container.expose("127.0.0.1:5432", 5432): ...

        As `forward`, the other way round.  A container has to have its first process (`start`, or
        `create_process(None)`).  A UNIX socket gets `mode`; it must not exist, and is removed at the end.
        """
        from .forward import MAX_CONNECTIONS, Exposure

        limit = max_connections or MAX_CONNECTIONS
        return Exposure(lambda: self.bridge, self._container, host, guest, limit, mode=mode)

    async def connect(self, address: AddressLike, *, timeout: float | None = None) -> Connection:
        """A connection to a socket there, as a reader and a writer: `reader, writer = await vm.connect(80)`.

        Raises `ConnectionRefused`, `PathNotFound`, `PathRefused`, `ContainerNotReady`, `ResourceExhausted`,
        `DeadlineExceeded` after `timeout` seconds (CONNECT_TIMEOUT).
        """
        from .address import Address
        from .connection import CONNECT_TIMEOUT, connect

        where = Address.of(address)
        return await connect(self.bridge, self._container, where, CONNECT_TIMEOUT if timeout is None else timeout)

    async def wait_for_port(self, address: AddressLike, *, timeout: float = READY_TIMEOUT) -> None:
        """Wait until somebody listens there: a connection is made, and closed again.

        Raises `DeadlineExceeded`, whose ``data["last"]`` is the last refusal; `ContainerNotReady` when the
        container does not run (any more).
        """
        from .address import Address

        where = Address.of(address)
        loop = asyncio.get_running_loop()
        deadline, pause = loop.time() + timeout, PAUSES[0]
        last = ""
        while True:
            patience = min(TRY_TIMEOUT, max(0.0, deadline - loop.time()))
            try:
                await self.bridge.call(
                    "socket.connect", timeout=patience, container=self._container, **where.request
                )
                return
            except (ConnectionRefused, PathNotFound) as error:
                last = error.message
            except DeadlineExceeded as error:  # a refusal says more
                last = last or error.message
            if loop.time() + pause >= deadline:
                raise DeadlineExceeded(
                    f"nobody listened at {where} within {timeout:g} s",
                    hint="has the server started, and at this address? see its output",
                    address=str(where),
                    last=last,
                )
            await asyncio.sleep(pause)
            pause = min(2 * pause, PAUSES[1])
