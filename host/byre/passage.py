"""One stream on its way through a relay, from one bridge to another.

Rule: what waits here was sent within the window of the side that it came from, and is taken off its account
(`consumed`) only as the other side has credit for it.  So back-pressure reaches from the reader to the writer.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from byre_proto.streams import REASON_PROCESS_GONE

from .errors import ConnectionLost, StreamReset

if TYPE_CHECKING:
    from .bridge import Bridge


class Passage:
    """The `source` bridge feeds it as a reader, the `sink` bridge pumps it as a writer, each by its own number."""

    def __init__(self, source: Bridge, source_number: int, sink: Bridge, sink_number: int) -> None:
        self._source, self._source_number = source, source_number
        self._sink, self._sink_number = sink, sink_number
        self._waiting: deque[bytes] = deque()
        self.ended = False  # the source's EOF is here
        self.done = False  # all was handed over, or it was given up
        self._held = False  # one side's connection is gone
        this: Any = self  # it answers all that a bridge asks of its readers and writers
        source.streams.readers[source_number] = this
        sink.streams.writers[sink_number] = this

    def feed_data(self, data: bytes | memoryview) -> None:
        self._waiting.append(bytes(data))
        self.pump()

    def feed_eof(self) -> None:
        self.ended = True
        self.pump()

    def pump(self) -> None:
        """Hand over what the sink has credit for; called again on credit, and when it is less busy."""
        session = self._sink.session
        if self._held:
            return
        while self._waiting and (credit := session.credit(self._sink_number)) > 0:
            if self._sink.streams.congested:
                this: Any = self
                self._sink.streams.call_when_clear(this)
                break
            piece = self._waiting.popleft()
            if len(piece) > credit:
                self._waiting.appendleft(piece[credit:])
                piece = piece[:credit]
            session.send(self._sink_number, piece)
            self._source.streams.consumed(self._source_number, len(piece))
        if self.ended and not self._waiting and session.credit(self._sink_number) >= 0:
            session.send_eof(self._sink_number)
            self._sink.streams.forget_writer(self._sink_number)
            self.done = True
        self._sink.flush_soon()

    def fail(self, error: Exception | None) -> None:
        """The source gave up, the sink reads no more, or the connection to either is gone."""
        if isinstance(error, ConnectionLost):
            self._held = True
        else:
            self._waiting.clear()
            self._end(int(error.data.get("reason", 0)) if isinstance(error, StreamReset) else 0)

    def close(self) -> None:
        """Nobody is left for it.  Harmless when repeated."""
        self._waiting.clear()
        self._end(REASON_PROCESS_GONE)

    def _end(self, reason: int) -> None:
        self.done = True
        self._source.streams.stop_reading(self._source_number)
        self._sink.session.reset(self._sink_number, reason)
        self._sink.streams.forget_writer(self._sink_number)
        self._sink.flush_soon()
