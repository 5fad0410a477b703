"""`socket.*`: connections to sockets of the VM and of its containers, and listeners for those that come from there.

    connect   the agent connects there, for a connection of the host's side       (`addresses`: where there is)
    listen    what connects there waits until the host accepts it
    accept    one connection, now or later; the host asks for each, so the guest has no more than were asked for
    close     no more of them

Rule: nothing here blocks (B47).  A connection that stands is two pumps (`connections`), with the credit and the
ends of any stream.  A listener ends with its container, and with the connection to the host.
"""

from __future__ import annotations

import _socket
import errno
import os

from byre_proto.errors import ByreError, InvalidRequest, ResourceExhausted, SocketFailed

from . import addresses, children
from .addresses import Address
from .connections import Connection, reset_at_close
from .errands import TIMEOUT, Errand, Errands
from .loop import EPOLLET, EPOLLIN, EPOLLOUT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .processes import Process
    from .server import Call, Server

#: Connections at once: two streams and two descriptors each, of 4,096 that there are of both.
MAX_CONNECTIONS = 1024

#: Listeners at once, of the VM and all of its containers.
MAX_LISTENERS = 128


class Sockets:
    """The listeners and connections of one agent, and the handlers of `socket.*`."""

    def __init__(self, server: Server) -> None:
        self.loop = server.loop
        self._server = server
        self._connections: set[Connection] = set()
        self._listeners: dict[int, Listener] = {}
        self._last = 0
        self._errands = Errands(server)

    def handle(self, call: Call, arguments: dict[str, Any], init: Process | None = None) -> None:
        """One of them; `init` is the first process of the container that it is about."""
        handlers = {"connect": self._connect, "listen": self._listen, "accept": self._accept, "close": self._close}
        handlers[call.method.partition(".")[2]](call, arguments, init)

    def container_ended(self, container: str) -> None:
        """Nobody can connect to its listeners any more."""
        for listener in [one for one in self._listeners.values() if one.container == container]:
            self._drop(listener, "its container has ended")

    def disconnected(self) -> None:
        """The host has gone; its connections went with its streams."""
        for listener in list(self._listeners.values()):
            self._drop(listener, "the host has gone")

    # -- connections ---------------------------------------------------------------------------------------

    def _connect(self, call: Call, arguments: dict[str, Any], init: Process | None) -> None:
        address = Address(arguments)
        self._check_room()
        if address.path:
            errand = Errand(
                call,
                init,
                lambda root, sock: addresses.connect_path(root, sock, address),
                lambda sock, _: self._carry(call, arguments, sock),
            )
            self._errands.send_out(arguments["container"], errand)
            call.on_cancel = errand.cancel
            return
        if not address.port:
            raise InvalidRequest("a connection needs a port", field="port")
        sock = addresses.make_socket(address.family, init)
        _Connecting(self.loop, call, address, sock, lambda: self._carry(call, arguments, sock))

    def _check_room(self) -> None:
        if len(self._connections) >= MAX_CONNECTIONS:
            raise ResourceExhausted(f"{MAX_CONNECTIONS} connections are open", hint="close some of them")

    def _carry(self, call: Call, arguments: dict[str, Any], sock: _socket.socket) -> None:
        """Answer with a connected socket, on the streams that the request names; without streams it was a try."""
        pumps = self._server.processes.pumps
        if call.answered or pumps is None or not (arguments["stdin"] or arguments["stdout"]):
            sock.close()
            call.reply({})
            return
        try:
            self._check_room()
            stdin, stdout = arguments["stdin"], arguments["stdout"]
            self._connections.add(Connection(pumps, sock, stdin, stdout, self._connections.discard))
        except (ByreError, OSError) as error:
            reset_at_close(sock)
            sock.close()
            call.fail(error if isinstance(error, ByreError) else addresses.exhausted(error))
        else:
            call.reply({})

    # -- listeners -----------------------------------------------------------------------------------------

    def _listen(self, call: Call, arguments: dict[str, Any], init: Process | None) -> None:
        address = Address(arguments)
        if len(self._listeners) >= MAX_LISTENERS:
            raise ResourceExhausted(f"there are {MAX_LISTENERS} listeners", hint="close some of them")
        if not address.path:
            sock = addresses.listen(address, init)
            self._listens(call, arguments, sock, sock.getsockname()[1], lambda: None)
            return
        mode = arguments["mode"]

        def bound(sock: _socket.socket, identity: Any) -> None:
            self._listens(call, arguments, sock, 0, lambda: self._remove(address, identity, init))

        errand = Errand(call, init, lambda root, sock: addresses.bind_path(root, sock, address, mode), bound)
        self._errands.send_out(arguments["container"], errand)

    def _listens(
        self, call: Call, arguments: dict[str, Any], sock: _socket.socket, port: int, remove: Callable[[], object]
    ) -> None:
        if call.answered:  # it was given up, or its host has gone
            sock.close()
            remove()
            return
        self._last += 1
        self._listeners[self._last] = Listener(self.loop, self._last, sock, arguments["container"], remove)
        call.reply({"listener": self._last, "port": port})

    def _accept(self, call: Call, arguments: dict[str, Any], _init: Process | None) -> None:
        if not arguments["stdin"] or not arguments["stdout"]:
            raise InvalidRequest("a connection needs two streams", field="stdin")
        listener = self._listeners.get(arguments["listener"])
        if listener is None:
            raise SocketFailed(f"there is no listener {arguments['listener']}", hint="it has ended")
        listener.accept(call, lambda sock: self._carry(call, arguments, sock))

    def _close(self, call: Call, arguments: dict[str, Any], _init: Process | None) -> None:
        """Harmless when it has ended."""
        listener = self._listeners.get(arguments["listener"])
        if listener is not None:
            self._drop(listener, "it was closed")
        call.reply({})

    def _drop(self, listener: Listener, why: str) -> None:
        del self._listeners[listener.number]
        listener.close(why)

    def _remove(self, address: Address, identity: Any, init: Process | None) -> None:
        """Remove the name of a listener that has ended, if it still is its own."""
        pidfd = -1
        try:
            pid, pidfd = addresses.pinned(init)
            children.run(
                self.loop,
                self._server.reaper,
                lambda: addresses.remove_path(addresses.root_of(pid, pidfd), address, identity),
                TIMEOUT,
                lambda _result, _error: None,
                keep=[pidfd] if pidfd >= 0 else [],
            )
        except ByreError:
            pass  # the container has ended; or there are no more descriptors, and a name stays that leads nowhere
        finally:
            if pidfd >= 0:
                os.close(pidfd)


