"""A channel that is a socket pair: one end is kept here, the other is the machine's; no other process reaches it.

Rule: it is one stream for the machine's whole life.  `connect` gives a duplicate of our end, so the next connection
goes on in the middle of whatever was under way.
"""

from __future__ import annotations

import socket

from byre.errors import TransportUnavailable
from byre.transports.base import Transport


class PairTransport(Transport):
    """What such transports have in common; `open` calls `_make_pair`."""

    def __init__(self) -> None:
        self._host: socket.socket | None = None

    @classmethod
    def unavailable(cls) -> str | None:
        return None

    def _make_pair(self) -> socket.socket:
        """Keep one end; returns the other, blocking."""
        self._host, machines = socket.socketpair()
        self._host.setblocking(False)
        return machines

    async def connect(self) -> socket.socket:
        if self._host is None:
            raise TransportUnavailable(f"the {self.name} port is closed")
        return self._host.dup()

    def hang_up(self) -> None:
        self.close()

    def close(self) -> None:
        if self._host is not None:
            self._host.close()
            self._host = None
