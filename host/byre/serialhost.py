"""`SerialHost`: an agent at the far end of a serial line, on a machine that byre did not boot.

    board:  python3 -m byre_guest --serial /dev/ttyS0        (or as init, with byre.channel=serial:ttyS0)
    here:   async with SerialHost("/dev/ttyUSB0") as board: await board.run(["uname", "-a"])

Rule: the agent is not ours: it goes on after us, and takes the next one.  Its processes go on as well.  A silent
line is waited for; a port that goes away is opened again, and what was under way goes on.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from .agenthost import START_TIMEOUT, AgentHost
from .bridge import Bridge
from .errors import TransportUnavailable
from .line_channel import LineChannel
from .machines.console import ConsoleRing
from .transports.serial import BAUDRATE, SerialPort, open_port

if TYPE_CHECKING:
    import socket


class SerialHost(AgentHost):
    """A `ProcessHost` behind a device ("/dev/ttyUSB0") or a URL of pyserial's.  An async context manager.

    `settings` are pyserial's ("rtscts", "stopbits", ...); the agent's end must have the same.
    """

    def __init__(
        self, url: str, baudrate: int = BAUDRATE, *, start_timeout: float = START_TIMEOUT, **settings: Any
    ) -> None:
        super().__init__(start_timeout)
        self.url = url
        self._baudrate = baudrate
        self._settings = settings
        self._console = ConsoleRing()
        self._port: SerialPort | None = None

    async def _reach(self) -> Bridge:
        """Open the port.  Raises `TransportUnavailable`, `InvalidRequest`."""
        self._port = await open_port(self.url, self._baudrate, **self._settings)
        channel = partial(LineChannel, noise=self._console.feed)
        return Bridge(self._port.socket, label=self.url, channel=channel, redial=self._open_again)

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
        await super().close()
        if self._port is not None:
            await self._port.close()
