"""Forwards that belong to a VM: they live until it, or their container, has ended, whoever asked for them.

    HeldPorts     in the process that holds the VM
    KeeperPorts   a client's view of those that a keeper holds

Rule: a forward is named by the address at which it listens; nobody else can have that.
"""

from __future__ import annotations

import abc
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from byre.errors import InvalidRequest

from .address import Address, AddressLike
from .forward import MAX_CONNECTIONS, Forward

if TYPE_CHECKING:
    from byre.bridge import Bridge


class PublishedPort(NamedTuple):
    """What connects to `host`, here, is connected to `guest` in `container` ("": the VM itself)."""

    host: Address
    guest: Address
    container: str
    connections: int = 0


class Ports(abc.ABC):
    """See the module."""

    @abc.abstractmethod
    async def publish(self, container: str, host: AddressLike, guest: AddressLike) -> Address:
        """Begin one; returns where it listens.  Raises as `Forward.start`."""

    @abc.abstractmethod
    async def unpublish(self, host: AddressLike) -> None:
        """End one.  Raises `InvalidRequest` when there is none."""

    @abc.abstractmethod
    async def published(self) -> list[PublishedPort]:
        """All of them."""


class HeldPorts(Ports):
    """See the module."""

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge
        self._forwards: dict[Address, Forward] = {}

    async def publish(self, container: str, host: AddressLike, guest: AddressLike) -> Address:
        forward = Forward(lambda: self._bridge, container, host, guest, MAX_CONNECTIONS)
        await forward.start()
        self._forwards[forward.address] = forward
        self._bridge.background(self._forget(forward))
        return forward.address

    async def _forget(self, forward: Forward) -> None:
        """When it has ended."""
        await forward.ended.wait()
        if self._forwards.get(forward.address) is forward:
            del self._forwards[forward.address]

    async def unpublish(self, host: AddressLike) -> None:
        forward = self._forwards.pop(Address.of(host), None)
        if forward is None:
            raise InvalidRequest(f"nothing is published at {host}", hint="byre port lists what is")
        await forward.close()

    async def published(self) -> list[PublishedPort]:
        return [PublishedPort(f.address, f.guest, f.container, f.connections) for f in self._forwards.values()]


class KeeperPorts(Ports):
    """See the module."""

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge

    async def publish(self, container: str, host: AddressLike, guest: AddressLike) -> Address:
        texts: dict[str, Any] = {"host": _absolute(Address.of(host)), "guest": str(Address.of(guest))}
        return Address.of((await self._bridge.call("vm.publish", container=container, **texts))["host"])

    async def unpublish(self, host: AddressLike) -> None:
        await self._bridge.call("vm.unpublish", host=_absolute(Address.of(host)))

    async def published(self) -> list[PublishedPort]:
        found = (await self._bridge.call("vm.ports"))["ports"]
        return [PublishedPort(Address.of(host), Address.of(guest), *more) for host, guest, *more in found]


def _absolute(address: Address) -> str:
    """The keeper's directory is another one."""
    return os.path.abspath(address.path) if address.path else str(address)
