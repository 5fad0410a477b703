"""Control payloads: what one side packs the other unpacks, and what it refuses costs nothing."""

from __future__ import annotations

import tracemalloc
from typing import Any

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from byre_proto import limits
from byre_proto.encoding import pack, text, unpack, unpack_fields
from byre_proto.errors import printable
from byre_proto.frames import LocalProtocolError, RemoteProtocolError
from tests.fuzz.pair import unhurried

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats(allow_nan=False) | st.binary()
    | st.text() | st.binary().map(lambda b: b.decode("utf-8", "surrogateescape")),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text() | st.binary(), inner, max_size=5),
    max_leaves=20,
)  # fmt: skip


@unhurried
@given(values)
def test_what_can_be_packed_comes_back(value: Any) -> None:
    try:
        packed = pack(value)
    except LocalProtocolError:  # only a string with a surrogate that stands for no byte
        assert "\\ud" in ascii(value)
        return
    assert unpack(packed) == value


@unhurried
@given(st.binary(max_size=200))
@example(b"\xdc\xff\xff" * 1000)
@example(b"\xde\xff\xff\xa0" * 300)
@example(b"\xdd\xff\xff\xff\xff" * 50)
@example(b"\x81" * 2000)
@example(b"\xd4\x00\x00")
@example(b"\xd7\xff" + bytes(8))
@example(b"\xc7\x0c\xff" + bytes(12))
@example(b"\x81\x90\x01")
def test_any_bytes_are_a_value_or_a_protocol_error(data: bytes) -> None:
    try:
        value = unpack(data)
    except RemoteProtocolError as error:
        assert error.message == printable(error.message)
        return
    pack(value)


@pytest.mark.behaviour("B45")
@pytest.mark.parametrize(
    "hostile",
    [
        b"\xdc\x3f\xff" * 1000,
        b"\xdc\x3f\xff" * (limits.MAX_CONTROL // 3),
        b"\xde\x3f\xff\xa0" * 1000,
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
    ],
)
def test_claimed_sizes_allocate_little_more_than_the_frame(hostile: bytes) -> None:
    """Nested lists that claim 16,383 elements each would be 128 MiB if they were believed."""
    with pytest.raises(RemoteProtocolError):
        unpack(b"\x90" + hostile)
    tracemalloc.start()
    with pytest.raises(RemoteProtocolError):
        unpack(hostile)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * len(hostile) + (1 << 18)


def test_decoding_multiplies_by_a_bounded_factor() -> None:
    """The worst there is: a frame full of empty maps.  The factor stands in WIRE.md."""
    inner = b"\xdc\x3f\xff" + b"\x80" * 16383
    payload = b"\xdc\x00\x3c" + inner * 60
    tracemalloc.start()
    value = unpack(payload)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(value) == 60
    assert size < 90 * len(payload)


def test_the_element_limit_holds_at_the_sender_and_at_the_receiver() -> None:
    for most in ([0] * limits.MAX_ELEMENTS, {str(i): 0 for i in range(limits.MAX_ELEMENTS)}):
        assert unpack(pack(most)) == most
    for over in ([0] * (limits.MAX_ELEMENTS + 1), {str(i): 0 for i in range(limits.MAX_ELEMENTS + 1)}):
        with pytest.raises(LocalProtocolError):
            pack(over)
        with pytest.raises(RemoteProtocolError):
            unpack(msgpack.packb(over))


@pytest.mark.parametrize(
    "value",
    [object(), {1: 2}, {(1,): 2}, "\ud800", 1 << 64, {None: 1}, msgpack.ExtType(5, b""), msgpack.Timestamp(1)],
)
def test_what_the_peer_would_refuse_is_refused_here(value: object) -> None:
    with pytest.raises(LocalProtocolError):
        pack([value])


def test_a_list_without_end_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(LocalProtocolError):
        pack(endless)


def test_fields_are_of_just_the_kinds_that_were_asked_for() -> None:
    assert unpack_fields(pack([1, "a", None]), int, str, None) == [1, "a", None]
    assert unpack_fields(pack([1, "a", 5]), int, str, None) == [1, "a", 5]
    assert unpack_fields(pack([1, 2, 3]), int, more=True) == [1]
    for value in ([1], [1, 2, 3], {}, 5, None, ["1", 2], [True, 2], [1, 2.0]):
        with pytest.raises(RemoteProtocolError):
            unpack_fields(pack(value), int, None)


@unhurried
@given(st.text(), st.integers(0, 50))
def test_text_can_always_be_encoded(value: str, most: int) -> None:
    pack(text(value, most))
    pack(text(value + "\ud800", most))


@unhurried
@given(st.text(st.characters()))
def test_printable_text_has_no_control_characters(value: str) -> None:
    assert all(c in "\n\t" or c.isprintable() for c in printable(value))
    if value.isprintable():
        assert printable(value) == value
