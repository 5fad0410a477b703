"""A transport with no machine: a socket pair whose far end belongs to whoever plays the guest.

Rule: it behaves as `VirtioSerial` does, one stream for the machine's whole life, so that what passes over it
passes over a real port.
"""

from __future__ import annotations

import socket

from byre.errors import TransportUnavailable
from byre.transports.base import Transport, Wiring


class MemoryTransport(Transport):
    """`open` makes the pair; `guest` is the far end, taken and closed by whoever plays the guest."""

    name = "memory"

    def __init__(self, secret: bytes | None = None) -> None:
        self._secret = secret
        self._host: socket.socket | None = None
        self.guest: socket.socket | None = None

    @classmethod
    def unavailable(cls) -> str | None:
        return None

    @property
    def secret(self) -> bytes | None:
        return self._secret

    def open(self, bus: str = "") -> Wiring:
        self._host, self.guest = socket.socketpair()
        self._host.setblocking(False)
        return Wiring(arguments=(), kernel_argument=f"byre.channel={self.name}", handed=())

    async def connect(self) -> socket.socket:
        if self._host is None:
            raise TransportUnavailable("the channel is closed")
        return self._host.dup()

    def hang_up(self) -> None:
        self.close()

    def close(self) -> None:
        if self._host is not None:
            self._host.close()
            self._host = None
