"""Frames on a bad line: what is sent, and that whatever arrives is a frame or noise."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from byre_proto.stuffing import CONTROLS, FLAG, MAX_NOISE_KEPT, SPECIAL, Splitter, checked, stuffed, unstuffed

TEXT = b"[    1.234567] a kernel's message\r\n"


def pieces(splitter: Splitter, data: bytes) -> list[bytes]:
    return list(splitter.pieces(data))


@given(st.binary(min_size=1, max_size=600), st.integers(0, 2**32 - 1))
def test_a_frame_comes_back_and_has_nothing_that_a_terminal_acts_on(body: bytes, seed: int) -> None:
    frame = stuffed(body, seed)
    assert not set(frame) & {*CONTROLS, 0x7F, 0xFF}
    (piece,) = pieces(Splitter(len(body)), frame)
    assert checked(unstuffed(piece), seed) == body
    assert checked(unstuffed(piece), seed ^ 1) == b""


def test_every_byte_there_is() -> None:
    body = bytes(range(256)) * 2
    assert len(stuffed(body, 0)) >= len(body) + 2 * len(SPECIAL)
    assert checked(unstuffed(stuffed(body, 0)[1:-1]), 0) == body


@given(st.lists(st.tuples(st.integers(0, 300), st.sampled_from(CONTROLS))))
def test_control_characters_that_the_line_puts_in_do_no_harm(inserted: list[tuple[int, int]]) -> None:
    frame = bytearray(stuffed(b"what it carries", 7))
    for at, byte in inserted:
        frame.insert(min(at, len(frame) - 1), byte)
    (piece,) = [p for p in pieces(Splitter(100), bytes(frame)) if p.strip(CONTROLS)]
    assert checked(unstuffed(piece), 7) == b"what it carries"


@pytest.mark.parametrize("piece", [b"ab\x7d", b"ab\x7d\x7dcd", b"ab\x7dzcd", b"\x7d", b""])
def test_what_nobody_sends_is_nothing(piece: bytes) -> None:
    assert unstuffed(piece) == b""
    assert checked(unstuffed(piece), 0) == b""


def test_a_message_between_frames_and_one_in_a_frame() -> None:
    frame = stuffed(b"frame", 0)
    splitter = Splitter(100)
    found = pieces(splitter, TEXT + frame + TEXT + frame[:4] + TEXT + frame[4:] + frame + TEXT)
    assert [checked(unstuffed(piece), 0) for piece in found] == [b"", b"frame", b"", b"", b"frame"]
    assert found[0] == found[2] == TEXT


@given(st.binary(max_size=2000), st.integers(1, 50))
def test_however_it_is_cut(data: bytes, size: int) -> None:
    data = TEXT + stuffed(data[:20] + b".", 0) + data + FLAG
    whole, cut = Splitter(50), Splitter(50)
    one = [body for p in pieces(whole, data) if (body := checked(unstuffed(p), 0))]
    other = []
    for at in range(0, len(data), size):
        other += [body for p in pieces(cut, data[at : at + size]) if (body := checked(unstuffed(p), 0))]
    assert one == other != []


def test_what_has_no_flag_is_noise_and_is_bounded() -> None:
    splitter = Splitter(500)
    for _ in range(200):
        assert pieces(splitter, b"x" * 1000) == []
    taken = splitter.take_noise()
    assert len(taken) <= MAX_NOISE_KEPT
    assert splitter.take_noise() == b""
    splitter.noise(b"old" + b"n" * MAX_NOISE_KEPT)
    assert splitter.take_noise() == b"n" * MAX_NOISE_KEPT
    assert [checked(unstuffed(p), 0) for p in pieces(splitter, FLAG + stuffed(b"again", 0))][-1] == b"again"
