"""One connection under test, brought into a state by an honest peer, then spoken to by a dishonest one.

After each step the documented is checked: nothing escapes the four verbs, what goes out is well-formed, Closed is
said once and last, and nothing follows it.
"""

from __future__ import annotations

from byre_proto import events, frames
from byre_proto.connection import RESUME, Connection, preface
from byre_proto.encoding import pack, unpack
from byre_proto.errors import (
    ByreError,
    InvalidRequest,
    NotSupported,
    RequestTooLarge,
    ResourceExhausted,
    printable,
)
from byre_proto.frames import FrameBuffer, LocalProtocolError
from byre_proto.session import Session

from .grammar import Peer, Source, chance, choice, value

#: The states in which a connection is spoken to.
STATES = ("preface", "hello", "open", "calls", "streams", "held", "half", "resumed", "over")

#: What it is sent: every frame type, and what is no frame.
WHAT = (*(name for name, _ in frames.TYPES.values()), "preface", "header", "raw")

#: What the program may be told about its own request; nothing else may come out of the session.
ALLOWED = (LocalProtocolError, InvalidRequest, NotSupported, RequestTooLarge, ResourceExhausted)

PEER_NONCE = b"peer" * 4
OWN_NONCE = b"mine" * 4
SESSION = b"s" * 16


