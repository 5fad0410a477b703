"""Each named limit of the wire: the sender keeps to it, and the receiver does not rely on that."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest

from byre_proto import errors, events, frames, limits
from byre_proto.encoding import pack
from byre_proto.errors import RequestTooLarge, ResourceExhausted
from byre_proto.frames import LocalProtocolError, RemoteProtocolError
from tests.fuzz.pair import RESUMABLE, Pair

from . import test_cuts

#: Limit -> its test.  The core has no clock: what has to do with time is kept by the agent and the bridge.
SHOWN: dict[str, Callable[..., object]] = {
    "RESUME_SECONDS": test_cuts.test_a_session_that_is_not_carried_on_in_time_is_given_up_by_both_sides
}


def shows(*names: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def mark(test: Callable[[], None]) -> Callable[[], None]:
        SHOWN.update(dict.fromkeys(names, test))
        return test

    return mark


@shows("MAX_DATA")
def test_data_is_cut_to_the_frames_limit_and_more_is_refused() -> None:
    pair = Pair()
    number = pair.stream()
    pair.first.session.streams[number].send_window.granted(limits.MAX_DATA)
    sent = limits.INITIAL_WINDOW + limits.MAX_DATA
    pair.first.session.send(number, bytes(sent))
    sizes = []
    while frame := pair.first.session.outbox.next_frame():
        sizes.append(sum(map(len, frame)) - frames.HEADER_SIZE)
    assert sizes == [limits.MAX_DATA, sent - limits.MAX_DATA]
    pair.second.feed(frames.HEADER.pack(limits.MAX_DATA + 1, frames.DATA, 0, 0, number))
    assert "over the limit" in pair.second.closed().message


@pytest.mark.behaviour("B45")
@shows("MAX_CONTROL")
def test_control_messages() -> None:
    pair = Pair()
    with pytest.raises(RequestTooLarge):
        pair.first.session.request("process.create", {"command_line": "x" * limits.MAX_CONTROL})
    with pytest.raises(LocalProtocolError):
        pair.first.session.event("vm.exit", {"reason": "x" * limits.MAX_CONTROL})
    assert pair.first.output() == b""
    pair.call()
    pair.second.feed(frames.HEADER.pack(limits.MAX_CONTROL + 1, frames.REQUEST, 0, 0, 0))
    assert isinstance(pair.second.closed(), RemoteProtocolError)


@shows("MAX_ELEMENTS")
def test_elements_of_one_list() -> None:
    pair = Pair()
    with pytest.raises(LocalProtocolError):
        pair.first.session.request("process.create", {"args": ["x"] * (limits.MAX_ELEMENTS + 1)})
    pair.first.session.request("process.create", {"args": ["x"] * limits.MAX_ELEMENTS})
    pair.exchange()
    assert pair.second.take_one(events.RequestReceived)
    arguments = b"\x94\x02\xaeprocess.create\x81\xa4args\xdc" + (limits.MAX_ELEMENTS + 1).to_bytes(2, "big")
    pair.second.feed(frames.encode(frames.REQUEST, 0, arguments + b"\xa1x" * (limits.MAX_ELEMENTS + 1) + b"\xc0"))
    assert "max_array_len" in pair.second.closed().message


@shows("MAX_STREAM_ID")
def test_stream_ids_end_with_a_clear_error() -> None:
    pair = Pair()
    pair.first.session._next_stream = limits.MAX_STREAM_ID
    assert pair.stream() == limits.MAX_STREAM_ID
    with pytest.raises(ResourceExhausted):
        pair.first.session.new_stream(sending=True, receiving=True)
    with pytest.raises(errors.InvalidRequest):
        pair.second.session.accept_stream(limits.MAX_STREAM_ID + 2, sending=True, receiving=True)


@shows("MAX_CALL_ID")
def test_call_ids() -> None:
    pair = Pair()
    request = [limits.MAX_CALL_ID, "system.info", {}, None]
    pair.second.feed(frames.encode(frames.REQUEST, 0, pack(request)))
    assert pair.second.take_one(events.RequestReceived).call == limits.MAX_CALL_ID
    request[0] = limits.MAX_CALL_ID + 1
    pair.second.feed(frames.encode(frames.REQUEST, 0, pack(request)))
    assert isinstance(pair.second.closed(), RemoteProtocolError)


@pytest.mark.behaviour("B62")
@shows("MAX_STREAMS")
def test_open_streams() -> None:
    pair = Pair()
    last = [pair.stream() for _ in range(limits.MAX_STREAMS)][-1]
    with pytest.raises(ResourceExhausted):
        pair.first.session.new_stream(sending=True, receiving=True)
    with pytest.raises(ResourceExhausted):
        pair.second.session.accept_stream(last + 2, sending=True, receiving=True)
    for side in (pair.first, pair.second):
        side.session.reset(last)
    pair.exchange()
    assert pair.stream() == last + 2


@shows("INITIAL_WINDOW", "MAX_WINDOW")
def test_windows() -> None:
    pair = Pair()
    number = pair.stream()
    assert pair.first.session.credit(number) == limits.INITIAL_WINDOW
    with pytest.raises(LocalProtocolError):
        pair.first.session.send(number, bytes(limits.INITIAL_WINDOW + 1))
    over = limits.MAX_WINDOW - limits.INITIAL_WINDOW + 1
    pair.first.feed(frames.encode_integer(frames.WINDOW, number, over))
    assert isinstance(pair.first.closed(), RemoteProtocolError)
    pair.second.feed(frames.encode(frames.DATA, number, bytes(limits.INITIAL_WINDOW + 1)))
    assert isinstance(pair.second.closed(), RemoteProtocolError)


@shows("WINDOW_POOL")
def test_what_all_streams_together_can_hold() -> None:
    """Every stream read once, so that it may grow, and then left unread by a peer that sends all it may."""
    pair = Pair()
    streams = [pair.stream() for _ in range(100)]
    for _ in range(8):
        for number in streams:
            pair.first.session.send(number, bytes(pair.first.session.credit(number)))
        pair.exchange()
        for event in pair.second.take():
            assert isinstance(event, events.DataReceived)
            pair.second.session.consume(event.stream, len(event.data))
        pair.exchange()
    credit = sum(pair.first.session.credit(number) for number in streams)
    bound = len(streams) * limits.INITIAL_WINDOW + limits.WINDOW_POOL
    assert bound - limits.WINDOW_POOL // 8 < credit <= bound


@shows("MAX_CALLS")
def test_calls_in_progress() -> None:
    pair = Pair()
    for _ in range(limits.MAX_CALLS):
        last = pair.first.session.request("system.info", {})
    with pytest.raises(ResourceExhausted):
        pair.first.session.request("system.info", {})
    pair.exchange()
    assert len(pair.second.take()) == limits.MAX_CALLS
    pair.second.feed(frames.encode(frames.REQUEST, 0, pack([last + 1, "system.info", {}, None])))
    assert pair.second.take() == []
    assert b"resource-exhausted" in pair.second.output()
    pair.second.session.reply(last, {"info": {}})
    pair.exchange()
    assert pair.first.take_one(events.ReplyReceived)
    pair.second.feed(frames.encode(frames.REQUEST, 0, pack([last + 2, "system.info", {}, None])))
    assert pair.second.take_one(events.RequestReceived)


@shows("MAX_CONTROL_BACKLOG", "FRAME_OVERHEAD")
def test_a_peer_that_asks_and_does_not_read() -> None:
    ping = frames.encode_integer(frames.PING, 0, 1)
    bad_requests = b"".join(frames.encode(frames.REQUEST, 0, pack([i, "no", {}, None])) for i in range(1, 1000))
    for flood in (ping * 999, bad_requests):
        pair = Pair()
        tracemalloc.start()
        while not pair.second.connection.close_due:
            pair.second.feed(flood)
            pair.second.session._last_remote_call = 0
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        error = pair.second.closed()
        assert isinstance(error, ResourceExhausted)
        assert "unread" in error.message
        assert peak < 3 * limits.MAX_CONTROL_BACKLOG
        assert b"resource-exhausted" in pair.second.output()


def test_a_peer_that_does_not_read_what_is_told() -> None:
    """The program's own events are bounded too: the connection ends instead."""
    pair = Pair()
    for number in range(100_000):
        pair.second.session.event("process.exit", {"process": number, "code": 0, "signal": 0})
        if number % 1000 == 0 and pair.second.session.outbox.choked:
            break
    pair.second.connection.receive_data(b"")
    assert isinstance(pair.second.closed(), ResourceExhausted)
    with pytest.raises(ResourceExhausted):
        for _ in range(limits.MAX_CALLS):
            pair.first.session.request("process.create", {"command_line": "x" * 10_000})


