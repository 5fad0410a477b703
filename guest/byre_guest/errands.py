"""What is done about the path of a UNIX socket in helper children (`children`), a few at a time for each container.

Rule: a path may lead to a file system that does not answer, and a listener may keep a connect waiting: that holds
errands of its own container, for their deadlines, and nothing else (B47).
"""

from __future__ import annotations

import _socket
import os

from byre_proto.deques import deque
from byre_proto.errors import ByreError

from . import addresses, children

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .processes import Process
    from .server import Call, Server

#: Children at once for one container: each is a fork of the agent.
MAX_ERRANDS = 8

#: Deadline of an errand for a call that has none, in seconds.
TIMEOUT = 30.0


class Errands:
    """Those under way and those that wait, by container."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._by_container: dict[str, tuple[set[Errand], deque[Errand]]] = {}

    def send_out(self, container: str, errand: Errand) -> None:
        """Begin it, now or after one of those that are under way for the same container."""
        under_way, waiting = self._by_container.setdefault(container, (set(), deque()))
        if len(under_way) >= MAX_ERRANDS:
            waiting.append(errand)
            return

        def back() -> None:
            under_way.discard(errand)
            if waiting:
                following = waiting.popleft()
                self._server.loop.call_soon(lambda: self.send_out(container, following))
            elif not under_way:
                self._by_container.pop(container, None)

        under_way.add(errand)
        errand.begin(self._server, back)


class Errand:
    """What a child does on a new UNIX socket: `work(root, socket)`; `done(socket, result)`, or the call's error."""

    def __init__(
        self,
        call: Call,
        init: Process | None,
        work: Callable[[int, _socket.socket], object],
        done: Callable[[_socket.socket, Any], object],
    ) -> None:
        self._call = call
        self._init = init
        self._work = work
        self._done = done
        self._child: children.Child | None = None

    def begin(self, server: Server, back: Callable[[], object]) -> None:
        """Send the child; `back()` follows, whatever comes of it."""
        if self._call.answered:  # given up while it waited
            back()
            return
        try:
            self._send(server, back)
        except ByreError as error:
            self._call.fail(error)
            back()

    def _send(self, server: Server, back: Callable[[], object]) -> None:
        pid, pidfd = addresses.pinned(self._init)
        try:
            ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
        except OSError as error:
            if pidfd >= 0:
                os.close(pidfd)
            raise addresses.exhausted(error) from error

        def in_child() -> object:
            sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
            result = self._work(addresses.root_of(pid, pidfd), sock)
            addresses.pass_descriptor(theirs, sock.fileno())
            return result

        def ended(result: Any, error: ByreError | None) -> None:
            try:
                if error is None:
                    self._done(addresses.passed_socket(ours), result)
                else:
                    self._call.fail(error)
            except ByreError as failure:
                self._call.fail(failure)
            finally:
                ours.close()
                back()

        keep = [theirs.fileno(), *([pidfd] if pidfd >= 0 else [])]
        timeout = TIMEOUT if self._call.timeout is None else self._call.timeout
        self._child = children.run(server.loop, server.reaper, in_child, timeout, ended, keep=keep)
        theirs.close()
        if pidfd >= 0:
            os.close(pidfd)

    def cancel(self, error: ByreError) -> None:
        """Nobody waits for it any more."""
        if self._child is not None:
            self._child.cancel()
        self._call.fail(error)