class World:
    """See the module's text."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.first = chance(source, 2)
        self.state = choice(source, STATES)
        self.connection = Connection(
            first=self.first, name="x", nonce=OWN_NONCE, session=self._session(), capabilities=frozenset({RESUME})
        )
        self.peer = Peer(source, self.connection)
        self._sent = FrameBuffer()
        self._prefaces = bytearray()
        self._closed = False
        self._reach()

    # -- into the state ------------------------------------------------------------------------------------

    def _session(self) -> Session | None:
        session = Session(first=self.first)
        session.id = SESSION
        if self.state == "resumed":
            session.begun = session.outbox.keep_for_replay = True
            session.new_stream(sending=True, receiving=True)
            session.request("system.info", {})
            session.outbox.next_frame()
        return session

    def _reach(self) -> None:
        if self.state == "preface":
            return
        self._honest(preface(PEER_NONCE, OWN_NONCE))
        if self.state == "hello":
            return
        hello = [[1, 1], "honest", [RESUME], SESSION, 0, b""]
        self._honest(frames.encode(frames.HELLO, 0, pack(hello)))
        assert self.connection.connected
        session = self.connection.session
        theirs, ours = (2, 1) if self.first else (1, 2)
        if self.state == "calls":
            session.request("system.info", {})
            session.request("process.signal", {"process": 1, "signal": 9})
            self._honest(frames.encode(frames.REQUEST, 0, pack([1, "system.info", {}, None])))
            self.peer._last_call = 1
        elif self.state in ("streams", "half"):
            session.new_stream(sending=True, receiving=True)
            session.accept_stream(theirs, sending=True, receiving=True)
            session.send(ours, b"bytes")
            session.consume(theirs, 0)
            self._honest(frames.encode(frames.DATA, theirs, b"bytes"))
        elif self.state == "held":
            stream = session.new_stream(sending=True, receiving=True)
            session.request("process.create", {"stdin": stream})
            session.send(stream, b"early")
        elif self.state == "over":
            self.connection.close()
        if self.state == "half":
            session.send_eof(ours)
            session.stop(theirs)
            self._honest(frames.encode_integer(frames.EOF, ours, 0))
        self._look()

    def _honest(self, data: bytes) -> None:
        self.connection.receive_data(data)
        assert not self.connection.close_due
        self._look()

    # -- in it ---------------------------------------------------------------------------------------------

    def step(self) -> tuple[str, str]:
        """Say one thing; returns what, and the state in which the connection was."""
        source = self.source
        what = choice(source, WHAT)
        if what == "preface":
            data = self.peer.preface()
        elif what == "raw":
            data = self.peer.raw()
        elif what == "header":
            data = self.peer.header(source.integer(1, 16))
        else:
            data = self.peer.frame(getattr(frames, what))
        state = self.now()
        cut = source.integer(0, len(data))
        self.connection.receive_data(data[:cut])
        if chance(source, 4):
            self._look()
        self.connection.receive_data(memoryview(data)[cut:])
        self._look()
        if chance(source, 3):
            with suppress_allowed:
                self._act()
            self._look()
        return what, state

    def now(self) -> str:
        """The state as the table counts it."""
        if self.connection.close_due:
            return "over"
        if self.connection.connected:
            return self.state if self.state in STATES[3:8] else "open"
        return "preface" if not self.connection._state else "hello"

    def finish(self) -> None:
        """However it went, the end of the channel ends it, once."""
        self.connection.receive_eof()
        self._look()
        assert self._closed
        self.connection.receive_data(b"more")
        assert self.connection.take_events() == []
        assert self.connection.data_to_send() == []

    def _act(self) -> None:
        """Something that the program may ask at any time, sensible or not."""
        source, session = self.source, self.connection.session
        streams = [*session.streams, 1, 2, 99]
        number = int(choice(source, streams))
        act = source.integer(0, 14)
        if act == 0:
            session.request(choice(source, ("system.info", "system.stacks", "no")), {}, choice(source, (None, 1.0)))
        elif act == 1:
            stdin = session.new_stream(sending=True, receiving=chance(source, 2))
            session.request("process.create", {"stdin": stdin, "stdout": choice(source, (0, stdin))})
        elif act == 2:
            session.cancel(source.integer(0, 3))
        elif act == 3:
            session.forget(source.integer(0, 3))
        elif act == 4:
            session.reply(int(choice(source, [*session._remote_calls, 1])), {"info": {"x": value(source)}})
        elif act == 5:
            session.fail(int(choice(source, [*session._remote_calls, 1])), ByreError("no", evidence=value(source)))
        elif act == 6:
            session.event("vm.exit", {"reason": choice(source, ("x", 5, "\ud800"))})
        elif act == 7:
            session.log("agent", 20, "line\nline")
        elif act == 8:
            session.send(number, bytes(source.integer(0, 70_000)))
        elif act == 9:
            session.send_eof(number)
        elif act == 10:
            session.reset(number)
        elif act == 11:
            session.stop(number)
        elif act == 12:
            session.consume(number, source.integer(0, 20_000))
        elif act == 13:
            session.accept_stream(source.integer(0, 6), sending=chance(source, 2), receiving=True)
        else:
            session.ping(source.integer(0, 9))

    # -- what is always true -------------------------------------------------------------------------------

    def _look(self) -> None:
        for event in self.connection.take_events():
            assert not self._closed, f"{event} after Closed"
            self._closed = isinstance(event, events.Closed)
            if isinstance(event, events.LogReceived):
                assert "\n" not in event.message
                assert event.message == printable(event.message)
            if isinstance(event, events.ErrorReceived):
                assert printable(event.error.message) == event.error.message
        assert self._closed == self.connection.close_due
        while sent := self.connection.data_to_send(1):
            for piece in sent:
                self._check_sent(piece)
        session = self.connection.session
        assert session.outbox.data_bytes == sum(
            len(piece) for stream in session.streams.values() for frame in stream.pending for piece in frame
        )
        assert session._pool.free >= 0

    def _check_sent(self, piece: bytes) -> None:
        """A preface, or frames whose payloads another implementation can decode."""
        if piece.startswith(b"\x89BYRE"):
            return
        for kind, _, payload in self._sent.frames(piece):
            if kind not in frames.INTEGERS and kind != frames.DATA:
                assert isinstance(unpack(payload), list)


class _SuppressAllowed:
    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        return kind is not None and issubclass(kind, ALLOWED)


suppress_allowed = _SuppressAllowed()
