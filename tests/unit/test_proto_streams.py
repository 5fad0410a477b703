"""Streams between two ends: flow control, the three ways to end, and the races between them."""

from __future__ import annotations

import itertools

import pytest

from byre_proto import errors, events, frames, limits
from byre_proto.errors import InvalidRequest
from byre_proto.frames import LocalProtocolError, RemoteProtocolError
from byre_proto.streams import REASON_CLOSED, REASON_PROCESS_GONE
from tests.fuzz.pair import End, Pair


def pour(sender: End, receiver: End, pair: Pair, number: int, total: int, *, read: bool = True) -> bytes:
    """Send up to `total` bytes as credit allows; returns what arrived."""
    arrived = b""
    while total:
        room = min(sender.session.credit(number), total)
        if room <= 0:
            break
        sender.session.send(number, bytes(room))
        total -= room
        pair.exchange()
        for event in receiver.take():
            assert isinstance(event, events.DataReceived)
            arrived += event.data
            if read:
                receiver.session.consume(number, len(event.data))
        pair.exchange()
        sender.take()
    return arrived


@pytest.mark.parametrize("chunk", [0, 1, 4097])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("size", [1, frames.JOINED_BELOW - 1, frames.JOINED_BELOW, limits.INITIAL_WINDOW])
def test_bytes_pass_whole_and_eof_follows_them(size: int, reverse: bool, chunk: int) -> None:
    pair = Pair(chunk=chunk)
    sender, receiver = pair.ends(reverse=reverse)
    number = pair.stream(reverse=reverse)
    data = bytes(i * 7 % 256 for i in range(size))
    sender.session.send(number, data)
    assert sender.session.send_eof(number) == size
    pair.exchange()
    assert receiver.take() == [events.DataReceived(number, data), events.EofReceived(number, size)]
    assert sender.session.send_eof(number) == -1


def test_a_stream_that_is_read_grows_and_carries_a_lot() -> None:
    pair = Pair()
    number = pair.stream()
    total = 5 * limits.MAX_WINDOW
    assert len(pour(pair.first, pair.second, pair, number, total)) == total
    assert pair.first.session.credit(number) > limits.MAX_WINDOW // 2


@pytest.mark.behaviour("B3")
def test_an_unread_stream_stops_its_sender_and_nothing_else() -> None:
    pair = Pair()
    unread, read = pair.stream(), pair.stream()
    held = pour(pair.first, pair.second, pair, unread, 10**6, read=False)
    assert len(held) == limits.INITIAL_WINDOW
    assert pair.first.session.credit(unread) == 0
    assert len(pour(pair.first, pair.second, pair, read, 10**6)) == 10**6
    call = pair.call()
    pair.second.session.reply(call, {"info": {}})
    pair.exchange()
    assert pair.first.take_one(events.ReplyReceived)


def test_a_thousand_unread_streams_take_nothing_from_the_one_that_is_read() -> None:
    pair = Pair()
    for _ in range(1000):
        number = pair.stream()
        pair.first.session.send(number, bytes(limits.INITIAL_WINDOW))
    pair.exchange()
    assert sum(len(e.data) for e in pair.second.take()) == 1000 * limits.INITIAL_WINDOW  # type: ignore[attr-defined]
    read = pair.stream()
    assert len(pour(pair.first, pair.second, pair, read, 4 * limits.MAX_WINDOW)) == 4 * limits.MAX_WINDOW
    assert pair.first.session.credit(read) > limits.MAX_WINDOW // 2


