"""`Connection`: one connection to a socket in a guest, as a reader and a writer of asyncio.

    reader, writer = await vm.connect(80)
    writer.write(b"..."); writer.write_eof()      half-close: the other direction goes on
    await reader.read()
    writer.close()                                both

Rule: only an end in good order is an EOF.  What was cut off raises: `StreamReset` in the reader, BrokenPipeError in
the writer, ConnectionLost when the VM is gone.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from byre.streams import BridgeReader, StreamTransport, open_reader, open_writer

if TYPE_CHECKING:
    from byre.bridge import Bridge

    from .address import Address

#: For a connection to stand, in seconds: long enough for a loaded guest, short enough for somebody who waits.
CONNECT_TIMEOUT = 30.0


class Connection:
    """See the module.  An async context manager; unpacks into its reader and its writer."""

    def __init__(self, bridge: Bridge) -> None:
        stdin, self.writer, transport = open_writer(bridge, kind=_Transport)
        try:
            stdout, self.reader = open_reader(bridge)
        except BaseException:
            transport.abort()
            raise
        assert isinstance(transport, _Transport)
        transport.reader = self.reader
        self._transport = transport
        #: As the wire's requests have them.
        self.streams: dict[str, Any] = {"stdin": stdin, "stdout": stdout}

    async def open(self, bridge: Bridge, method: str, timeout: float | None, **arguments: Any) -> Self:
        """Have the guest connect (or accept) it; after an error nothing is left.

        Nor of one that nobody waits for any more and that yet stands: `abort` goes out behind the answer to it.
        """
        try:
            await bridge.call(method, timeout=timeout, **self.streams, **arguments)
        except BaseException:
            self.abort()
            raise
        return self

    def write_eof(self) -> None:
        """No more is sent; what is buffered goes first."""
        self.writer.write_eof()

    def close(self) -> None:
        """No more is sent or read; what is buffered goes first."""
        self.writer.close()

    def abort(self) -> None:
        """Give it up, in both directions: the other end sees a reset.  Harmless when repeated."""
        self._transport.abort()

    def stop_reading(self) -> None:
        """Nobody wants what may still come; sending goes on."""
        self.reader.stop()

    def __iter__(self) -> Iterator[Any]:
        yield self.reader
        yield self.writer

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """What is still buffered goes out afterwards; after an error it does not."""
        if kind is None:
            self.close()
        else:
            self.abort()

    def __repr__(self) -> str:
        return f"<Connection {'closed' if self.writer.is_closing() and self.reader.ended else 'open'}>"


class _Transport(StreamTransport):
    """The write side; as asyncio has it, closing it ends both directions."""

    reader: BridgeReader | None = None

    def write_eof(self) -> None:
        super().close()

    def close(self) -> None:
        super().close()
        self._stop_reading()

    def abort(self) -> None:
        super().abort()
        self._stop_reading()

    def _stop_reading(self) -> None:
        if self.reader is not None:
            self.reader.stop()


async def connect(bridge: Bridge, container: str, address: Address, timeout: float) -> Connection:
    """A connection to a socket there.

    Raises `ConnectionRefused`, `PathNotFound`, `ContainerNotReady`, `ResourceExhausted`, `DeadlineExceeded`, ...
    """
    return await Connection(bridge).open(bridge, "socket.connect", timeout, container=container, **address.request)


async def accept(bridge: Bridge, listener: int) -> Connection:
    """The next connection that comes to a listener of the agent."""
    return await Connection(bridge).open(bridge, "socket.accept", None, listener=listener)
