"""`-p` and `byre port`: ports of this host that lead into a container or a VM."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import socket
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from byre.ports.address import LOOPBACK, Address
from byre.ports.forward import DRAIN_TIMEOUT

from . import foreground
from .status import say

if TYPE_CHECKING:
    from byre.ports.forward import Forward
    from byre.ports.methods import Sockets
    from byre.vm import UtilityVM

_PUBLISHED = re.compile(r"(?:(?:(\[[^]]+]|[^][:]+):)?([0-9]*):)?([0-9]+)(?:/tcp)?", re.ASCII)


def published(text: str) -> tuple[Address, Address]:
    """`[[IP:]HOST:]GUEST[/tcp]` as docker has it: where to listen here (no HOST: a free port), and the target."""
    found = _PUBLISHED.fullmatch(text)
    if found is None:
        only = ": there is only tcp" if text.endswith(("/udp", "/sctp")) else ""
        raise argparse.ArgumentTypeError(f"{text!r} is not [IP:]HOST:GUEST, such as 8080:80{only}")
    ip, host, guest = (found[1] or LOOPBACK).strip("[]"), int(found[2] or 0), int(found[3])
    try:
        socket.inet_pton(socket.AF_INET6 if ":" in ip else socket.AF_INET, ip)
    except OSError:
        raise argparse.ArgumentTypeError(f"{ip!r} is not an IP address of this host") from None
    if host >= 1 << 16 or not 0 < guest < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text!r}: ports are below 65536, and inside above 0")
    return Address(ip, host), Address(LOOPBACK, guest)


@contextlib.asynccontextmanager
async def forwards(where: Sockets, arguments: argparse.Namespace) -> AsyncIterator[None]:
    """What -p says, for as long as the command runs; what was on its way when that ended is delivered."""
    started: list[Forward] = []
    patience = 0.0
    try:
        for host, guest in arguments.publish:
            forward = where.forward(host, guest)
            await forward.start()
            started.append(forward)
            tell(host, forward.address, guest)
        yield
        patience = DRAIN_TIMEOUT
    finally:
        await asyncio.gather(*(forward.close(patience) for forward in started))


async def publish(vm: UtilityVM, arguments: argparse.Namespace, container: str = "") -> None:
    """What -p says, in the care of the VM's keeper."""
    for host, guest in arguments.publish:
        tell(host, await vm.publish(host, guest, container=container), guest)


def tell(wanted: Address, address: Address, guest: Address) -> None:
    """A port that nobody could know."""
    if not wanted.port:
        say(f"port {guest.port} is {address}")


def port(arguments: argparse.Namespace) -> int:
    return foreground.run(lambda _: _port(arguments))


async def _port(arguments: argparse.Namespace) -> int:
    from byre.vm import UtilityVM

    async with await UtilityVM.attach(arguments.vm_name) as vm:
        if arguments.container:
            await (await vm.open_container(arguments.container)).close()
        for found in await vm.published():
            if not arguments.container:
                print(found.container or "-", end=" ")
            if arguments.container in ("", found.container):
                print(f"{found.guest.port}/tcp -> {found.host}")
    return 0
