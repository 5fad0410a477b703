"""The handshake: what may be on the channel before it, how it fails, and that both sides learn why."""

from __future__ import annotations

import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from byre_proto import events, frames, limits
from byre_proto.connection import (
    MAGIC,
    PREFACE_SIZE,
    ChannelEnded,
    Connection,
    ProofRefused,
    RemoteProtocolError,
    SessionLost,
    VersionMismatch,
    preface,
)
from byre_proto.encoding import pack
from byre_proto.session import Session
from tests.fuzz.pair import FIRST_NONCE, SECOND_NONCE, SESSION_ID, End, Pair, unhurried

OTHER_NONCE = b"o" * 16
ZEROS = bytes(16)


def second(**more: Any) -> End:
    return End(Connection(**{"first": False, "name": "agent", "nonce": SECOND_NONCE, **more}))


def first(**more: Any) -> End:
    return End(Connection(**{"first": True, "name": "host", "nonce": FIRST_NONCE, **more}))


def hello(*fields: object) -> bytes:
    standard = [[1, 1], "peer", [], SESSION_ID, 0, b""]
    return frames.encode(frames.HELLO, 0, pack([*fields, *standard[len(fields) :]]))


@pytest.mark.parametrize("chunk", [0, 1, 7])
def test_both_are_connected_however_the_bytes_are_cut(chunk: int) -> None:
    pair = Pair(chunk=chunk, handshake=False)
    pair.exchange()
    (one,), (two,) = pair.first.take(), pair.second.take()
    assert one == events.Connected(1, "agent", frozenset(), False)
    assert two == events.Connected(1, "host", frozenset(), False)
    assert pair.first.session.id == pair.second.session.id


def test_the_opening_of_either_side_may_be_lost() -> None:
    for lost in ("first", "second"):
        pair = Pair(handshake=False)
        getattr(pair, lost).output()
        pair.exchange()
        assert pair.first.connection.connected
        assert pair.second.connection.connected


@unhurried
@given(st.binary(max_size=300), st.binary(max_size=300), st.integers(0, 50))
def test_noise_before_the_preface_is_thrown_away(before_first: bytes, before_second: bytes, chunk: int) -> None:
    pair = Pair(chunk=chunk, handshake=False)
    pair.first.feed(before_first, chunk)
    pair.second.feed(before_second, chunk)
    pair.exchange()
    assert pair.first.connection.connected
    assert pair.second.connection.connected


@pytest.mark.parametrize("tail", [b"", MAGIC, MAGIC[:5], preface(b"x" * 16, ZEROS)[:-1], preface(b"x" * 16, ZEROS)])
@pytest.mark.parametrize("chunk", [0, 1])
def test_a_cut_preface_in_the_noise_does_not_hide_the_real_one(tail: bytes, chunk: int) -> None:
    pair = Pair(chunk=chunk, handshake=False)
    pair.second.feed(tail, chunk)
    pair.first.feed(tail, chunk)
    pair.exchange()
    assert pair.first.connection.connected
    assert pair.second.connection.connected


@pytest.mark.parametrize("cut", [0, 1, 40, PREFACE_SIZE, PREFACE_SIZE + 3])
def test_bytes_of_an_earlier_connection_are_thrown_away(cut: int) -> None:
    old = Pair()
    number = old.stream()
    old.second.session.send(number, b"old" * 100)
    stale = preface(OTHER_NONCE, b"p" * 16) + old.second.output()
    pair = Pair(handshake=False)
    pair.first.feed(stale[cut:])
    pair.exchange()
    assert pair.first.take_one(events.Connected)
    assert pair.second.take_one(events.Connected)


def test_a_preface_of_an_earlier_peer_is_answered_and_not_believed() -> None:
    side = second()
    side.output()
    side.feed(preface(OTHER_NONCE, ZEROS) + hello())
    assert side.output() == preface(SECOND_NONCE, OTHER_NONCE)
    side.feed(preface(FIRST_NONCE, SECOND_NONCE) + hello())
    assert side.output().startswith(preface(SECOND_NONCE, FIRST_NONCE))
    assert side.take_one(events.Connected)


def test_a_flood_of_new_nonces_leaves_one_answer() -> None:
    side = first(session=None)
    for number in range(1, 2000):
        side.feed(preface(number.to_bytes(16, "big"), ZEROS))
    assert len(side.output()) < 300


