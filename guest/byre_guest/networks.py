"""Networks that lead out of the machine: each a namespace with a network card whose cable is two streams.

    /run/byre/n/NAME/network   the namespace (`namespaces`), for a container or a pod that is made with it

    making -> ready -> used -> removing -> gone

The host's side has the other end of the cable, and decides what passes; here are the addresses, as it says them.
The one of the machine itself has no namespace: its card is in the machine's own.

Rule: a network that a container or a pod was made with goes with it, any other by `network.close` or with the host
at the other end of its cable.  Without a card it leads nowhere.  What may block is in helper children.
Source: netdevice(7), rtentry in linux/include/uapi/linux/route.h.
"""

from __future__ import annotations

import _socket
import fcntl
import os
import struct

from byre_proto.errors import ByreError, InvalidRequest, ResourceExhausted, StartFailed, StorageFailed

from . import addresses, children, names, namespaces, storage
from .cards import HEADER, MAX_FRAME, Card

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .server import Call, Server

BASE = "/run/byre/n"

#: Networks at once: two streams, two descriptors, a mount, and a process of the host's each.
MAX_NETWORKS = 256

#: To make one or to remove it, in seconds; some 30 ms under emulation when all is well, with the driver loaded.
TIMEOUT = 30.0

#: As its users call it.
CARD = "eth0"

#: Where the machine's own names are looked up; /etc/resolv.conf leads there.
RESOLV_CONF = "/run/resolv.conf"

#: The smallest that IPv4 allows (RFC 791).
MIN_MTU = 68
MAX_MTU = MAX_FRAME - HEADER

_TUNSETIFF = 0x400454CA
_IFF_TAP = 2
_IFF_NO_PI = 0x1000
_SIOCADDRT = 0x890B
_SIOCSIFADDR = 0x8916
_SIOCSIFNETMASK = 0x891C
_SIOCSIFMTU = 0x8922

#: struct ifreq is a name of 16 bytes and a union of 24; here of flags, of a number, of a struct sockaddr_in.
_FLAGS = struct.Struct("16sh22x")
_NUMBER = struct.Struct("16si20x")
_ADDRESS = struct.Struct("16sHxx4s16x")

#: struct rtentry: destination, gateway and mask, each a struct sockaddr_in, and flags.
_ROUTE = struct.Struct("8xHxx4s8xHxx4s8xHxx4s8xH62x")
_RTF_UP_GATEWAY = 3

_ANY = bytes(4)


