"""A network card whose cable is two streams of the host: `stdin` brings Ethernet frames, `stdout` takes them away.

Before each frame are two bytes, big endian: its length.  The card is a TAP device, without a frame check sequence.

Rule: a frame is carried whole or not at all; what the card does not take now is lost, as on a cable.  A host that
breaks the rules of the stream loses the card.  Source: linux/Documentation/networking/tuntap.rst.
"""

from __future__ import annotations

import os

from byre_proto import events, limits

from .inputs import ToPipe
from .pumps import FromPipe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .pumps import Pumps

#: Of a frame's length.
PREFIX = 2

#: A frame with its length fits the credit that a stream gets at least, when half of it has come back.
MAX_FRAME = limits.INITIAL_WINDOW // 2 - PREFIX

#: Destination, source, type.
HEADER = 14


class Card:
    """See the module's text.  `on_end()` is called when the device is gone."""

    def __init__(self, pumps: Pumps, fd: int, stdin: int, stdout: int, on_end: Callable[[], object]) -> None:
        """Take the descriptor of the device over.  Raises `InvalidRequest`, OSError: it stays the caller's."""
        second = pumps.accept_pair(fd, stdin, stdout)
        self._on_end = on_end
        self._open = 2
        self._into = _Into(pumps, second, stdin, self._ended)
        self._out = _OutOf(pumps, fd, stdout, lambda _total: self._ended())

    def close(self) -> None:
        """Pull it out.  Harmless when repeated."""
        self._into.close()
        self._out.close()

    def _ended(self) -> None:
        """One direction has; a card with one is none."""
        self._open -= 1
        if self._open:
            self.close()
        else:
            self._on_end()


class _OutOf(FromPipe):
    """What the card sends."""

    def __init__(self, pumps: Pumps, fd: int, stream: int, on_end: Callable[[int], object]) -> None:
        super().__init__(pumps, fd, stream, on_end)
        self._settled = True  # a read gives one frame, so it is not read like a pipe that is full

    def step(self) -> bool:
        if self._pumps.session.credit(self.stream) < PREFIX + MAX_FRAME:
            return False  # CreditReceived will ask for a turn
        return super().step()

    def _read(self, wanted: int) -> int:
        frame = os.read(self._fd, MAX_FRAME)
        self._pumps.session.send(self.stream, len(frame).to_bytes(PREFIX, "big") + frame)
        return len(frame)


class _Into(ToPipe):
    """What the card gets."""

    def __init__(self, pumps: Pumps, fd: int, stream: int, on_end: Callable[[], object]) -> None:
        self._rest = b""  # the begin of a frame
        super().__init__(pumps, fd, stream, on_end)

    def on_event(self, event: events.Event) -> None:
        if isinstance(event, events.EofReceived):
            self.close()
        else:
            super().on_event(event)

    def write_out(self) -> None:
        data = b"".join((self._rest, *self._chunks))
        count, at = len(data) - len(self._rest), 0
        self._chunks.clear()
        self._borrowed = False
        if self._fd < 0:
            return
        while len(data) - at >= PREFIX:
            size = int.from_bytes(data[at : at + PREFIX], "big")
            if not HEADER <= size <= MAX_FRAME:
                self.close()
                return
            if len(data) - at < PREFIX + size:
                break
            at += PREFIX
            self._send(data[at : at + size])
            at += size
        self._rest = data[at:]
        self._pumps.session.consume(self.stream, count)

    def _send(self, frame: bytes) -> None:
        try:
            os.write(self._fd, frame)
        except OSError:
            pass  # its queue is full, or the device is down

    def _write(self) -> None:
        """Nothing waits to be written."""