class _Connecting:
    """A TCP connect under way; `done()` follows when it stands, the call's error when it does not."""

    def __init__(
        self, loop: Any, call: Call, address: Address, sock: _socket.socket, done: Callable[[], object]
    ) -> None:
        self._loop = loop
        self._call = call
        self._address = address
        self._sock = sock
        self._done = done
        number = sock.connect_ex((address.host, address.port))
        if number not in (0, errno.EINPROGRESS):
            sock.close()
            raise addresses.failure(number, address)
        call.on_cancel = self._give_up
        loop.add(sock.fileno(), EPOLLOUT, lambda _mask: self._ready())

    def _ready(self) -> None:
        self._loop.remove(self._sock.fileno())
        number = addresses.connect_error(self._sock)
        if number:
            self._sock.close()
            self._call.fail(addresses.failure(number, self._address))
        else:
            self._done()

    def _give_up(self, error: ByreError) -> None:
        self._loop.remove(self._sock.fileno())
        self._sock.close()
        self._call.fail(error)


class Listener:
    """A listening socket, and the calls that wait for its connections."""

    def __init__(
        self, loop: Any, number: int, sock: _socket.socket, container: str, remove: Callable[[], object]
    ) -> None:
        self.number = number
        self.container = container
        self._loop = loop
        self._sock = sock
        self._remove = remove
        self._waiting: list[tuple[Call, Callable[[_socket.socket], object]]] = []
        sock.setblocking(False)
        loop.add(sock.fileno(), EPOLLIN | EPOLLET, lambda _mask: self._ready())

    def accept(self, call: Call, then: Callable[[_socket.socket], object]) -> None:
        """Call `then` with the next connection, now or later."""
        waiting = (call, then)

        def give_up(error: ByreError) -> None:
            self._waiting.remove(waiting)
            call.fail(error)

        self._waiting.append(waiting)
        call.on_cancel = give_up
        self._ready()

    def _ready(self) -> None:
        while self._waiting:
            try:
                fd, _ = self._sock._accept()  # type: ignore[attr-defined]
            except BlockingIOError:
                return
            except ConnectionAbortedError:
                continue
            except OSError as error:  # no more descriptors, no memory
                call, _ = self._waiting.pop(0)
                call.fail(addresses.exhausted(error))
                return
            _, then = self._waiting.pop(0)
            then(_socket.socket(fileno=fd))

    def close(self, why: str) -> None:
        """No more connections; those that stand go on."""
        self._loop.remove(self._sock.fileno())
        self._sock.close()
        waiting, self._waiting = self._waiting, []
        for call, _ in waiting:
            call.fail(SocketFailed(f"the listener has ended: {why}"))
        self._remove()
