"""Two connections joined by a channel in memory, for tests of the protocol: no time, no I/O."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings

from byre_proto import events
from byre_proto.connection import RESUME, Connection
from byre_proto.session import Session

E = TypeVar("E", bound=events.Event)

#: For every property test: a loaded machine is not a failure.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

RESUMABLE = frozenset({RESUME})
FIRST_NONCE = bytes(range(1, 17))
SECOND_NONCE = bytes(range(101, 117))
SESSION_ID = bytes(range(201, 217))


class End:
    """One side: its connection, what it reported, and what the tests say for its program."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.events: list[events.Event] = []

    @property
    def session(self) -> Session:
        return self.connection.session

    def output(self) -> bytes:
        """All that it has to send now, as the channel carries it."""
        return b"".join(iter(self._pieces()))

    def _pieces(self) -> Iterator[bytes]:
        while pieces := self.connection.data_to_send():
            yield from pieces

    def feed(self, data: bytes, chunk: int = 0) -> None:
        """Feed bytes whole, or `chunk` at a time."""
        for start in range(0, len(data), chunk or len(data) or 1):
            self.connection.receive_data(data[start : start + (chunk or len(data))])
            self.events += self.connection.take_events()

    def take(self) -> list[events.Event]:
        """What was reported since the last call."""
        self.events += self.connection.take_events()
        taken, self.events = self.events, []
        return taken

    def take_one(self, kind: type[E]) -> E:
        """The only event since the last call, of this kind."""
        (event,) = self.take()
        assert isinstance(event, kind), event
        return event

    def closed(self) -> Any:
        """The error of the Closed event, which must be the last."""
        event = self.take()[-1]
        assert isinstance(event, events.Closed), event
        assert self.connection.close_due
        return event.error


class Pair:
    """`first` and `second`, joined; `exchange` carries bytes both ways until both are silent."""

    def __init__(
        self,
        *,
        chunk: int = 0,
        capabilities: frozenset[str] = frozenset(),
        first: dict[str, Any] | None = None,
        second: dict[str, Any] | None = None,
        handshake: bool = True,
    ) -> None:
        self.chunk = chunk
        common = {"capabilities": capabilities}
        self.first = End(
            Connection(**{"first": True, "name": "host", "nonce": FIRST_NONCE, **common, **(first or {})})
        )
        self.second = End(
            Connection(**{"first": False, "name": "agent", "nonce": SECOND_NONCE, **common, **(second or {})})
        )
        if handshake:
            self.exchange()
            self.first.take_one(events.Connected)
            self.second.take_one(events.Connected)

    def exchange(self) -> None:
        moved = True
        while moved:
            moved = False
            for sender, receiver in ((self.first, self.second), (self.second, self.first)):
                data = sender.output()
                moved = moved or bool(data)
                receiver.feed(data, self.chunk)

    def ends(self, *, reverse: bool = False) -> tuple[End, End]:
        """`(sender, receiver)`."""
        return (self.second, self.first) if reverse else (self.first, self.second)

    def stream(self, *, reverse: bool = False) -> int:
        """A stream that is open both ways at both ends, its opener the first of `ends(reverse)`."""
        sender, receiver = self.ends(reverse=reverse)
        number = sender.session.new_stream(sending=True, receiving=True)
        receiver.session.accept_stream(number, sending=True, receiving=True)
        return number

    def call(self, method: str = "system.info", *, reverse: bool = False, **arguments: Any) -> int:
        """A call that the other side has received."""
        sender, receiver = self.ends(reverse=reverse)
        call = sender.session.request(method, arguments)
        self.exchange()
        assert receiver.take_one(events.RequestReceived).call == call
        return call
