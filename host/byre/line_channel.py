"""A channel over a serial line: the line protocol (WIRE.md, section 13) between raw bytes and the bridge.

Rule: to its owner this is a channel like any other.  The clock is here; what to send again, and when, is decided
in `byre_proto.line`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from byre_proto.line import MAX_DATA, Line

from .channel import CLOSE_GRACE, Channel, Owner


class LineChannel(Channel):
    """`noise` is called with what was on the line and no frame: the text of a console, say."""

    max_data = MAX_DATA

    def __init__(self, owner: Owner, noise: Callable[[bytes], object] = lambda noise: None) -> None:
        super().__init__(owner)
        self._line = Line()
        self._noise = noise
        self._timer: asyncio.TimerHandle | None = None
        self._ending = False
        self._loop = asyncio.get_running_loop()

    @property
    def room(self) -> int:  # type: ignore[override]
        return self._line.room

    @property
    def paused(self) -> bool:
        return self._full or not self._line.room

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._pump()

    def buffer_updated(self, nbytes: int) -> None:
        line = self._line
        line.receive_data(self._buffer[:nbytes], self._loop.time())
        if noise := line.take_noise():
            self._noise(noise)
        if data := line.take_data():
            self.owner.channel_received(memoryview(data))
        self._pump()
        if not self.paused:
            self.owner.channel_writable()

    def write(self, frames: Iterable[bytes]) -> None:
        self._line.send(b"".join(frames))
        self._pump()

    def resume_writing(self) -> None:
        self._full = False
        self._loop.call_soon(self._pump)
        self.owner.channel_writable()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def end(self) -> None:
        self._ending = True
        self._line.end()
        self._pump()
        if not self._closed.is_set():
            self._loop.call_later(CLOSE_GRACE, self.transport.abort)

    def _pump(self) -> None:
        """Send what the line has to say, look whether that was all, and set the timer."""
        line = self._line
        if self.transport.is_closing():
            return
        if not self._full and (data := line.data_to_send(self._loop.time())):
            self.transport.write(data)
        if line.over or (self._ending and (line.idle or not line.in_step)):
            self.transport.close()
            return
        when = line.next_timeout
        if when is not None and (self._timer is None or self._timer.when() > when):
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(when, self._on_time)

    def _on_time(self) -> None:
        self._timer = None
        self._line.on_time(self._loop.time())
        self._pump()
