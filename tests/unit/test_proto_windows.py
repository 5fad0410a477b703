"""Flow control alone: no frames, no connection."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from byre_proto.frames import RemoteProtocolError
from byre_proto.limits import INITIAL_WINDOW, MAX_WINDOW, WINDOW_POOL
from byre_proto.windows import ReceiveWindow, SendWindow, WindowPool
from tests.fuzz.pair import unhurried


class Windows(RuleBasedStateMachine):
    """Any number of streams, each with a true sender: what one side holds is bounded, and no credit is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = WindowPool(8 * INITIAL_WINDOW)
        self.all: list[dict] = []

    streams = Bundle("streams")

    @rule(target=streams)
    def open(self) -> dict:
        stream = {"send": SendWindow(), "receive": ReceiveWindow(self.pool), "held": 0, "owed": 0, "closed": False}
        self.all.append(stream)
        return stream

    @rule(stream=streams, amount=st.integers(1, MAX_WINDOW))
    def send(self, stream: dict, amount: int) -> None:
        amount = min(amount, stream["send"].credit)
        if amount and not stream["closed"]:
            stream["send"].spend(amount)
            stream["receive"].received(amount)
            stream["held"] += amount

    @rule(stream=streams, amount=st.integers(1, MAX_WINDOW))
    def read(self, stream: dict, amount: int) -> None:
        amount = min(amount, stream["held"])
        if amount and not stream["closed"]:
            stream["held"] -= amount
            credit = stream["receive"].consumed(amount)
            if credit:
                stream["send"].granted(credit)

    @rule(stream=streams)
    def close(self, stream: dict) -> None:
        stream["receive"].close()
        stream["closed"] = True
        stream["held"] = 0

    @invariant()
    def the_pool_is_never_overdrawn_and_never_grows(self) -> None:
        growth = sum(s["receive"]._size - INITIAL_WINDOW for s in self.all)
        assert self.pool.free >= 0
        assert self.pool.free + growth == 8 * INITIAL_WINDOW

    @invariant()
    def no_stream_holds_more_than_its_window(self) -> None:
        for stream in self.all:
            if not stream["closed"]:
                window = stream["receive"]
                assert stream["held"] + stream["send"].credit + window._owed == window._size <= MAX_WINDOW
                assert window._open == stream["send"].credit

    @invariant()
    def a_stream_whose_reader_has_read_all_can_be_sent_more(self) -> None:
        for stream in self.all:
            if not stream["closed"] and not stream["held"]:
                assert stream["send"].credit > 0


Windows.TestCase.settings = settings(unhurried, max_examples=60, stateful_step_count=40)
TestWindows = Windows.TestCase


def test_more_than_the_credit_is_refused() -> None:
    window = ReceiveWindow(WindowPool())
    window.received(INITIAL_WINDOW)
    with pytest.raises(RemoteProtocolError):
        window.received(1)


@pytest.mark.parametrize("amount", [0, MAX_WINDOW, 1 << 31])
def test_credit_of_nothing_or_beyond_the_largest_window_is_refused(amount: int) -> None:
    with pytest.raises(RemoteProtocolError):
        SendWindow().granted(amount)


def test_small_reads_are_granted_together() -> None:
    window = ReceiveWindow(WindowPool())
    window.received(INITIAL_WINDOW)
    grants = [window.consumed(1) for _ in range(INITIAL_WINDOW // 2)]
    assert grants[:-1] == [0] * (INITIAL_WINDOW // 2 - 1)
    assert grants[-1] > INITIAL_WINDOW


def test_a_window_grows_to_the_largest_and_no_further() -> None:
    pool = WindowPool()
    window = ReceiveWindow(pool)
    for _ in range(20):
        amount = window._open
        window.received(amount)
        window.consumed(amount)
    assert window._size == MAX_WINDOW
    window.close()
    window.close()
    assert pool.free == WINDOW_POOL


@unhurried
@given(st.integers(1, 200))
def test_those_that_came_first_always_leave_something(count: int) -> None:
    pool = WindowPool()
    for _ in range(count):
        window = ReceiveWindow(pool)
        for _ in range(10):
            amount = window._open
            window.received(amount)
            window.consumed(amount)
    assert pool.free > 0
