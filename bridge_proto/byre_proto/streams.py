"""One multiplexed byte stream: which of its two directions are open, and its two windows."""

from __future__ import annotations

from .deques import deque
from .windows import ReceiveWindow, SendWindow, WindowPool

#: Reasons that RESET and STOP carry.
REASON_NONE = 0
REASON_CANCELLED = 1
REASON_CLOSED = 2
REASON_PROCESS_GONE = 3


class Stream:
    """State of a stream on one side.

    Each direction is open until EOF or RESET (by its sender) or STOP (by its receiver).  A direction that was not
    asked for at the start is closed from the start.  `held` is a list while the request that names the stream is
    not answered: until then the peer may not know the stream, and would drop what it is sent about it.
    """

    __slots__ = (
        "consumed",
        "held",
        "id",
        "pending",
        "receive_window",
        "received",
        "receiving",
        "send_window",
        "sending",
        "sent",
    )

    def __init__(self, number: int, pool: WindowPool, *, sending: bool, receiving: bool) -> None:
        self.id = number
        self.sending = sending
        self.receiving = receiving
        self.send_window = SendWindow()
        self.receive_window = ReceiveWindow(pool)
        self.sent = 0  # bytes handed over for sending, in all
        self.received = 0
        self.consumed = 0  # by the reader; the rest is held here and counts until it is read or given up
        self.pending: deque[tuple[bytes, ...]] = deque()  # frames that wait for their turn
        self.held: list[bytes] | None = None  # control frames kept back until the peer has accepted the stream

    @property
    def done(self) -> bool:
        """Nothing more can happen on it, nothing waits to be sent or read: it may be forgotten."""
        busy = self.sending or self.receiving or self.pending or self.consumed < self.received
        return not busy and self.held is None