def test_a_reflecting_channel_connects_nobody() -> None:
    for side in (first(), second()):
        for _ in range(3):
            side.feed(side.output())
        assert side.output() == b""
        assert side.take() == []


def test_zeros_are_nobodys_nonce() -> None:
    side = first()
    side.output()
    side.feed(preface(ZEROS, FIRST_NONCE))
    assert side.output() == b""
    side.feed(preface(SECOND_NONCE, FIRST_NONCE))
    assert side.output().startswith(preface(FIRST_NONCE, SECOND_NONCE))


def test_a_preface_with_a_wrong_checksum_is_noise() -> None:
    side = second()
    side.output()
    damaged = bytearray(preface(FIRST_NONCE, SECOND_NONCE))
    damaged[20] ^= 1
    side.feed(bytes(damaged))
    assert side.output() == b""
    assert zlib.crc32(damaged[:-4]) != int.from_bytes(damaged[-4:], "big")


def test_two_first_sides_refuse_each_other() -> None:
    pair = Pair(handshake=False, second={"first": True})
    pair.exchange()
    assert isinstance(pair.first.closed(), ConnectionError)
    assert isinstance(pair.second.closed(), ConnectionError)


# -- versions (B46) ----------------------------------------------------------------------------------------


@pytest.mark.behaviour("B46")
@pytest.mark.parametrize("ours, theirs, common", [((1, 1), (1, 9), 1), ((1, 4), (2, 3), 3), ((2, 5), (5, 9), 5)])
def test_newer_peers_negotiate_down(ours: tuple[int, int], theirs: tuple[int, int], common: int) -> None:
    for one, two in ((ours, theirs), (theirs, ours)):
        pair = Pair(handshake=False, first={"versions": one}, second={"versions": two})
        pair.exchange()
        assert pair.first.take_one(events.Connected).version == common
        assert pair.second.take_one(events.Connected).version == common


@pytest.mark.behaviour("B46")
def test_no_common_version_is_a_clear_error_on_both_sides() -> None:
    for one, two in (((1, 1), (2, 3)), ((2, 3), (1, 1))):
        pair = Pair(handshake=False, first={"versions": one}, second={"versions": two})
        pair.exchange()
        for side in (pair.first, pair.second):
            error = side.closed()
            assert isinstance(error, VersionMismatch)
            assert "1 to 1" in str(error)
            assert "2 to 3" in str(error)
            assert "upgrade" in error.hint


@pytest.mark.behaviour("B46")
def test_the_hello_of_a_newer_peer_may_have_more_fields() -> None:
    side = second()
    side.output()
    side.feed(preface(FIRST_NONCE, SECOND_NONCE) + hello([1, 7], "new", [], SESSION_ID, 0, b"", {"more": [1]}))
    assert side.take_one(events.Connected).version == 1


@pytest.mark.behaviour("B46")
def test_the_version_is_read_from_a_hello_of_any_other_shape() -> None:
    side = second()
    side.feed(preface(FIRST_NONCE, SECOND_NONCE) + frames.encode(frames.HELLO, 0, pack([[7, 9], {"all": "new"}])))
    assert isinstance(side.closed(), VersionMismatch)


@pytest.mark.parametrize(
    "fields",
    [
        ([],),
        ([1],),
        ([1, 2, 3],),
        (["1", "2"],),
        ([True, True],),
        (1,),
        ([1, 1], b"name"),
        ([1, 1], "name", {}),
        ([1, 1], "name", [1]),
        ([1, 1], "name", [], b"short"),
        ([1, 1], "name", [], SESSION_ID, -1),
        ([1, 1], "name", [], SESSION_ID, "0"),
        ([1, 1], "name", [], SESSION_ID, 0, "text"),
    ],
)
def test_a_malformed_hello_ends_the_connection_with_a_reason(fields: tuple[object, ...]) -> None:
    side = second()
    side.feed(preface(FIRST_NONCE, SECOND_NONCE) + hello(*fields))
    assert isinstance(side.closed(), RemoteProtocolError)
    sent = side.output().split(MAGIC)[-1][PREFACE_SIZE - len(MAGIC) :]
    assert sent[4] == frames.CLOSE
    assert b"protocol-error" in sent


def test_anything_but_hello_and_close_is_refused_before_hello() -> None:
    for kind in frames.TYPES:
        if kind in (frames.HELLO, frames.CLOSE):
            continue
        side = second()
        payload = bytes(frames.INTEGERS.get(kind, 1))
        number = 1 if kind in frames.STREAM_TYPES else 0
        side.feed(preface(FIRST_NONCE, SECOND_NONCE) + frames.encode(kind, number, payload))
        assert "before HELLO" in side.closed().message


