"""Which frames of a guest pass.

ARP and IPv4 do, but for what is this host's own: slirp connects from here, so for it 127.0.0.1 is this host's
loopback (and 0.0.0.0 as well), and an address of this host leads to what listens here.  Link-local addresses are
not a guest's either: clouds serve this host's credentials there.  A service of this host is given by `expose`.

Who is refused is told so, as by a router that filters: a connect fails at once and does not wait for its timeout.

Rule: what is not known to be harmless does not pass.  Every fragment names its destination, so each is judged by
itself.
Source: RFC 791, RFC 792, RFC 826, RFC 1122 (3.2.1.3), RFC 1812 (5.2.7.1), RFC 3927; libslirp's socket.c.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
import time
from typing import Final

#: A guest's addresses and slirp's, as slirp4netns(1) has them.
ADDRESS: Final = "10.0.2.100/24"
GATEWAY: Final = "10.0.2.2"
NAMESERVER: Final = "10.0.2.3"

#: No destination of a guest's: this host, loopback, link-local; multicast, broadcast and what is reserved.
_REFUSED = tuple(map(ipaddress.IPv4Network, ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3")))

_ARP = b"\x08\x06"
_IPV4 = b"\x08\x00"
_ETHERNET = 14
_UNICAST = 224  # is below
_SHORTEST = 20  # of an IPv4 header
_FRAGMENT = 0x3FFF  # more fragments follow, or this is not the first
_ICMP = 1
_TCP_AND_UDP = (6, 17)
_DNS = (53).to_bytes(2, "big")

#: For so long an address is taken for this host's, or not, in seconds; and for so many at once.
_REMEMBERED = 1.0
_MAX_REMEMBERED = 4096

_NAMESERVER = socket.inet_aton(NAMESERVER)
_GATEWAY = socket.inet_aton(GATEWAY)


class Filter:
    """See the module.  One for each network."""

    def __init__(self) -> None:
        self._known: dict[bytes, tuple[float, bool]] = {}

    def passes(self, frame: bytes) -> bool:
        """Whether a frame of the guest may go to slirp."""
        kind, packet = frame[_ETHERNET - 2 : _ETHERNET], frame[_ETHERNET:]
        if kind == _ARP:
            return True
        if kind != _IPV4 or len(packet) < _SHORTEST or packet[0] >> 4 != 4:
            return False
        target = packet[16:20]
        if target == _NAMESERVER:
            return _is_question(packet)
        if target == _GATEWAY:  # which answers to a ping; for slirp the rest of it is this host
            return packet[9] == _ICMP
        return self._may_reach(target)

    def _may_reach(self, target: bytes) -> bool:
        now = time.monotonic()
        when, verdict = self._known.get(target, (-_REMEMBERED, False))
        if now - when >= _REMEMBERED:
            address = ipaddress.IPv4Address(target)
            verdict = not any(address in network for network in _REFUSED) and not is_ours(str(address))
            if len(self._known) >= _MAX_REMEMBERED:
                self._known.clear()
            self._known[target] = now, verdict
        return verdict


def _is_question(packet: bytes) -> bool:
    """To the name server, which is one of this host's, perhaps at its loopback: only to its port."""
    start = 4 * (packet[0] & 0x0F)
    if start < _SHORTEST or packet[9] not in _TCP_AND_UDP or int.from_bytes(packet[6:8], "big") & _FRAGMENT:
        return False
    return packet[start + 2 : start + 4] == _DNS


def refusal(frame: bytes) -> bytes:
    """What tells a frame's sender that it did not pass; empty where nobody waits for an answer."""
    packet = frame[_ETHERNET:]
    start = 4 * (packet[0] & 0x0F) if packet else 0
    if frame[_ETHERNET - 2 : _ETHERNET] != _IPV4 or not _SHORTEST <= start <= len(packet) - 8:
        return b""
    if packet[9] not in _TCP_AND_UDP or packet[16] >= _UNICAST or int.from_bytes(packet[6:8], "big") & 0x1FFF:
        return b""
    # Destination unreachable: communication administratively prohibited.
    icmp = _with_checksum(b"\x03\x0d" + bytes(6) + packet[: start + 8], 2)
    length = (_SHORTEST + len(icmp)).to_bytes(2, "big")
    header = b"\x45\0" + length + bytes(4) + b"\x40\x01\0\0" + _GATEWAY + packet[12:16]
    return frame[6:12] + frame[:6] + _IPV4 + _with_checksum(header, 10) + icmp


def _with_checksum(data: bytes, at: int) -> bytes:
    """With the Internet checksum (RFC 1071) of an even number of bytes in the two, zero, at `at`."""
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return data[:at] + (~total & 0xFFFF).to_bytes(2, "big") + data[at + 2 :]


def is_ours(address: str) -> bool:
    """Whether it is one of this host's own addresses: then, and only then, a socket can be bound to it (ip(7))."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.bind((address, 0))
        except OSError as error:
            return error.errno != errno.EADDRNOTAVAIL
    return True