@pytest.mark.behaviour("B50")
@shows("MAX_LOG_BACKLOG", "MAX_LOG_LINE", "MAX_LOG_SOURCE")
def test_a_flood_of_logs_is_cut_dropped_and_counted() -> None:
    pair = Pair()
    session = pair.second.session
    number = pair.stream()
    sent = [session.log("s" * 1000, 20, "\U0001f404" * 100_000) for _ in range(100)]
    fitted = sent.count(True)
    assert 0 < fitted < 100
    assert session.outbox._log_bytes <= limits.MAX_LOG_BACKLOG
    session.send(number, b"data passes")
    pair.exchange()
    lines = pair.first.take()
    assert [e.data for e in lines if isinstance(e, events.DataReceived)] == [b"data passes"]
    lines = [e for e in lines if isinstance(e, events.LogReceived)]
    assert len(lines) == fitted
    assert all(len(e.message) == limits.MAX_LOG_LINE and len(e.source) == limits.MAX_LOG_SOURCE for e in lines)  # type: ignore[attr-defined]
    assert session.log("s", 20, "after")
    pair.exchange()
    assert pair.first.take_one(events.LogReceived).dropped == 100 - fitted


@shows("MAX_LOG_LEVEL")
def test_log_levels() -> None:
    pair = Pair()
    pair.second.session.log("s", 1000, "m")
    pair.exchange()
    assert pair.first.take_one(events.LogReceived).level == limits.MAX_LOG_LEVEL
    pair.first.feed(frames.encode(frames.LOG, 0, pack(["s", limits.MAX_LOG_LEVEL + 1, "m", 0])))
    assert isinstance(pair.first.closed(), RemoteProtocolError)


