"""A session that outlives its connections: cut anywhere, nothing is lost and nothing is repeated."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from byre_proto import events, frames, limits
from byre_proto.connection import Connection, SessionLost
from byre_proto.errors import ResourceExhausted
from byre_proto.session import Session
from tests.fuzz.pair import RESUMABLE, End, Pair, unhurried


def reconnect(pair: Pair, *, fresh: str = "") -> Pair:
    """A new pair of connections for the same sessions; `fresh` names the side that has lost its own."""
    nonces = (bytes([next(_counter) % 250 + 1]) * 16 for _ in range(2))
    sides = {
        side: {"session": None if side == fresh else getattr(pair, side).session, "nonce": next(nonces)}
        for side in ("first", "second")
    }
    return Pair(capabilities=RESUMABLE, handshake=False, chunk=pair.chunk, **sides)  # type: ignore[arg-type]


_counter = itertools.count()


def cut(pair: Pair, forward: int, backward: int) -> None:
    """All that is queued leaves, and only so many bytes of each direction arrive."""
    to_second, to_first = pair.first.output(), pair.second.output()
    pair.second.feed(to_second[:forward])
    pair.first.feed(to_first[:backward])
    for side in (pair.first, pair.second):
        side.connection.receive_eof()
        side.events += [e for e in side.connection.take_events() if not isinstance(e, events.Closed)]


def _traffic(pair: Pair) -> tuple[list[int], int]:
    """Something of every kind, both ways, queued."""
    one, two = pair.first.session, pair.second.session
    number = pair.stream()
    calls = [one.request("system.info", {}), one.request("system.stacks", {})]
    one.send(number, b"a" * 5000)
    one.send(number, b"b" * 100)
    one.send_eof(number)
    two.send(number, b"c" * 5000)
    two.event("process.exit", {"process": 1, "code": 0, "signal": 0})
    two.log("agent", 20, "line")
    one.ping(7)
    return calls, number


def test_cut_at_every_place_nothing_is_lost_or_repeated() -> None:
    length = len(_sample()[0])
    for at in [*range(400), *range(400, length, 97), length]:
        for back in (0, at, 10**6):
            pair = Pair(capabilities=RESUMABLE)
            calls, number = _traffic(pair)
            cut(pair, at, back)
            seen_first, seen_second = pair.first.take(), pair.second.take()
            pair = reconnect(pair)
            pair.exchange()
            seen_first += pair.first.take()
            seen_second += pair.second.take()
            data = b"".join(e.data for e in seen_second if isinstance(e, events.DataReceived))
            assert data == b"a" * 5000 + b"b" * 100, at
            assert [e.call for e in seen_second if isinstance(e, events.RequestReceived)] == calls
            assert [e for e in seen_second if isinstance(e, events.EofReceived)] == [
                events.EofReceived(number, 5100)
            ]
            assert [type(e) for e in seen_first].count(events.EventReceived) == 1
            assert [type(e) for e in seen_first].count(events.LogReceived) == 1
            assert b"".join(e.data for e in seen_first if isinstance(e, events.DataReceived)) == b"c" * 5000
            assert [e.resumed for e in seen_first if isinstance(e, events.Connected)] == [True]


def _sample() -> tuple[bytes, bytes]:
    pair = Pair(capabilities=RESUMABLE)
    _traffic(pair)
    return pair.first.output(), pair.second.output()


class Cuts(RuleBasedStateMachine):
    """Random calls, events and bytes both ways, cut at random places; a model knows what must arrive."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair(capabilities=RESUMABLE)
        self.sent: dict[str, bytes] = {"first": b"", "second": b""}
        self.got: dict[str, bytes] = {"first": b"", "second": b""}
        self.asked: list[int] = []
        self.heard: list[int] = []
        self.answered: list[int] = []
        self.answers: list[int] = []
        self.told = 0
        self.exits: list[int] = []

    @initialize()
    def open(self) -> None:
        self.number = self.pair.stream()

    def note(self) -> None:
        for side in ("first", "second"):
            end: End = getattr(self.pair, side)
            for event in end.take():
                if isinstance(event, events.DataReceived):
                    self.got[side] += event.data
                    end.session.consume(self.number, len(event.data))
                elif isinstance(event, events.RequestReceived):
                    self.heard.append(event.call)
                elif isinstance(event, events.ReplyReceived):
                    self.answers.append(event.call)
                elif isinstance(event, events.EventReceived):
                    self.exits.append(event.fields["process"])
                else:
                    assert not isinstance(event, events.Closed) or event.error is None, event

    @rule(side=st.sampled_from(["first", "second"]), size=st.integers(1, 9000), value=st.integers(0, 255))
    def send(self, side: str, size: int, value: int) -> None:
        session = getattr(self.pair, side).session
        data = bytes((value + i) % 256 for i in range(min(size, session.credit(self.number))))
        session.send(self.number, data)
        self.sent[side] += data

    @rule()
    def ask(self) -> None:
        self.asked.append(self.pair.first.session.request("system.info", {}))

    @precondition(lambda self: len(self.answered) < len(self.heard))
    @rule()
    def answer(self) -> None:
        call = self.heard[len(self.answered)]
        self.answered.append(call)
        self.pair.second.session.reply(call, {"info": {}})

    @rule(many=st.integers(1, 100))
    def tell(self, many: int) -> None:
        for _ in range(many):
            self.told += 1
            self.pair.second.session.event("process.exit", {"process": self.told, "code": 0, "signal": 0})

    @rule()
    def exchange(self) -> None:
        self.pair.exchange()
        self.note()
        self.pair.exchange()

    @rule(forward=st.integers(0, 30_000), backward=st.integers(0, 30_000))
    def cut(self, forward: int, backward: int) -> None:
        cut(self.pair, forward, backward)
        self.note()
        self.pair = reconnect(self.pair)

    @rule(forward=st.integers(0, 300), backward=st.integers(0, 300))
    def cut_in_the_handshake(self, forward: int, backward: int) -> None:
        """The reconnection is cut as well, wherever it has got to."""
        self.pair = reconnect(self.pair)
        for _ in range(3):
            to_second, to_first = self.pair.first.output(), self.pair.second.output()
            self.pair.second.feed(to_second[:forward])
            self.pair.first.feed(to_first[:backward])
            forward, backward = max(0, forward - len(to_second)), max(0, backward - len(to_first))
        self.note()
        self.pair = reconnect(self.pair)

    @invariant()
    def what_arrived_is_what_was_sent_so_far(self) -> None:
        assert self.sent["first"].startswith(self.got["second"])
        assert self.sent["second"].startswith(self.got["first"])
        assert self.asked[: len(self.heard)] == self.heard
        assert self.answered[: len(self.answers)] == self.answers
        assert self.exits == list(range(1, len(self.exits) + 1))

    def teardown(self) -> None:
        if not hasattr(self, "number"):
            return
        for _ in range(3):
            self.exchange()
        assert self.got == {"first": self.sent["second"], "second": self.sent["first"]}
        assert (self.heard, self.answers, len(self.exits)) == (self.asked, self.answered, self.told)