def test_a_second_hello_is_refused() -> None:
    pair = Pair()
    pair.second.feed(hello())
    assert "HELLO has no place here" in pair.second.closed().message


# -- the secret --------------------------------------------------------------------------------------------


def test_the_same_secret_on_both_sides_connects() -> None:
    pair = Pair(first={"secret": b"s" * 32}, second={"secret": b"s" * 32})
    assert pair.first.connection.connected
    assert pair.second.connection.connected


@pytest.mark.parametrize("one, two", [(b"a", b"b"), (b"a", None), (None, b"b")])
def test_a_wrong_or_missing_secret_is_refused_on_both_sides(one: bytes | None, two: bytes | None) -> None:
    pair = Pair(handshake=False, first={"secret": one}, second={"secret": two})
    pair.exchange()
    for side in (pair.first, pair.second):
        error = side.closed()
        assert isinstance(error, ProofRefused)
        assert isinstance(error, PermissionError)


def test_a_peer_that_reflects_the_proof_is_refused() -> None:
    """The first side's HELLO sent back, with the nonces that make it look like an answer."""
    side = first(secret=b"s", session=None)
    side.output()
    side.feed(preface(OTHER_NONCE, FIRST_NONCE))
    sent = side.output()
    side.feed(sent[PREFACE_SIZE:])
    assert isinstance(side.closed(), ProofRefused)


def test_who_has_no_secret_cannot_take_or_reset_a_session() -> None:
    session = Session(first=False)
    session.id, session.begun, session.carrier = SESSION_ID, True, b"live"
    session.events.append(events.PongReceived(1))
    side = second(secret=b"s", session=session)
    side.feed(preface(FIRST_NONCE, SECOND_NONCE) + hello([1, 1], "x", [], OTHER_NONCE, 0, b"x" * 32))
    assert isinstance(side.closed(), ProofRefused)
    assert side.session is session
    assert session.carrier == b"live"
    assert list(session.events) == [events.PongReceived(1)]


# -- ends --------------------------------------------------------------------------------------------------


def test_the_end_of_the_channel_is_an_error_in_every_state() -> None:
    side = second()
    side.connection.receive_eof()
    assert isinstance(side.closed(), ChannelEnded)
    pair = Pair()
    pair.first.connection.receive_eof()
    assert isinstance(pair.first.closed(), ChannelEnded)
    assert pair.first.output() == b""


def test_a_close_in_good_order_is_no_error() -> None:
    pair = Pair()
    pair.first.connection.close()
    pair.first.connection.close()
    pair.exchange()
    assert pair.first.closed() is None
    assert pair.second.closed() is None
    pair.second.connection.receive_eof()
    assert pair.second.take() == []


def test_a_close_says_why_with_its_text_escaped() -> None:
    pair = Pair()
    pair.first.connection.close(ProofRefused("no\x1b[2J\ud800", hint="try\x07"))
    pair.exchange()
    error = pair.second.closed()
    assert isinstance(error, ProofRefused)
    assert "\x1b" not in str(error)
    assert "no\\x1b[2J\\ud800" in error.message
    assert error.hint == "try\\x07"


def test_nothing_is_taken_in_after_the_end() -> None:
    pair = Pair()
    pair.second.connection.close()
    pair.first.session.ping(1)
    pair.exchange()
    assert [type(e) for e in pair.second.take()] == [events.Closed]


def test_a_new_preface_on_an_open_connection_says_so() -> None:
    pair = Pair()
    pair.second.feed(preface(OTHER_NONCE, ZEROS))
    assert "new connection" in pair.second.closed().message


def test_a_session_has_one_connection_at_a_time() -> None:
    pair = Pair()
    session = pair.first.session
    Connection(first=True, name="again", session=session)
    session.ping(5)
    pair.first.connection.data_to_send()
    assert isinstance(pair.first.closed(), SessionLost)


def test_noise_without_end_ends_the_wait() -> None:
    side = second()
    block = b"boot log\r\n" * 100_000
    for _ in range(limits.MAX_NOISE // len(block)):
        side.feed(block)
        assert side.take() == []
    side.feed(block)
    assert "no preface" in side.closed().message
    assert side.output() == preface(SECOND_NONCE, ZEROS)