def test_credit_comes_only_from_consuming() -> None:
    pair = Pair()
    number = pair.stream()
    pair.first.session.send(number, bytes(limits.INITIAL_WINDOW))
    pair.exchange()
    assert pair.first.take() == []
    pair.second.take()
    pair.second.session.consume(number, limits.INITIAL_WINDOW // 2)
    pair.exchange()
    assert pair.first.take_one(events.CreditReceived).stream == number
    with pytest.raises(LocalProtocolError):
        pair.second.session.consume(number, limits.INITIAL_WINDOW)


def test_streams_take_turns_and_control_goes_first() -> None:
    pair = Pair()
    streams = [pair.stream() for _ in range(3)]
    for number in streams:
        for _ in range(3):
            pair.first.session.send(number, b"x")
    pair.first.session.ping(1)
    pair.exchange()
    order = [e.stream for e in pair.second.take()]  # type: ignore[attr-defined]
    assert order == streams * 3
    pair.first.take_one(events.PongReceived)


def test_control_queued_late_overtakes_data_queued_early() -> None:
    pair = Pair()
    number = pair.stream()
    pair.first.session.send(number, bytes(limits.INITIAL_WINDOW))
    pair.first.session.ping(1)
    first_frame = pair.first.connection.data_to_send(1)
    assert first_frame[0][4] == frames.PING


# -- ends --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
def test_reset_throws_away_what_is_queued_and_follows_what_was_sent(reverse: bool) -> None:
    pair = Pair()
    sender, receiver = pair.ends(reverse=reverse)
    number = pair.stream(reverse=reverse)
    sender.session.send(number, b"sent")
    pair.exchange()
    sender.session.send(number, b"queued")
    sender.session.reset(number)
    sender.session.reset(number)
    assert sender.session.data_backlog == 0
    pair.exchange()
    assert receiver.take() == [events.DataReceived(number, b"sent"), events.ResetReceived(number, REASON_CLOSED)]
    assert sender.session.credit(number) == -1
    with pytest.raises(LocalProtocolError):
        sender.session.send(number, b"more")


def test_reset_after_eof_that_was_not_sent_yet_still_resets() -> None:
    pair = Pair()
    number = pair.stream()
    pair.first.session.send(number, b"queued")
    pair.first.session.send_eof(number)
    pair.first.session.reset(number)
    pair.exchange()
    assert pair.second.take() == [events.ResetReceived(number, REASON_CLOSED)]


@pytest.mark.behaviour("B4", "B15a")
def test_stop_breaks_the_peers_pipe_and_drops_what_is_under_way() -> None:
    pair = Pair()
    number = pair.stream()
    pair.first.session.send(number, b"under way")
    under_way = pair.first.output()
    pair.first.session.send(number, b"queued")
    pair.second.session.stop(number, REASON_PROCESS_GONE)
    pair.second.session.stop(number)
    pair.second.feed(under_way)
    assert pair.second.take() == []
    pair.exchange()
    assert pair.first.take_one(events.StopReceived) == events.StopReceived(number, REASON_PROCESS_GONE)
    assert pair.first.session.credit(number) == -1
    assert pair.first.session.data_backlog == 0


def test_stop_after_the_peers_eof_was_queued_ends_the_stream_quietly() -> None:
    pair = Pair()
    number = pair.first.session.new_stream(sending=True, receiving=False)
    pair.second.session.accept_stream(number, sending=False, receiving=True)
    pair.first.session.send(number, b"queued")
    pair.first.session.send_eof(number)
    pair.second.session.stop(number)
    pair.first.feed(pair.second.output())
    assert pair.first.take() == []
    assert pair.first.output() == b""
    assert number not in pair.first.session.streams
    assert number not in pair.second.session.streams


def test_a_reader_may_consume_late_after_it_stopped() -> None:
    pair = Pair()
    number = pair.stream()
    pair.first.session.send(number, b"12345")
    pair.exchange()
    pair.second.session.stop(number)
    pair.second.session.consume(number, 5)
    pair.exchange()
    assert pair.second.connection.connected


@pytest.mark.parametrize("ended", [False, True])
def test_stop_gives_up_what_is_unread_and_its_room(ended: bool) -> None:
    pair = Pair()
    free = pair.second.session._pool.free
    number = pair.first.session.new_stream(sending=True, receiving=False)
    pair.second.session.accept_stream(number, sending=False, receiving=True)
    pour(pair.first, pair.second, pair, number, limits.MAX_WINDOW)
    pair.first.session.send(number, b"unread")
    if ended:
        pair.first.session.send_eof(number)
    pair.exchange()
    pair.second.session.stop(number)
    assert pair.second.session.streams == {}
    assert pair.second.session._pool.free == free
    pair.exchange()
    assert pair.first.session.streams == {}


def test_bytes_before_eof_may_be_read_long_after_it() -> None:
    pair = Pair()
    number = pair.first.session.new_stream(sending=True, receiving=False)
    pair.second.session.accept_stream(number, sending=False, receiving=True)
    pair.first.session.send(number, b"12345")
    pair.first.session.send_eof(number)
    pair.exchange()
    pair.second.take()
    assert number not in pair.first.session.streams
    assert number in pair.second.session.streams  # its bytes are still held here
    pair.second.session.consume(number, 2)
    pair.second.session.consume(number, 3)
    assert number not in pair.second.session.streams
    assert pair.second.output() == b""


@pytest.mark.parametrize("first_end, second_end", list(itertools.product(["eof", "reset", "stop"], repeat=2)))
def test_a_closed_stream_is_forgotten_on_both_sides_whatever_ended_it(first_end: str, second_end: str) -> None:
    """Each direction ended in each way, in flight at the same time; nothing is left and the growth is returned."""
    pair = Pair()
    free = pair.second.session._pool.free
    number = pair.stream()
    pour(pair.first, pair.second, pair, number, limits.MAX_WINDOW)
    pour(pair.second, pair.first, pair, number, limits.MAX_WINDOW)
    assert pair.second.session._pool.free < free
    for sender, receiver, end in ((pair.first, pair.second, first_end), (pair.second, pair.first, second_end)):
        if end == "eof":
            sender.session.send_eof(number)
        elif end == "reset":
            sender.session.reset(number)
        else:
            receiver.session.stop(number)
    pair.exchange()
    for side in (pair.first, pair.second):
        assert side.session.streams == {}
        assert side.session._pool.free == free
        assert side.connection.connected


def test_growth_is_held_until_the_rest_is_read() -> None:
    pair = Pair()
    number = pair.stream()
    free = pair.second.session._pool.free
    pour(pair.first, pair.second, pair, number, limits.MAX_WINDOW)
    grown = pair.second.session._pool.free
    pair.first.session.send(number, b"rest")
    pair.first.session.send_eof(number)
    pair.exchange()
    assert pair.second.session._pool.free == grown < free
    pair.second.session.consume(number, 4)
    assert pair.second.session._pool.free == free


def test_the_empty_write_sends_nothing() -> None:
    pair = Pair()
    number = pair.stream()
    pair.first.session.send(number, b"")
    assert pair.first.output() == b""
    assert not pair.first.session.pending


def test_what_is_sent_cannot_change_afterwards() -> None:
    pair = Pair()
    number = pair.stream()
    data = bytearray(b"a" * 8192)
    pair.first.session.send(number, data)  # type: ignore[arg-type]
    data[:] = b"b" * 8192
    pair.exchange()
    assert pair.second.take_one(events.DataReceived).data == b"a" * 8192


# -- the request that opens it -------------------------------------------------------------------------------


def _open_by_request(pair: Pair) -> tuple[int, int, int]:
    session = pair.first.session
    stdin = session.new_stream(sending=True, receiving=False)
    stdout = session.new_stream(sending=False, receiving=True)
    call = session.request("process.create", {"args": ["cat"], "stdin": stdin, "stdout": stdout})
    return call, stdin, stdout


def test_nothing_is_sent_on_a_stream_that_the_peer_may_not_know_yet() -> None:
    pair = Pair()
    call, stdin, stdout = _open_by_request(pair)
    assert pair.first.session.credit(stdin) == 0
    pair.first.session.send(stdin, b"early")
    pair.first.session.send_eof(stdin)
    pair.exchange()
    assert pair.second.take_one(events.RequestReceived)
    pair.second.session.accept_stream(stdin, sending=False, receiving=True)
    pair.second.session.accept_stream(stdout, sending=True, receiving=False)
    pair.second.session.reply(call, {"process": 1, "pid": 2})
    pair.exchange()
    assert [type(e) for e in pair.first.take()] == [events.ReplyReceived]
    assert pair.second.take() == [events.DataReceived(stdin, b"early"), events.EofReceived(stdin, 5)]


def test_credit_is_reported_once_the_request_is_answered() -> None:
    pair = Pair()
    call, stdin, stdout = _open_by_request(pair)
    pair.exchange()
    pair.second.session.accept_stream(stdin, sending=False, receiving=True)
    pair.second.session.reply(call, {"process": 1, "pid": 2})
    pair.exchange()
    assert pair.first.take() == [
        events.ReplyReceived(call, {"process": 1, "pid": 2}),
        events.CreditReceived(stdin),
    ]
    assert pair.first.session.credit(stdin) == limits.INITIAL_WINDOW
    assert stdout in pair.first.session.streams


@pytest.mark.behaviour("B15")
def test_streams_of_a_request_that_failed_end_without_a_frame() -> None:
    pair = Pair()
    call, stdin, stdout = _open_by_request(pair)
    pair.first.session.send(stdin, b"early")
    pair.exchange()
    pair.second.session.fail(call, errors.ProgramNotFound("no cat"))
    pair.exchange()
    assert pair.first.take_one(events.ErrorReceived)
    assert pair.first.session.streams == {}
    assert pair.first.session.data_backlog == 0
    pair.first.session.stop(stdout)
    pair.first.session.reset(stdin)
    assert pair.first.session.send_eof(stdin) == -1
    assert pair.first.output() == b""


def test_ends_asked_for_before_the_answer_are_said_after_it() -> None:
    pair = Pair()
    call, stdin, stdout = _open_by_request(pair)
    pair.first.session.send(stdin, b"early")
    pair.first.session.reset(stdin)
    pair.first.session.stop(stdout)
    pair.exchange()
    assert pair.second.take_one(events.RequestReceived)
    pair.second.session.accept_stream(stdin, sending=False, receiving=True)
    pair.second.session.accept_stream(stdout, sending=True, receiving=False)
    pair.second.session.send(stdout, b"output")
    pair.second.session.reply(call, {"process": 1, "pid": 2})
    pair.exchange()
    assert pair.first.take_one(events.ReplyReceived)
    assert {type(e) for e in pair.second.take()} == {events.ResetReceived, events.StopReceived}
    assert pair.first.session.streams == pair.second.session.streams == {}


@pytest.mark.behaviour("B44")
def test_a_late_reply_still_settles_the_streams_of_its_request() -> None:
    pair = Pair()
    call, stdin, stdout = _open_by_request(pair)
    pair.exchange()
    pair.second.take()
    pair.first.session.forget(call)
    pair.first.session.reset(stdin)
    pair.first.session.stop(stdout)
    pair.second.session.accept_stream(stdin, sending=False, receiving=True)
    pair.second.session.accept_stream(stdout, sending=True, receiving=False)
    pair.second.session.reply(call, {"process": 1, "pid": 2})
    pair.exchange()
    assert pair.first.take() == []
    assert {type(e) for e in pair.second.take()} == {events.ResetReceived, events.StopReceived}
    assert pair.first.session.streams == pair.second.session.streams == {}


def test_a_request_that_names_a_stream_twice_fails_at_its_second_naming() -> None:
    pair = Pair()
    number = pair.first.session.new_stream(sending=True, receiving=True)
    call = pair.first.session.request("process.create", {"stdin": number, "stdout": number})
    pair.exchange()
    pair.second.take()
    pair.second.session.accept_stream(number, sending=False, receiving=True)
    with pytest.raises(InvalidRequest) as caught:
        pair.second.session.accept_stream(number, sending=True, receiving=False)
    pair.second.session.stop(number)
    pair.second.session.fail(call, caught.value)
    pair.exchange()
    assert pair.first.session.streams == pair.second.session.streams == {}
    assert pair.first.connection.connected


@pytest.mark.parametrize("number", [0, -1, 2, 1 << 32, 1 << 63])
def test_a_stream_id_that_the_peer_may_not_name_is_refused(number: int) -> None:
    pair = Pair()
    with pytest.raises(InvalidRequest):
        pair.second.session.accept_stream(number, sending=True, receiving=True)


# -- what a peer may do wrong ----------------------------------------------------------------------------------


@pytest.mark.behaviour("B45")
@pytest.mark.parametrize("kind", sorted(frames.STREAM_TYPES))
def test_a_frame_on_a_stream_of_ours_that_was_never_opened_closes(kind: int) -> None:
    for reverse in (False, True):
        pair = Pair()
        _, side = pair.ends(reverse=reverse)
        ours = 1 if side is pair.first else 2
        side.feed(frames.encode(kind, ours, bytes(frames.INTEGERS.get(kind, 1))))
        assert "was never opened" in side.closed().message


@pytest.mark.parametrize("kind", sorted(frames.STREAM_TYPES))
def test_a_frame_on_a_stream_that_has_ended_is_dropped(kind: int) -> None:
    pair = Pair()
    number = pair.stream()
    pair.first.session.send_eof(number)
    pair.second.session.send_eof(number)
    pair.exchange()
    for side in (pair.first, pair.second):
        side.take()
        assert side.session.streams == {}
        side.feed(frames.encode(kind, number, bytes(frames.INTEGERS.get(kind, 1))))
        assert side.take() == []
        assert side.connection.connected


@pytest.mark.behaviour("B45")
@pytest.mark.parametrize(
    "bad, reason",
    [
        (frames.encode(frames.DATA, 1, b""), "without data"),
        (frames.encode(frames.DATA, 1, bytes(limits.INITIAL_WINDOW + 1)), "with credit for 16384"),
        (frames.encode_integer(frames.EOF, 1, 1), "ends after 1 bytes, 0 arrived"),
        (
            frames.encode(frames.DATA, 1, b"xy") + frames.encode_integer(frames.EOF, 1, 1),
            "after 1 bytes, 2 arrived",
        ),
        (frames.encode_integer(frames.WINDOW, 1, 0), "credit of 0 bytes"),
        (frames.encode_integer(frames.WINDOW, 1, limits.MAX_WINDOW), "makes a window of"),
        (frames.encode_integer(frames.WINDOW, 1, (1 << 32) - 1), "makes a window of"),
    ],
)
def test_what_breaks_flow_control_closes(bad: bytes, reason: str) -> None:
    pair = Pair()
    pair.stream()
    pair.second.feed(bad)
    error = pair.second.closed()
    assert isinstance(error, RemoteProtocolError)
    assert reason in error.message


def test_the_sender_keeps_to_its_credit() -> None:
    pair = Pair()
    number = pair.stream()
    with pytest.raises(LocalProtocolError):
        pair.first.session.send(number, bytes(limits.INITIAL_WINDOW + 1))
    assert pair.first.output() == b""
    with pytest.raises(LocalProtocolError):
        pair.first.session.send(99, b"x")


def test_a_header_alone_is_for_data_that_overtakes_nothing() -> None:
    pair = Pair()
    number = pair.stream()
    session = pair.first.session
    header = session.send_header(number, 5)
    pair.second.feed(header + b"bytes")
    assert [(type(e), bytes(e.data)) for e in pair.second.take()] == [(events.DataReceived, b"bytes")]  # type: ignore[attr-defined]
    assert session.send_eof(number) == 5
    with pytest.raises(LocalProtocolError, match="not open"):
        session.send_header(number, 1)
    other = pair.stream()
    with pytest.raises(LocalProtocolError, match="past the queue"):
        session.send_header(other, 1)
    pair.exchange()
    for size in (0, limits.INITIAL_WINDOW + 1):
        with pytest.raises(LocalProtocolError, match="with credit"):
            session.send_header(other, size)
    session.outbox.keep_for_replay = True
    with pytest.raises(LocalProtocolError, match="past the queue"):
        session.send_header(other, 1)
