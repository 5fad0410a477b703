"""The streams of a bridge: who reads and who writes each, and what the peer says of them.

Rule: it routes.  What a stream holds, and when it gives credit, is for `streams`; its state on the wire is the
session's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .channel import WRITE_BATCH
from .errors import ConnectionLost, StreamReset

if TYPE_CHECKING:
    from collections.abc import Callable

    from byre_proto import events

    from .bridge import Bridge
    from .streams import BridgeReader, StreamTransport

#: Stream data queued in the core before writers wait: enough for the next batch.
MAX_BACKLOG = 2 * WRITE_BATCH


class StreamTable:
    """`readers` and `writers`: by the number of their stream.  A stream that goes both ways has one of each."""

    def __init__(self, bridge: Bridge) -> None:
        self.readers: dict[int, BridgeReader] = {}
        self.writers: dict[int, StreamTransport] = {}
        self._bridge = bridge
        self._waiting: dict[StreamTransport, None] = {}  # writers that wait for a smaller backlog, in order

    # -- what readers and writers ask for ------------------------------------------------------------------

    @property
    def congested(self) -> bool:
        """Whether writers should wait: enough is queued for the socket."""
        return self._bridge.session.data_backlog >= MAX_BACKLOG

    def call_when_clear(self, writer: StreamTransport) -> None:
        self._waiting[writer] = None

    def consumed(self, number: int, amount: int) -> None:
        self._bridge.session.consume(number, amount)
        self._bridge.flush_soon()
        self._forget_reader(number)

    def stop_reading(self, number: int) -> None:
        if self.readers.pop(number, None) is not None:
            self._bridge.session.stop(number)
            self._bridge.flush_soon()

    def forget_writer(self, number: int) -> None:
        writer = self.writers.pop(number, None)
        if writer is not None:
            self._waiting.pop(writer, None)

    # -- what the bridge tells -----------------------------------------------------------------------------

    def pump_waiting(self) -> None:
        """Some of the backlog has gone out."""
        while self._waiting and not self.congested:
            writer = next(iter(self._waiting))
            del self._waiting[writer]
            writer.pump()

    def lose(self, error: Callable[[], ConnectionLost]) -> None:
        """The connection is lost; each stream gets an error of its own."""
        for reader in self.readers.values():
            reader.fail(error())
        for writer in list(self.writers.values()):
            writer.fail(error())
        self.readers.clear()

    def on_data(self, event: events.DataReceived) -> None:
        reader = self.readers.get(event.stream)
        if reader is not None:
            reader.feed_data(event.data)

    def on_eof(self, event: events.EofReceived) -> None:
        reader = self.readers.get(event.stream)
        if reader is not None:
            reader.feed_eof()
            self._forget_reader(event.stream)

    def on_reset(self, event: events.ResetReceived) -> None:
        reader = self.readers.pop(event.stream, None)
        if reader is not None:
            reader.fail(StreamReset("the guest gave up this stream: bytes may be missing", reason=event.reason))
            self._bridge.session.stop(event.stream)

    def on_stop(self, event: events.StopReceived) -> None:
        writer = self.writers.get(event.stream)
        if writer is not None:
            writer.fail(BrokenPipeError("the process no longer reads this stream"))

    def on_credit(self, event: events.CreditReceived) -> None:
        writer = self.writers.get(event.stream)
        if writer is not None:
            writer.pump()

    def _forget_reader(self, number: int) -> None:
        """Once it has ended and all is read.  The session may know of an EOF that is yet to be dispatched here."""
        reader = self.readers.get(number)
        if reader is not None and reader.ended and number not in self._bridge.session.streams:
            del self.readers[number]
