"""A virtio-serial port that ends in a socket pair (`pair`): every machine has it.

Rule: the host's end stays open for the machine's whole life.  Each time the host disconnects while the guest has
output queued, the guest's port leaks a descriptor of its queue, and after 128 of them it can never be written
again; QEMU also drops what it has queued.  Hanging up is for a machine that is being saved: a clone's device tells
its guest that the port is open, and the agent begins anew.  The clone of a guest that was saved with a host finds
the port closed, and open when it has noticed that.
"""

from __future__ import annotations

from byre.transports.base import Wiring
from byre.transports.pair import PairTransport

PORT_NAME = "org.byre.bridge"
CHARDEV = "bridge"


class VirtioSerial(PairTransport):
    """See the module."""

    name = "virtio-serial"

    def open(self, bus: str, *, had_host: bool = False) -> Wiring:
        fd = self._make_pair().detach()
        return Wiring(
            later=(CHARDEV, fd) if had_host else None,
            # Port 0 is reserved for a console, hence two; 31, the default, cost the guest 62 queues at boot.
            arguments=(
                *("-device", f"virtio-serial-{bus},id=serial0,max_ports=2"),
                *("-chardev", f"null,id={CHARDEV}" if had_host else f"socket,id={CHARDEV},fd={fd}"),
                *("-device", f"virtserialport,bus=serial0.0,nr=1,chardev={CHARDEV},name={PORT_NAME}"),
            ),
            kernel_argument=f"byre.channel={self.name}",
            handed=() if had_host else (fd,),
        )
