"""The memory of unacknowledged frames, alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from byre_proto.frames import RemoteProtocolError
from byre_proto.limits import FRAME_OVERHEAD, MAX_REPLAY
from byre_proto.replay import Replay
from tests.fuzz.pair import unhurried


@unhurried
@given(st.integers(0, 30), st.data())
def test_what_is_not_acknowledged_is_sent_again_in_order(count: int, data: st.DataObject) -> None:
    replay = Replay()
    frames = [(bytes([i]), b"payload") if i % 2 else (bytes([i]),) for i in range(count)]
    acknowledged = 0
    for number, frame in enumerate(frames, 1):
        replay.add(frame)
        if data.draw(st.booleans()):
            acknowledged = data.draw(st.integers(0, number))
            replay.acknowledged(acknowledged)
    kept_from = count - len(replay._frames)
    for received in range(count + 2):
        gone = received < kept_from or received > count
        assert replay.resume(received) == (None if gone else frames[received:])
        assert gone or len(replay._frames) == count - received


def test_more_than_was_sent_cannot_be_acknowledged() -> None:
    replay = Replay()
    replay.add((b"x",))
    with pytest.raises(RemoteProtocolError):
        replay.acknowledged(2)
    assert replay.resume(2) is None


def test_a_peer_that_never_acknowledges_costs_a_bounded_memory() -> None:
    replay = Replay()
    frame = (bytes(12), bytes(1 << 20))
    for _ in range(MAX_REPLAY // (1 << 20) + 2):
        replay.add(frame)
    assert replay.overflowed
    assert replay._bytes == 0
    assert replay.resume(0) is None
    replay.acknowledged(replay.sent)
    assert replay.resume(replay.sent) == []
    replay.add(frame)
    assert replay.resume(replay.sent - 1) == [frame]


def test_tiny_frames_count_with_what_they_cost() -> None:
    replay = Replay()
    for _ in range(1000):
        replay.add((b"1234567890123456",))
    assert replay._bytes == 1000 * (16 + FRAME_OVERHEAD)
    replay.acknowledged(1000)
    assert replay._bytes == 0