@shows("MAX_REPLAY")
def test_a_peer_that_never_acknowledges() -> None:
    """Memory stays bounded, the connection goes on, only the resumption is lost."""
    pair = Pair(capabilities=RESUMABLE)
    replay = pair.first.session.outbox.replay
    frame = (bytes(limits.MAX_CONTROL),)
    for _ in range(limits.MAX_REPLAY // limits.MAX_CONTROL + 1):
        replay.add(frame)
    assert replay.overflowed
    assert replay._bytes == 0
    pair.call()


@shows("MAX_NOISE")
def test_noise() -> None:
    pair = Pair(handshake=False)
    pair.first.feed(bytes(limits.MAX_NOISE))
    assert pair.first.take() == []
    assert len(pair.first.connection._noise) < 100
    pair.first.feed(b"x")
    assert "no preface" in pair.first.closed().message


@shows("ACK_FRAMES", "ACK_BYTES")
def test_acknowledgements_come_in_time() -> None:
    pair = Pair(capabilities=RESUMABLE)
    numbers = [pair.stream() for _ in range(limits.ACK_BYTES // limits.INITIAL_WINDOW)]

    def acks() -> int:
        return pair.second.output().count(frames.HEADER.pack(8, frames.ACK, 0, 0, 0))

    for i in range(2 * limits.ACK_FRAMES):
        pair.first.session.event("vm.exit", {"reason": str(i)})
    pair.second.feed(pair.first.output())
    assert acks() == 2
    for number in numbers:
        pair.first.session.send(number, bytes(limits.INITIAL_WINDOW))
    pair.second.feed(pair.first.output())
    assert acks() == 1


@pytest.mark.parametrize("limit", [name for name in vars(limits) if name.isupper() and name != "TYPE_CHECKING"])
def test_every_limit_is_shown_by_a_test(limit: str) -> None:
    assert limit in SHOWN


def test_a_reader_that_is_fed_byte_by_byte_does_no_quadratic_work() -> None:
    """A megabyte in a thousand cuts: the buffer keeps what came, and copies it out once."""
    pair = Pair()
    payload = pack([1, "process.create", {"command_line": "x" * 1_000_000}, None])
    data: Any = frames.encode(frames.REQUEST, 0, payload)
    tracemalloc.start()
    pair.second.feed(data, 1000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert pair.second.take_one(events.RequestReceived)
    assert peak < 8 * len(data)