class Addresses:
    """What the host says of a network: numbers, checked.  Raises `InvalidRequest`."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        address, _, prefix = arguments["address"].partition("/")
        self.address = _ip(address, "address")
        if not prefix.isdecimal() or not 1 <= int(prefix) <= 30:
            raise InvalidRequest(f"{arguments['address'][:80]!r} is not ADDRESS/PREFIX", field="address")
        self.mask = (~0 << 32 - int(prefix) & 0xFFFFFFFF).to_bytes(4, "big")
        self.gateway = _ip(arguments["gateway"], "gateway")
        self.nameserver: str = arguments["nameserver"]
        _ip(self.nameserver, "nameserver")
        self.mtu: int = arguments["mtu"]
        if not MIN_MTU <= self.mtu <= MAX_MTU:
            raise InvalidRequest(f"mtu is {MIN_MTU} to {MAX_MTU}, not {self.mtu}", field="mtu")


def _ip(text: str, field: str) -> bytes:
    try:
        return _socket.inet_pton(_socket.AF_INET, text)
    except (OSError, UnicodeError):
        raise InvalidRequest(f"{text[:80]!r} is not an IPv4 address", field=field) from None


class Network:
    """One of them; `owner` is the container ("c NAME") or the pod ("p NAME") that was made with it."""

    def __init__(self, name: str, own: bool, nameserver: str) -> None:
        self.name = name
        self.directory = "" if own else f"{BASE}/{name}"
        self.path = f"{self.directory}/network"
        self.nameserver = nameserver
        self.state = "making"
        self.owner = ""
        self.card: Card | None = None


class Networks:
    """The networks of one machine, and the handlers of `network.*`."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._by_name: dict[str, Network] = {}
        self._last = 0

    # -- of containers and pods ----------------------------------------------------------------------------

    def use(self, name: str, owner: str) -> Network:
        """From now on it is the owner's.  Raises `InvalidRequest`."""
        network = self._by_name.get(name)
        if network is None or network.state != "ready" or not network.directory:
            raise InvalidRequest(f"there is no free network {name[:80]!r}", hint="network.open makes one")
        network.state, network.owner = "used", owner
        return network

    def release(self, owner: str) -> None:
        """The owner is gone, or was not made; and with it its network."""
        for network in [one for one in self._by_name.values() if one.owner == owner and one.state == "used"]:
            self._remove(network, None)

    # -- open ----------------------------------------------------------------------------------------------

    def open(self, call: Call, arguments: dict[str, Any]) -> None:
        """`network.open`: with `own` it is the machine's, else a new one.  After an error nothing of it is left."""
        if len(self._by_name) >= MAX_NETWORKS:
            raise ResourceExhausted(f"there are {MAX_NETWORKS} networks", hint="close some of them")
        if arguments["own"] and any(not network.directory for network in self._by_name.values()):
            raise InvalidRequest("the VM has a network of its own already", hint="close that one first")
        numbers = Addresses(arguments)
        try:
            ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
        except OSError as error:
            raise ResourceExhausted(f"no network: {error.strerror}", errno=error.errno) from error
        self._last += 1
        network = Network(str(self._last), arguments["own"], numbers.nameserver)

        def made(_result: object, error: ByreError | None) -> None:
            try:
                if error is None:
                    self._made(network, call, arguments, addresses.passed_descriptor(ours))
                    return
            except ByreError as failure:
                error = failure
            except OSError as failure:
                error = addresses.exhausted(failure)
            finally:
                ours.close()
            self._remove(network, None)
            call.fail(error)

        try:
            child = children.run(
                self._server.loop,
                self._server.reaper,
                lambda: _make(network.directory, theirs, numbers),
                TIMEOUT,
                made,
                keep=[theirs.fileno()],
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._by_name[network.name] = network

        def give_up(error: ByreError) -> None:
            child.cancel()
            call.fail(error)

        call.on_cancel = give_up

    def _made(self, network: Network, call: Call, arguments: dict[str, Any], fd: int) -> None:
        """There is a card.  Raises `ByreError`, OSError."""
        pumps = self._server.processes.pumps
        if call.answered or pumps is None:
            os.close(fd)
            self._remove(network, None)
            return
        try:
            stdin, stdout = arguments["stdin"], arguments["stdout"]
            network.card = Card(pumps, fd, stdin, stdout, lambda: self._unplugged(network))
        except BaseException:
            os.close(fd)
            raise
        network.state = "ready"
        call.reply({"network": network.name})

    def _unplugged(self, network: Network) -> None:
        """The cable has ended, and with it the card.  What nobody was made with goes with it."""
        network.card = None
        if network.state in ("ready", "used"):
            self._server.logs.log(30, f"the network {network.name} has lost its host, and leads nowhere")
        if network.state == "ready":
            self._remove(network, None)

    # -- close ---------------------------------------------------------------------------------------------

    def close(self, call: Call, arguments: dict[str, Any]) -> None:
        """`network.close`.  Harmless when it is gone."""
        network = self._by_name.get(arguments["network"])
        if network is None:
            call.reply({})
        elif network.state != "ready":
            what = f"belongs to {network.owner[2:]}" if network.owner else "is being made or removed"
            raise StorageFailed(f"the network {network.name} {what}", hint="delete that one first")
        else:
            self._remove(network, call)

    def _remove(self, network: Network, call: Call | None) -> None:
        """What lives in its namespace keeps that one, without a card."""
        network.state = "removing"
        if network.card is not None:
            network.card.close()

        def removed(_result: object, error: ByreError | None) -> None:
            if error is not None and call is None and isinstance(error, StartFailed):  # nobody else tries it again
                self._server.loop.call_later(children.AGAIN_SECONDS, remove)
                return
            self._by_name.pop(network.name, None)
            if error is not None:
                self._server.logs.log(30, f"the network {network.name}: {error}")
            if call is not None:
                call.done(error)

        def remove() -> None:
            loop, reaper = self._server.loop, self._server.reaper
            children.run(loop, reaper, lambda: _unmake(network.directory), TIMEOUT, removed)

        remove()


# -- in helper children ------------------------------------------------------------------------------------


def _make(directory: str, channel: _socket.socket, numbers: Addresses) -> None:
    """A card, in a new namespace that is pinned in `directory`, or in the machine's; its descriptor is passed."""
    storage.need("tun")
    try:
        if directory:
            os.makedirs(directory, 0o700)
            namespaces.pin(directory, ["network"])
        else:
            with open(RESOLV_CONF, "w", encoding="ascii") as file:
                file.write(names.resolv_conf(numbers.nameserver))
        # The descriptor's namespace is the one in which it is opened.
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        fcntl.ioctl(fd, _TUNSETIFF, _FLAGS.pack(CARD.encode(), _IFF_TAP | _IFF_NO_PI))
        _configure(numbers)
        addresses.pass_descriptor(channel, fd)
    except OSError as error:
        raise StorageFailed(f"the network could not be made: {error}", errno=error.errno) from error


def _configure(numbers: Addresses) -> None:
    """The card's addresses, and the way out.  Raises OSError."""
    inet, card = _socket.AF_INET, CARD.encode()
    any_socket = _socket.socket(inet, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC)
    for request, value in (
        (_SIOCSIFMTU, _NUMBER.pack(card, numbers.mtu)),
        (_SIOCSIFADDR, _ADDRESS.pack(card, inet, numbers.address)),
        (_SIOCSIFNETMASK, _ADDRESS.pack(card, inet, numbers.mask)),
        (namespaces.SIOCSIFFLAGS, _FLAGS.pack(card, namespaces.IFF_UP)),
        (_SIOCADDRT, _ROUTE.pack(inet, _ANY, inet, numbers.gateway, inet, _ANY, _RTF_UP_GATEWAY)),
    ):
        fcntl.ioctl(any_socket.fileno(), request, value)


def _unmake(directory: str) -> None:
    """Undo `_make`, however far it came.  Raises `StorageFailed`."""
    try:
        if not directory:
            with open(RESOLV_CONF, "w", encoding="ascii"):
                pass
        elif os.path.isdir(directory):
            namespaces.release(directory)
            os.rmdir(directory)
    except OSError as error:
        raise StorageFailed(f"{directory} could not be removed: {error}", errno=error.errno) from error
