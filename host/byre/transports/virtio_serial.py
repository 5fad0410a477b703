"""A virtio-serial port that ends in a socket pair: every machine has it, and no other process can reach it.

Rule: the host's end stays open for the machine's whole life.  Each time the host disconnects while the guest has
output queued, the guest's port leaks a descriptor of its queue, and after 128 of them it can never be written
again; QEMU also drops what it has queued.  So `connect` gives a duplicate, and the next one continues the same
stream, in the middle of whatever was under way.
"""

from __future__ import annotations

import socket

from byre.errors import TransportUnavailable
from byre.transports.base import Transport, Wiring

PORT_NAME = "org.byre.bridge"


class VirtioSerial(Transport):
    """See the module."""

    name = "virtio-serial"

    def __init__(self) -> None:
        self._host: socket.socket | None = None

    @classmethod
    def unavailable(cls) -> str | None:
        return None

    def open(self, bus: str) -> Wiring:
        self._host, guest = socket.socketpair()
        self._host.setblocking(False)
        fd = guest.detach()
        return Wiring(
            # Port 0 is reserved for a console, hence two; 31, the default, cost the guest 62 queues at boot.
            arguments=(
                *("-device", f"virtio-serial-{bus},id=serial0,max_ports=2"),
                *("-chardev", f"socket,id=bridge,fd={fd}"),
                *("-device", f"virtserialport,bus=serial0.0,nr=1,chardev=bridge,name={PORT_NAME}"),
            ),
            kernel_argument=f"byre.channel={self.name}",
            handed=(fd,),
        )

    async def connect(self) -> socket.socket:
        if self._host is None:
            raise TransportUnavailable("the virtio-serial port is closed")
        return self._host.dup()

    def hang_up(self) -> None:
        """Close the port: a clone's device tells its guest that it is open, and the agent begins anew."""
        self.close()

    def close(self) -> None:
        if self._host is not None:
            self._host.close()
            self._host = None
