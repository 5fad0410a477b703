"""Credit-based flow control of streams, alone: no frames, no connection, no I/O.

A receiver grants each stream a window of bytes that it is ready to hold.  Credit comes back only when the
*reader* has consumed bytes, so an unread stream stops its own sender and nothing else (B3).

    guaranteed   every stream has INITIAL_WINDOW from the start
    growth       a stream that is read doubles its window, up to MAX_WINDOW, out of a pool shared by all; it takes
                 at most half of what is left there, so that streams which were read once and then left lying
                 never take all of it from those that are read now
    return       closing a stream by any way gives its growth back to the pool

So what one side can be made to hold is bounded by MAX_STREAMS x INITIAL_WINDOW + WINDOW_POOL, and a thousand
unread streams do not take anything from the one that is read.
"""

from __future__ import annotations

from .frames import RemoteProtocolError
from .limits import INITIAL_WINDOW, MAX_WINDOW, WINDOW_POOL


class WindowPool:
    """Bytes of growth that the streams of one side share."""

    def __init__(self, size: int = WINDOW_POOL) -> None:
        self.free = size

    def take(self, wanted: int) -> int:
        """Up to `wanted` bytes, at most half of those that are left."""
        granted = min(wanted, self.free // 2)
        self.free -= granted
        return granted

    def give_back(self, amount: int) -> None:
        self.free += amount


class ReceiveWindow:
    """What one stream may still be sent by the peer, and what we owe it."""

    def __init__(self, pool: WindowPool) -> None:
        self._pool = pool
        self._size = INITIAL_WINDOW
        self._open = INITIAL_WINDOW  # what the peer may send now
        self._owed = 0  # consumed and not yet granted again

    def received(self, amount: int) -> None:
        """Bytes came in.  Raises `RemoteProtocolError` when the peer had no credit for them."""
        if amount > self._open:
            raise RemoteProtocolError(f"{amount} bytes were sent with credit for {self._open}")
        self._open -= amount

    def consumed(self, amount: int) -> int:
        """The reader took bytes; returns the credit to grant now (0: not worth a frame yet)."""
        self._owed += amount
        if self._owed * 2 < self._size:
            return 0
        growth = self._pool.take(min(self._size, MAX_WINDOW - self._size))
        self._size += growth
        credit = self._owed + growth
        self._owed = 0
        self._open += credit
        return credit

    def close(self) -> None:
        """The stream ended: its growth goes back to the pool.  Harmless when repeated."""
        self._pool.give_back(self._size - INITIAL_WINDOW)
        self._size = INITIAL_WINDOW


class SendWindow:
    """What we may send on one stream."""

    def __init__(self) -> None:
        self.credit = INITIAL_WINDOW

    def spend(self, amount: int) -> None:
        assert amount <= self.credit, "the caller asks `credit` first"
        self.credit -= amount

    def granted(self, amount: int) -> None:
        """The peer granted credit.  Raises `RemoteProtocolError` beyond the largest window there is."""
        self.credit += amount
        if amount == 0 or self.credit > MAX_WINDOW:
            raise RemoteProtocolError(f"credit of {amount} bytes makes a window of {self.credit}")