Cuts.TestCase.settings = settings(unhurried, max_examples=40, stateful_step_count=30)
TestCuts = Cuts.TestCase


# -- when it cannot go on --------------------------------------------------------------------------------------


def _both_lost(pair: Pair) -> None:
    pair.exchange()
    for side in (pair.first, pair.second):
        error = side.closed()
        assert isinstance(error, SessionLost), error
        assert isinstance(error, ConnectionError)


def test_a_peer_that_lost_the_session_is_told_and_nothing_is_repeated_to_it() -> None:
    for answered in (False, True):
        pair = Pair(capabilities=RESUMABLE)
        call = pair.first.session.request("process.create", {"args": ["once"]})
        pair.exchange()
        if answered:
            pair.second.session.reply(call, {"process": 1, "pid": 1})
            pair.exchange()
        again = reconnect(pair, fresh="second")
        again.exchange()
        assert not [e for e in again.second.events if isinstance(e, events.RequestReceived)]
        _both_lost(again)


def test_a_host_that_begins_a_new_session_gets_a_fresh_one() -> None:
    pair = Pair(capabilities=RESUMABLE)
    number = pair.stream()
    pair.first.session.send(number, b"old")
    old = pair.second.session
    again = reconnect(pair, fresh="first")
    again.exchange()
    assert again.first.take_one(events.Connected).resumed is False
    assert again.second.take_one(events.Connected).resumed is False
    assert again.second.session is not old
    assert again.second.session.streams == {}


