"""State x input: whatever the peer says in whatever state, the documented happens; hypothesis finds the rest.

The grammar and the checks are the fuzz target's; here hypothesis draws the decisions, and shrinks what it finds.
"""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from byre_proto import events, frames
from byre_proto.errors import ByreError
from tests.fuzz.pair import Pair, unhurried
from tests.fuzz.worlds import STATES, WHAT, World


class DrawnSource:
    exhausted = False

    def __init__(self, data: st.DataObject) -> None:
        self._data = data

    def integer(self, low: int, high: int) -> int:
        return self._data.draw(st.integers(low, high))

    def bytes(self, size: int) -> bytes:
        return self._data.draw(st.binary(min_size=size, max_size=size))


@settings(unhurried, max_examples=300)
@given(st.data())
def test_no_pair_of_state_and_input_does_the_undocumented(data: st.DataObject) -> None:
    world = World(DrawnSource(data))
    for _ in range(data.draw(st.integers(1, 6))):
        what, state = world.step()
        assert what in WHAT
        assert state in STATES
    world.finish()


@settings(unhurried, max_examples=200)
@given(st.lists(st.binary(max_size=100), max_size=10), st.booleans())
def test_arbitrary_bytes_close_an_open_connection_or_do_nothing(pieces: list[bytes], reverse: bool) -> None:
    pair = Pair()
    _, side = pair.ends(reverse=reverse)
    for piece in pieces:
        side.connection.receive_data(piece)
    closed = [e for e in side.take() if isinstance(e, events.Closed)]
    assert len(closed) == side.connection.close_due
    assert all(isinstance(e.error, ByreError) for e in closed)


@settings(unhurried, max_examples=100)
@given(st.data())
def test_one_flipped_bit_of_an_honest_peer_is_an_event_or_a_close(data: st.DataObject) -> None:
    pair = Pair()
    number = pair.stream()
    session = pair.first.session
    session.request("process.create", {"args": ["a"]})
    session.send(number, b"bytes")
    session.send_eof(number)
    session.ping(3)
    session.log("s", 20, "m")
    sent = bytearray(pair.first.output())
    place = data.draw(st.integers(0, len(sent) * 8 - 1))
    sent[place // 8] ^= 1 << place % 8
    pair.second.feed(bytes(sent))
    pair.second.take()
    for piece in pair.second.connection.data_to_send():
        assert piece[4] in frames.TYPES
