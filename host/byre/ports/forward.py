"""`Forward` and `Exposure`: what connects at one side of the bridge is connected to one socket at the other.

    Forward    this host listens, the guest connects       `-p`, `vm.forward`, `container.forward`
    Exposure   the guest listens, this host connects       `vm.expose`, `container.expose`

Rule: the one target was named by this program's user; nothing that comes over the bridge chooses another.  No more
than `max_connections` at once, and each wait of one has an end.  Both end with their container, or the VM: what was
on its way is delivered (for DRAIN_TIMEOUT), then everything is closed.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from byre.errors import (
    AddressInUse,
    ByreError,
    ContainerNotReady,
    InvalidRequest,
    PermissionRefused,
    ResourceExhausted,
    SocketFailed,
)

from .address import Address, AddressLike
from .connection import CONNECT_TIMEOUT, Connection, accept, connect
from .splice import Local, splice

if TYPE_CHECKING:
    from byre.bridge import Bridge

_log = logging.getLogger(__name__)

#: Connections of one forward at once: a few MiB of buffers at most, and a quarter of what an agent carries.
MAX_CONNECTIONS = 256

#: Connections that the kernel keeps until we take them.
BACKLOG = 256

#: Accepts that wait in the guest at once: the next connections need not wait for our answer to the last.
ACCEPTS = 4

#: After a refusal for want of something (descriptors, memory), in seconds.
ACCEPT_PAUSE = 1.0

#: For connections to end by themselves when their container has ended, in seconds: their server has gone, so what
#: is left is on its way to a client that may be slow.
DRAIN_TIMEOUT = 5.0


class Port(abc.ABC):
    """What both have in common.  An async context manager; or `start`, and later `close`."""

    def __init__(
        self, bridge: Callable[[], Bridge], container: str, host: AddressLike, guest: AddressLike, limit: int
    ) -> None:
        if limit < 1:
            raise InvalidRequest(f"max_connections must be above 0, not {limit}")
        self.host = Address.of(host)
        self.guest = Address.of(guest)
        self.container = container
        self.max_connections = limit
        self.refused = 0  # connections for which there was no other end
        self.ended = asyncio.Event()
        self._get_bridge = bridge
        self._bridge: Bridge
        self._tasks: set[asyncio.Task[None]] = set()
        self._watch: asyncio.Task[None] | None = None

    @property
    @abc.abstractmethod
    def address(self) -> Address:
        """Where it listens; a port that was 0 is the one that the kernel chose."""

    @property
    def port(self) -> int:
        """Of `address`; 0 for a UNIX socket."""
        return self.address.port

    @property
    def connections(self) -> int:
        """How many there are now."""
        return len(self._tasks)

    async def start(self) -> None:
        """Listen.  Raises `AddressInUse`, `PermissionRefused`, `ContainerNotFound`, `ContainerNotReady`, ..."""
        if self._watch is not None or self.ended.is_set():
            raise InvalidRequest(f"{self!r} starts once", hint="make another one")
        self._bridge = self._get_bridge()
        if self.container:
            state = (await self._bridge.call("container.state", container=self.container))["state"]
            if state.get("exit") is not None:
                raise ContainerNotReady(f"the container {self.container} has ended", container=self.container)
        await self._listen()
        self._watch = self._bridge.background(self._follow())

    async def close(self, patience: float = 0) -> None:
        """Listen no more; what lasts longer than `patience` seconds is reset.  Harmless when repeated."""
        if self._watch is not None:
            self._watch.cancel()
            await self._finish(patience)

    async def _follow(self) -> None:
        """Until its container, or the VM, has ended."""
        with contextlib.suppress(ByreError):
            if self.container:
                await self._bridge.call("container.wait", timeout=None, container=self.container)
            else:
                await self._bridge.wait_lost()
        await self._finish(DRAIN_TIMEOUT)

    async def _finish(self, patience: float) -> None:
        await self._unlisten()
        if self._tasks and patience:
            await asyncio.wait(self._tasks, timeout=patience)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.ended.set()

    @abc.abstractmethod
    async def _listen(self) -> None: ...

    @abc.abstractmethod
    async def _unlisten(self) -> None:
        """Harmless when repeated."""

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _refuse(self, end: Local | Connection, why: object) -> None:
        """Its client sees a reset."""
        self.refused += 1
        if not self.refused & self.refused - 1:  # a guest that tries for ever fills no log
            _log.warning("! %r: a connection was refused, %d in all: %s", self, self.refused, why)
        end.abort()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class Forward(Port):
    """Host to guest.  See the module."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._server: asyncio.Server | None = None
        self._address = self.host
        self._made: tuple[int, int] | None = None  # device and inode of our socket's name

    @property
    def address(self) -> Address:
        return self._address

    async def _listen(self) -> None:
        sock = await _bound(self.host)
        try:
            if self.host.path:
                os.chmod(self.host.path, 0o600)  # before it listens: nobody can have connected
                status = os.stat(self.host.path, follow_symlinks=False)
                self._made = status.st_dev, status.st_ino
                self._server = await asyncio.start_unix_server(self._connected, sock=sock, backlog=BACKLOG)
            else:
                self._address = Address(self.host.host, sock.getsockname()[1])
                self._server = await asyncio.start_server(self._connected, sock=sock, backlog=BACKLOG)
        except BaseException:
            sock.close()
            raise

    async def _unlisten(self) -> None:
        if self._server is None:
            return
        self._server.close()
        self._server = None
        if self._made is not None:
            with contextlib.suppress(OSError):
                status = os.stat(self.host.path, follow_symlinks=False)
                if (status.st_dev, status.st_ino) == self._made:
                    os.unlink(self.host.path)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        near = Local(reader, writer)
        if len(self._tasks) >= self.max_connections:
            self._refuse(near, f"there are {self.max_connections} already (max_connections)")
        elif self._server is None:
            near.abort()
        else:
            self._spawn(self._serve(near))

    async def _serve(self, near: Local) -> None:
        try:
            far = await connect(self._bridge, self.container, self.guest, CONNECT_TIMEOUT)
        except ByreError as error:
            self._refuse(near, error)
            return
        except BaseException:
            near.abort()
            raise
        await splice(near, far)

    def __repr__(self) -> str:
        return f"<Forward {self.address} -> {self.container or 'VM'} {self.guest}>"


