"""`SerialHost`: an agent at the far end of a serial line, on a machine that byre did not boot.

    board:  python3 -m byre_guest --serial /dev/ttyS0        (or as init, with byre.channel=serial:ttyS0)
    here:   async with SerialHost("/dev/ttyUSB0") as board: await board.run(["uname", "-a"])

Rule: the agent is not ours: it goes on after us, and takes the next one.  Its processes go on as well.  A silent
line is waited for; a port that goes away is opened again, and what was under way goes on.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from .bridge import Bridge
from .errors import ConnectionLost, MachineFailed, TransportUnavailable
from .line_channel import LineChannel
from .machines.console import ConsoleRing
from .process import GuestProcessHost
from .transports.serial import BAUDRATE, SerialPort, open_port

if TYPE_CHECKING:
    import socket
    from types import TracebackType

#: How long the agent may take to answer, in seconds: it asks every two, and a bad line loses some of that.
START_TIMEOUT = 30.0


class SerialHost(GuestProcessHost):
    """A `ProcessHost` behind a device ("/dev/ttyUSB0") or a URL of pyserial's.  An async context manager.

    `settings` are pyserial's ("rtscts", "stopbits", ...); the agent's end must have the same.
    """

    def __init__(
        self, url: str, baudrate: int = BAUDRATE, *, start_timeout: float = START_TIMEOUT, **settings: Any
    ) -> None:
        self.url = url
        self._baudrate = baudrate
        self._settings = settings
        self._start_timeout = start_timeout
        self._console = ConsoleRing()
        self._port: SerialPort | None = None
        self._bridge: Bridge | None = None

    @property
    def bridge(self) -> Bridge:
        if self._bridge is None:
            raise ConnectionLost("the line is not open", hint="use: async with SerialHost(url) as host")
        return self._bridge

    async def start(self) -> None:
        """Open the port and find the agent.  After an error or a cancellation the port is closed.

        Raises `TransportUnavailable`, `InvalidRequest`, `DeadlineExceeded` when no agent answers.
        """
        if self._bridge is not None:
            raise MachineFailed("a SerialHost starts once", hint="make another one")
        self._port = await open_port(self.url, self._baudrate, **self._settings)
        channel = partial(LineChannel, noise=self._console.feed)
        self._bridge = Bridge(self._port.socket, label=self.url, channel=channel, redial=self._open_again)
        try:
            await self._bridge.open(self._start_timeout)
        except BaseException:
            await asyncio.shield(self.close())
            raise

    async def _open_again(self) -> socket.socket:
        assert self._port is not None, "it was open"
        await self._port.close()
        try:
            self._port = await open_port(self.url, self._baudrate, **self._settings)
        except TransportUnavailable as error:  # not there now: unplugged, perhaps
            raise OSError(error.message) from error
        return self._port.socket

    def console_tail(self, lines: int = 40) -> str:
        """The last lines of what else was on the line, escaped: a kernel's messages."""
        return self._console.tail(lines)

    async def close(self) -> None:
        """Let the line go.  Harmless when repeated (B51)."""
        if self._bridge is not None:
            await self._bridge.close("the SerialHost was closed")
        if self._port is not None:
            await self._port.close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
