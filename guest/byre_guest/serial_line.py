"""The channel over a serial line: a terminal device in raw mode, and the line protocol on it (WIRE.md, section 13).

Rule: to the server this is a channel like any other.  That the line loses bytes, that the kernel writes its
messages to it, and that it has no connections, is dealt with here: when the peer began anew, or ended, the
connection is over and the next one may begin on the same line.
"""

from __future__ import annotations

import os
import termios
from time import monotonic

from byre_proto.line import MAX_DATA, Line
from byre_proto.stuffing import FLAG

from .channels import Channel
from .loop import EPOLLIN, EPOLLOUT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .loop import Timer

#: Bits per second where none are named: what everybody's console has.
BAUD = "115200"


class LineChannel(Channel):
    """See the module's text.

    Level-triggered, unlike the others: a read may give the server nothing although more is there.
    """

    max_data = MAX_DATA
    resumable = True

    def __init__(self, fd: int) -> None:
        super().__init__(fd, fd)
        self._line = Line()
        self._timer: Timer | None = None
        self._hung_up = False

    def _mask(self) -> int:
        return EPOLLIN | (EPOLLOUT if self._room_wanted else 0)

    @property
    def room(self) -> int:  # type: ignore[override]
        return self._line.room

    @property
    def idle(self) -> bool:
        return super().idle and self._line.idle

    def read(self, lacking: int = 0) -> memoryview | None:
        if self._line.over:
            return memoryview(b"")
        raw = super().read()
        if not raw:
            self._hung_up = raw is not None
            return raw
        self._line.receive_data(raw, monotonic())
        data = self._line.take_data()
        if self._line.over:
            self.readable = True  # the end is still to be read
        return memoryview(data) if data or self._line.over else None

    def write(self, buffers: list[bytes] | list[memoryview]) -> None:
        self._line.send(b"".join(buffers))

    def flush(self) -> bool:
        while self._flush_raw():
            raw = self._line.data_to_send(monotonic())
            if not raw:
                self._set_timer()
                return self._line.room > 0
            self._out.append(raw)
        return False

    def _flush_raw(self) -> bool:
        try:
            return super().flush()
        except OSError:
            self._hung_up = True
            raise

    def _set_timer(self) -> None:
        """Be woken no later than the line asks for; an earlier wake-up does no harm."""
        when = self._line.next_timeout
        if when is None or self._loop is None or (self._timer is not None and self._timer.when <= when):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(when - monotonic(), self._on_time)

    def _on_time(self) -> None:
        self._timer = None
        self._line.on_time(monotonic())  # the end of this round flushes

    def forget(self) -> None:
        super().forget()
        self._line = Line()

    def renew(self) -> bool:
        if not self._hung_up:
            self.forget()
        return not self._hung_up

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().close()


def open_tty(path: str, baud: str = "") -> LineChannel:
    """A terminal device as a channel, whatever it was set to; `baud` "": BAUD.

    Raises OSError, and ValueError for a speed that terminals do not have.
    """
    speed = getattr(termios, f"B{baud or BAUD}", None)
    if speed is None:
        raise ValueError(f"a serial line has no {baud} bits per second")
    fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        make_raw(fd, speed)
    except termios.error as error:
        os.close(fd)
        raise OSError(error.args[0], f"{error.args[1]}: not a terminal device", path) from None
    return LineChannel(fd)


def make_raw(fd: int, speed: int) -> None:
    """Eight bits, nothing translated, no signal, no echo, no flow control, and no modem that could hang up.

    But in "lines", which end with the flag of a frame: so the driver wakes the agent for each frame, not for the
    few bytes of each interrupt, which doubles what an emulated guest can take in.  See termios(3), ICANON, VEOL.
    """
    attributes = termios.tcgetattr(fd)
    control = termios.CS8 | termios.CREAD | termios.CLOCAL
    attributes[:6] = [termios.IGNBRK, 0, control, termios.ICANON, speed, speed]
    characters = attributes[6]
    characters[:] = [b"\0"] * len(characters)  # none
    characters[termios.VEOL] = FLAG
    termios.tcsetattr(fd, termios.TCSANOW, attributes)
    termios.tcflush(fd, termios.TCIFLUSH)  # typed before, and in the other mode
