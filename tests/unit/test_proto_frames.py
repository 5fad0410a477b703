"""Frames alone: lengths, types and cuts."""

from __future__ import annotations

import itertools
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from byre_proto import frames
from byre_proto.frames import FrameBuffer, LocalProtocolError, RemoteProtocolError
from tests.fuzz.pair import unhurried

KINDS = sorted(frames.TYPES)


def payload_of(kind: int, size: int = 5) -> bytes:
    size = frames.INTEGERS.get(kind, size)
    return bytes(i % 256 for i in range(size))


def stream_of(kind: int) -> int:
    return 7 if kind in frames.STREAM_TYPES else 0


some_frames = st.lists(
    st.sampled_from(KINDS).flatmap(
        lambda kind: st.tuples(
            st.just(kind),
            st.integers(1, 2**32 - 1) if kind in frames.STREAM_TYPES else st.just(0),
            st.binary(min_size=frames.INTEGERS.get(kind, 0), max_size=frames.INTEGERS.get(kind, 40)),
        )
    )
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [0, 1])
def test_every_type_whole_bytewise_and_with_trailing_data(kind: int, cut: int) -> None:
    one = (kind, stream_of(kind), payload_of(kind))
    data = frames.encode(*one)
    trailing = frames.encode(frames.PING, 0, bytes(8))
    buffer = FrameBuffer()
    if not cut:
        assert list(buffer.frames(data)) == [one]
        assert list(buffer.frames(data + trailing)) == [one, (frames.PING, 0, bytes(8))]
        assert list(buffer.frames(data + trailing[:-1])) == [one]
        assert list(buffer.frames(trailing[-1:] + data)) == [(frames.PING, 0, bytes(8)), one]
    else:
        for byte in data[:-1]:
            assert list(buffer.frames(bytes([byte]))) == []
        assert list(buffer.frames(data[-1:] + trailing)) == [one, (frames.PING, 0, bytes(8))]


@unhurried
@given(some_frames, st.lists(st.integers(0, 600)), st.sampled_from([bytes, bytearray, memoryview]))
def test_any_cut_gives_the_same_frames(sent: list[tuple[int, int, bytes]], cuts: list[int], kind: type) -> None:
    data = b"".join(frames.encode(*frame) for frame in sent)
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    buffer = FrameBuffer()
    got = []
    for begin, end in itertools.pairwise(places):
        got += list(buffer.frames(kind(data[begin:end])))
    assert got == sent
    assert all(type(payload) is (memoryview if kind == frames.DATA else bytes) for kind, _, payload in got)


@unhurried
@given(some_frames, st.integers(0, 600))
def test_what_a_frame_lacks_ends_it(sent: list[tuple[int, int, bytes]], cut: int) -> None:
    data = b"".join(frames.encode(*frame) for frame in sent)
    buffer = FrameBuffer()
    got, at = list(buffer.frames(data[:cut])), min(cut, len(data))
    while buffer.lacking:  # of a header first, then of what that announces
        lacking = buffer.lacking
        assert len(data[at : at + lacking]) == lacking
        got += list(buffer.frames(data[at : at + lacking]))
        at += lacking
    assert sum(frames.HEADER_SIZE + len(payload) for _, _, payload in got) == at
    assert got == sent[: len(got)]


@unhurried
@given(st.binary(max_size=80), st.integers(1, 9))
def test_arbitrary_bytes_give_frames_or_a_protocol_error(data: bytes, chunk: int) -> None:
    def run(chunk: int) -> tuple[list[tuple[int, int, bytes]], str]:
        buffer, got = FrameBuffer(), []
        try:
            for start in range(0, len(data), chunk):
                for frame in buffer.frames(data[start : start + chunk]):
                    got.append(frame)
        except RemoteProtocolError as error:
            return got, error.message
        return got, ""

    assert run(chunk) == run(len(data) or 1)


@pytest.mark.parametrize("size", [0, 1, frames.JOINED_BELOW - 1, frames.JOINED_BELOW, frames.MAX_DATA])
def test_a_data_frame_is_the_same_in_one_or_two_buffers(size: int) -> None:
    payload = bytes(size)
    buffers = frames.encode_data(9, payload)
    assert b"".join(buffers) == frames.encode(frames.DATA, 9, payload)
    if size >= frames.JOINED_BELOW:
        assert buffers[1] is payload


@pytest.mark.behaviour("B45")
@pytest.mark.parametrize("kind", KINDS)
def test_each_types_limit_holds_at_the_sender_and_at_the_receiver(kind: int) -> None:
    name, limit = frames.TYPES[kind]
    largest = payload_of(kind, limit)
    assert len(largest) == limit
    assert list(FrameBuffer().frames(frames.encode(kind, stream_of(kind), largest))) == [
        (kind, stream_of(kind), largest)
    ]
    with pytest.raises(LocalProtocolError, match=name):
        frames.encode(kind, stream_of(kind), largest + b"x")
    with pytest.raises(RemoteProtocolError, match=name):
        list(FrameBuffer().frames(frames.HEADER.pack(limit + 1, kind, 0, 0, stream_of(kind))))


@pytest.mark.behaviour("B45")
@pytest.mark.parametrize(
    "header, reason",
    [
        ((0, 0, 0, 0, 0), "unknown frame type 0"),
        ((0, 17, 0, 0, 0), "unknown frame type 17"),
        ((8, frames.PING, 1, 0, 0), "reserved bits"),
        ((8, frames.PING, 0, 1, 0), "reserved bits"),
        ((8, frames.PING, 0, 0, 1), "PING frame with stream id 1"),
        ((1, frames.DATA, 0, 0, 0), "DATA frame with stream id 0"),
        ((1, frames.DATA, 0x80, 0, 1), "reserved bits"),
        ((7, frames.PING, 0, 0, 0), "PING frame has 8 bytes, not 7"),
        ((0, frames.EOF, 0, 0, 1), "EOF frame has 8 bytes, not 0"),
        ((0x89425952, 0x45, 0x0D, 0x0A1A, 0), "the peer began a new connection"),
    ],
)
def test_a_header_that_no_peer_may_send_is_refused_at_its_last_byte(
    header: tuple[int, int, int, int, int], reason: str
) -> None:
    data = frames.HEADER.pack(*header)
    for chunk in (1, len(data)):
        buffer = FrameBuffer()
        with pytest.raises(RemoteProtocolError, match=reason):
            for start in range(0, len(data), chunk):
                list(buffer.frames(data[start : start + chunk]))


@pytest.mark.behaviour("B45")
def test_a_claimed_length_allocates_nothing() -> None:
    tracemalloc.start()
    buffers = [FrameBuffer() for _ in range(100)]
    for buffer in buffers:
        list(buffer.frames(frames.HEADER.pack(frames.TYPES[frames.REQUEST][1], frames.REQUEST, 0, 0, 0)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


def test_types_and_names_are_distinct_and_replayed_ones_are_known() -> None:
    assert len({name for name, _ in frames.TYPES.values()}) == len(frames.TYPES)
    assert set(frames.TYPES) >= frames.REPLAYED | frames.STREAM_TYPES | set(frames.INTEGERS)
    assert all(getattr(frames, name) == kind for kind, (name, _) in frames.TYPES.items())