class Exposure(Port):
    """Guest to host.  See the module."""

    def __init__(self, *arguments: Any, mode: int = 0o666) -> None:
        super().__init__(*arguments)
        self._mode = mode
        self._listener = 0
        self._address = self.guest
        self._room = asyncio.Semaphore(self.max_connections)
        self._accepting: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> Address:
        return self._address

    async def _listen(self) -> None:
        async def undo(result: dict[str, Any]) -> None:
            await self._bridge.call("socket.close", listener=result["listener"])

        where = {"container": self.container, "mode": self._mode, **self.guest.request}
        found = await self._bridge.call("socket.listen", undo=undo, **where)
        self._listener = found["listener"]
        if not self.guest.path:
            self._address = Address(self.guest.host, found["port"])
        self._accepting = {self._bridge.background(self._accept()) for _ in range(ACCEPTS)}

    async def _unlisten(self) -> None:
        listener, self._listener = self._listener, 0
        if listener:
            with contextlib.suppress(ByreError):  # it has ended with its container, or with the VM
                await self._bridge.call("socket.close", listener=listener)
        for task in self._accepting:  # those that wait for room, not for the guest
            task.cancel()

    async def _accept(self) -> None:
        """Take connections, one after the other, while there is room for them."""
        while True:
            await self._room.acquire()
            try:
                far = await accept(self._bridge, self._listener)
            except ResourceExhausted as error:
                self._room.release()
                _log.warning("! %r: %s", self, error)
                await asyncio.sleep(ACCEPT_PAUSE)
            except ByreError:
                return  # it listens no more
            else:
                self._spawn(self._serve(far)).add_done_callback(lambda _: self._room.release())

    async def _serve(self, far: Connection) -> None:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                near = Local(*await _open(self.host))
        except OSError as error:  # TimeoutError is one
            self._refuse(far, f"{self.host}: {error}")
            return
        except BaseException:
            far.abort()
            raise
        await splice(near, far)

    def __repr__(self) -> str:
        return f"<Exposure {self.container or 'VM'} {self.address} -> {self.host}>"


async def _open(address: Address) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if address.path:
        return await asyncio.open_unix_connection(address.path)
    return await asyncio.open_connection(address.host, address.port)


async def _bound(address: Address) -> socket.socket:
    """A bound socket that does not listen yet.  Raises `AddressInUse`, `PermissionRefused`, `SocketFailed`."""
    data = {"address": str(address)}
    try:
        if address.path:
            family, where = socket.AF_UNIX, address.path
        else:
            loop = asyncio.get_running_loop()
            found = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
            family, where = found[0][0], found[0][4]  # type: ignore[assignment]
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            if not address.path:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(where)
        except BaseException:
            sock.close()
            raise
        return sock
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            hint = "remove it if nobody listens there" if address.path else "take another port; 0 is a free one"
            raise AddressInUse(f"{address}: is in use on this host", hint=hint, **data) from error
        if error.errno in (errno.EACCES, errno.EPERM):
            hint = "" if address.path else "ports below 1024 are root's: take another one"
            raise PermissionRefused(f"{address}: {error.strerror}", hint=hint, **data) from error
        raise SocketFailed(f"{address}: {error.strerror or error}", errno=error.errno, **data) from error
