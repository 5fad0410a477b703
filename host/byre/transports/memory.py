"""A transport with no machine: a socket pair whose far end belongs to whoever plays the guest.

Rule: it behaves as `VirtioSerial` does, one stream for the machine's whole life, so that what passes over it
passes over a real port.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from byre.transports.base import Wiring
from byre.transports.pair import PairTransport

if TYPE_CHECKING:
    import socket


class MemoryTransport(PairTransport):
    """`open` makes the pair; `guest` is the far end, taken and closed by whoever plays the guest."""

    name = "memory"

    def __init__(self, secret: bytes | None = None) -> None:
        super().__init__()
        self._secret = secret
        self.guest: socket.socket | None = None

    @property
    def secret(self) -> bytes | None:
        return self._secret

    def open(self, bus: str = "", *, had_host: bool = False) -> Wiring:
        self.guest = self._make_pair()
        return Wiring(arguments=(), kernel_argument=f"byre.channel={self.name}", handed=())
