"""What was sent and not yet acknowledged, so that a session can go on over the next connection.

Frames of the REPLAYED types are numbered from 1 in the order in which they are sent; the number itself is never
on the wire.  ACK and HELLO carry how many the receiver has taken in.
"""

from __future__ import annotations

from .deques import deque
from .frames import RemoteProtocolError
from .limits import FRAME_OVERHEAD, MAX_REPLAY


class Replay:
    """The sender's memory of unacknowledged frames, bounded by MAX_REPLAY bytes (each frame with its overhead)."""

    def __init__(self) -> None:
        self.sent = 0  # number of the last frame sent
        self._frames: deque[tuple[bytes, ...]] = deque()
        self._bytes = 0
        self.overflowed = False

    def add(self, frame: tuple[bytes, ...]) -> None:
        """A numbered frame goes out."""
        self.sent += 1
        if self.overflowed:
            return
        self._frames.append(frame)
        self._bytes += _size(frame)
        if self._bytes > MAX_REPLAY:
            self.overflowed = True
            self._frames.clear()
            self._bytes = 0

    def acknowledged(self, count: int) -> None:
        """The peer has taken in `count` frames.  Raises `RemoteProtocolError` for more than were sent."""
        if count > self.sent:
            raise RemoteProtocolError(f"{count} frames are acknowledged, {self.sent} were sent")
        unacknowledged = self.sent - count
        if not unacknowledged:
            self.overflowed = False
        while len(self._frames) > unacknowledged:
            self._bytes -= _size(self._frames.popleft())

    def resume(self, count: int) -> list[tuple[bytes, ...]] | None:
        """The frames after the first `count`, to be sent again; None when they are no longer all here."""
        if self.overflowed or count > self.sent or self.sent - count > len(self._frames):
            return None
        self.acknowledged(count)
        return list(self._frames)


def _size(frame: tuple[bytes, ...]) -> int:
    return FRAME_OVERHEAD + sum(map(len, frame))