def test_a_session_without_the_capability_does_not_resume() -> None:
    pair = Pair()
    pair.call()
    _both_lost(reconnect(pair))


def test_a_session_whose_replay_overflowed_does_not_resume() -> None:
    pair = Pair(capabilities=RESUMABLE)
    pair.first.session.event("vm.exit", {"reason": "x"})
    pair.first.output()
    pair.first.session.outbox.replay.overflowed = True
    _both_lost(reconnect(pair))


def test_a_peer_that_claims_to_have_received_too_much_is_refused() -> None:
    pair = Pair(capabilities=RESUMABLE)
    pair.second.session.received = 5
    _both_lost(reconnect(pair))


def test_acknowledged_frames_are_not_kept() -> None:
    pair = Pair(capabilities=RESUMABLE)
    for _ in range(3 * limits.ACK_FRAMES):
        pair.first.session.event("vm.exit", {"reason": "x" * 1000})
    pair.exchange()
    assert pair.first.session.outbox.replay._bytes == 0


def test_a_connection_that_was_overtaken_takes_nothing_in() -> None:
    """Bytes that the old channel still delivers must not count twice."""
    pair = Pair(capabilities=RESUMABLE)
    pair.first.session.event("vm.exit", {"reason": "once"})
    late = pair.first.output()
    again = reconnect(pair)
    again.exchange()
    pair.second.feed(late)
    assert isinstance(pair.second.closed(), SessionLost)
    kinds = [type(e) for e in again.second.take()]
    assert kinds == [events.Connected, events.EventReceived]


def test_what_is_sent_again_respects_how_much_is_taken_at_once() -> None:
    pair = Pair(capabilities=RESUMABLE)
    for _ in range(50):
        pair.first.session.event("vm.exit", {"reason": "x" * 10_000})
    pair.first.output()
    again = reconnect(pair)
    again.first.output()
    again.second.feed(again.first.output())
    again.first.feed(again.second.output())
    again.second.feed(again.first.output()[:0])
    taken = again.first.connection.data_to_send(1)
    assert sum(map(len, taken)) < 30_000


@unhurried
@given(st.integers(0, 5))
def test_many_reconnections_in_a_row(times: int) -> None:
    pair = Pair(capabilities=RESUMABLE)
    number = pair.stream()
    pair.first.session.send(number, b"x" * 100)
    pair.first.session.request("system.info", {})
    pair.first.output()
    for _ in range(times):
        pair = reconnect(pair)
        pair.first.output()
    pair = reconnect(pair)
    pair.exchange()
    kinds = [type(e) for e in pair.second.take()]
    assert kinds == [events.Connected, events.RequestReceived, events.DataReceived]


def test_logs_pings_and_held_frames_survive_too() -> None:
    pair = Pair(capabilities=RESUMABLE)
    stdin = pair.first.session.new_stream(sending=True, receiving=False)
    call = pair.first.session.request("process.create", {"stdin": stdin})
    pair.first.session.send(stdin, b"early")
    cut(pair, 10**6, 0)
    (request,) = pair.second.take()
    assert isinstance(request, events.RequestReceived)
    pair.second.session.accept_stream(stdin, sending=False, receiving=True)
    pair.second.session.reply(call, {"process": 1, "pid": 1})
    pair = reconnect(pair)
    pair.exchange()
    assert pair.second.take()[-1] == events.DataReceived(stdin, b"early")
    assert pair.first.take()[1] == events.ReplyReceived(call, {"process": 1, "pid": 1})


def test_a_session_whose_peer_did_not_read_goes_on_when_it_reads_again() -> None:
    pair = Pair(capabilities=RESUMABLE)
    told = 0
    while not pair.second.session.outbox.choked:
        pair.second.session.event("vm.exit", {"reason": "x" * 5000})
        told += 1
    pair.second.output()
    assert isinstance(pair.second.closed(), ResourceExhausted)
    pair = reconnect(pair)
    pair.exchange()
    assert [type(e) for e in pair.first.take()].count(events.EventReceived) == told
    assert pair.second.connection.connected


def test_a_session_belongs_to_one_side() -> None:
    session = Session(first=True)
    connection = Connection(first=True, name="host", session=session)
    assert connection.session is session
    assert frames.LOG in frames.REPLAYED
