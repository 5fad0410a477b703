"""Which transport a machine gets, and why.

Rule: vsock where the host's kernel can carry it for a KVM guest, else virtio-serial, which is always there.  A
serial line is a thousand times slower, and only taken when asked for.  What is asked for by name is given or
refused, never replaced.
"""

from __future__ import annotations

from byre.errors import TransportUnavailable
from byre.transports.base import Transport
from byre.transports.serial import Serial
from byre.transports.virtio_serial import VirtioSerial
from byre.transports.vsock import Vsock

_BY_NAME: dict[str, type[Transport]] = {kind.name: kind for kind in (VirtioSerial, Vsock, Serial)}


def choose_transport(wanted: str, accelerator: str) -> tuple[Transport, str]:
    """A transport, not yet opened, and the reason for it.  `wanted` is "auto" or a name."""
    if wanted != "auto":
        kind = _BY_NAME[wanted]
        problem = kind.unavailable()
        if problem is not None:
            raise TransportUnavailable(
                f"{wanted} cannot be used: {problem}", hint="use transport 'auto', or see: byre doctor"
            )
        return kind(), "it was asked for"
    if accelerator != "kvm":
        return VirtioSerial(), "vsock is for guests under KVM"
    problem = Vsock.unavailable()
    if problem is not None:
        return VirtioSerial(), f"vsock cannot be used: {problem}"
    return Vsock(), "the host's kernel carries it"
