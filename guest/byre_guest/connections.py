"""One connected socket between two streams of the host: `stdin` leads into the socket, `stdout` out of it.

    host        socket                              socket                      host
    EOF    ->   shutdown(SHUT_WR)                   end, in good order     ->   EOF
    RESET  ->   reset, in both directions           an error               ->   RESET, and STOP of the other way
    STOP   ->   shutdown(SHUT_RD), no more reads    nobody reads any more  ->   STOP

Rule: only an end that the kernel tells in good order is an EOF: what was cut off must not look complete.  (The
close of a UNIX socket has no other form; there only bytes that its peer left unread make it an error.)
"""

from __future__ import annotations

import _socket
import errno
import struct

from .inputs import ToPipe
from .loop import EPOLLERR, EPOLLHUP
from .pumps import FromPipe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .pumps import Pumps

#: struct linger: closing throws away what is not sent, and resets a TCP connection (socket(7)).
_LINGER_NOT = struct.pack("ii", 1, 0)


class Connection:
    """See the module's text.  `on_end(self)` is called when both directions have ended and the socket is closed."""

    def __init__(
        self, pumps: Pumps, sock: _socket.socket, stdin: int, stdout: int, on_end: Callable[[Connection], object]
    ) -> None:
        """Take the socket over.  Raises `InvalidRequest`, `ResourceExhausted`, OSError: it stays the caller's."""
        if sock.family != _socket.AF_UNIX:
            sock.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)  # the host's pieces have waited already
        second = pumps.accept_pair(sock.fileno(), stdin, stdout)
        self.failed = False  # a write has taken the kernel's word of a loss, which a read will not see any more
        self._on_end = on_end
        self._open = 2
        self._into = _Into(self, pumps, second, stdin)
        self._out = _OutOf(self, pumps, sock.detach(), stdout)

    def abort(self) -> None:
        """Give up both directions; the peer's is reset.  Harmless when repeated."""
        for pump in (self._into, self._out):
            if pump.fd >= 0:
                _with_socket(pump.fd, reset_at_close)
        self._into.give_up()
        self._out.give_up()

    def ended(self) -> None:
        """One of the directions has."""
        self._open -= 1
        if not self._open:
            self._on_end(self)


class _Into(ToPipe):
    """What the host sends."""

    def __init__(self, connection: Connection, pumps: Pumps, fd: int, stream: int) -> None:
        self._connection = connection
        super().__init__(pumps, fd, stream, connection.ended)

    @property
    def fd(self) -> int:
        return self._fd

    def _on_ready(self, mask: int) -> None:
        # Both directions are shut: whatever may come, nobody will take it.
        super()._on_ready(mask | EPOLLERR if mask & EPOLLHUP else mask)

    def _finish(self) -> None:
        _shutdown(self._fd, _socket.SHUT_WR)
        self._end()

    def _broken(self, number: int | None = None) -> None:
        if number not in (None, errno.EPIPE):
            self._connection.failed = True
        super()._broken(number)

    def close(self) -> None:
        self._connection.abort()

    def give_up(self) -> None:
        super().close()


class _OutOf(FromPipe):
    """What the host gets."""

    def __init__(self, connection: Connection, pumps: Pumps, fd: int, stream: int) -> None:
        self._connection = connection
        super().__init__(pumps, fd, stream, lambda _total: connection.ended())

    @property
    def fd(self) -> int:
        return self._fd

    def _at_end(self) -> None:
        if self._connection.failed:
            self.close()
        else:
            super()._at_end()

    def _end(self, total: int) -> None:
        if self._fd >= 0 and total < 0:
            _shutdown(self._fd, _socket.SHUT_RD)
        super()._end(total)

    def close(self) -> None:
        self._connection.abort()

    def give_up(self) -> None:
        super().close()


def reset_at_close(sock: _socket.socket) -> None:
    """When it is closed its peer is told that the connection is reset."""
    sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_LINGER, _LINGER_NOT)


def _shutdown(fd: int, how: int) -> None:
    try:
        _with_socket(fd, lambda sock: sock.shutdown(how))
    except OSError:
        pass  # the connection is gone already


def _with_socket(fd: int, act: Callable[[_socket.socket], object]) -> None:
    sock = _socket.socket(fileno=fd)
    try:
        act(sock)
    finally:
        sock.detach()
