"""Where a socket listens: an IP address with a port, or a path."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, TypeAlias

from byre.errors import InvalidRequest

#: Where ports are when nobody says: closed to everybody else.
LOOPBACK = "127.0.0.1"

#: What stands for an address: 80, "80", "127.0.0.1:80", "[::1]:80", ("127.0.0.1", 80), "/run/x.sock", a Path.
AddressLike: TypeAlias = "Address | int | str | tuple[str, int] | os.PathLike[str]"


@dataclass(frozen=True, slots=True)
class Address:
    """`path` of a UNIX socket, or `host` and `port` of TCP; port 0 is one that the kernel chooses."""

    host: str = ""
    port: int = 0
    path: str = ""

    @classmethod
    def of(cls, value: AddressLike) -> Address:
        """Raises `InvalidRequest`.  A port without a host is one of 127.0.0.1."""
        if isinstance(value, Address):
            return value
        if isinstance(value, bool) or value is None:
            raise _not_an_address(value)
        if isinstance(value, int):
            return cls._tcp("", value, value)
        if isinstance(value, tuple):
            return cls._tcp(value[0], value[1], value)
        if isinstance(value, os.PathLike):
            return cls(path=os.fspath(value))
        if "/" in value:
            return cls(path=value.removeprefix("unix:"))
        host, _, port = value.rpartition(":")
        if not (port.isascii() and port.isdecimal()):
            raise _not_an_address(value)
        return cls._tcp(host.removeprefix("[").removesuffix("]"), int(port), value)

    @classmethod
    def _tcp(cls, host: str, port: int, value: Any) -> Address:
        if not 0 <= port < 1 << 16:
            raise _not_an_address(value)
        return cls(host=host or LOOPBACK, port=port)

    @property
    def request(self) -> dict[str, Any]:
        """As the wire's requests have it: there are no names in a guest, but the one."""
        if self.path:
            return {"path": self.path}
        return {"host": LOOPBACK if self.host == "localhost" else self.host, "port": self.port}

    def __str__(self) -> str:
        return self.path or (f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}")


def _not_an_address(value: object) -> InvalidRequest:
    return InvalidRequest(
        f"{value!r} is not an address", hint='give a port, "HOST:PORT", or the path of a UNIX socket'
    )
