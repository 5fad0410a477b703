"""A transport turns a machine's channel into a byte stream; what is spoken over it is not its business.

Rule: it owns its descriptors from `open` to `close`, and nothing of it has a name that another process could
reach, where the kernel allows that.  A stream may begin and end with bytes that are not the peer's (a serial port
has no connections), which is why the protocol above starts with a magic number and nonces.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import socket


@dataclass(frozen=True, kw_only=True)
class Wiring:
    """What a transport adds to a machine.

    ``handed`` are descriptors for the emulator, inherited under the same numbers; they, and that of ``later``, are
    the machine's to close.
    """

    arguments: tuple[str, ...]
    kernel_argument: str
    handed: tuple[int, ...]
    #: A character device and the descriptor that it is to end in, where the guest is to find no host at first.
    later: tuple[str, int] | None = None


class Transport(abc.ABC):
    """The channel of one machine."""

    name: ClassVar[str]
    #: Whether bytes may be lost or changed on the way, so that the line protocol is needed above it.
    lossy: ClassVar[bool] = False
    #: Whether `connect` gives another channel when one was cut, to the same agent.
    redialled: ClassVar[bool] = False

    @classmethod
    @abc.abstractmethod
    def unavailable(cls) -> str | None:
        """Why this host cannot have it; None if it can."""

    @property
    def secret(self) -> bytes | None:
        """What both ends prove that they know; None where no third party can reach the channel."""
        return None

    @abc.abstractmethod
    def open(self, bus: str, *, had_host: bool = False) -> Wiring:
        """Take what it needs of the host, once.  ``bus`` ends the names of the machine's virtio devices ("pci" or
        "device"); ``had_host``: the guest goes on from where it had a host, and has to notice that this is another
        one.  TransportUnavailable if something cannot be had."""

    @abc.abstractmethod
    async def connect(self) -> socket.socket:
        """A connected, non-blocking stream socket, the caller's to close.  May wait for the guest, without end."""

    @abc.abstractmethod
    def hang_up(self) -> None:
        """Leave the guest as the host of a clone has to find it.  Nobody uses a connection any more."""

    @abc.abstractmethod
    def close(self) -> None:
        """Give everything back.  Harmless when repeated, and before `open`."""
