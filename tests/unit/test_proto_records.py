"""The records of file operations: what is sent comes back however it is cut, and what is malformed is refused."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest

from byre_proto import records
from byre_proto.frames import RemoteProtocolError

ENTRY = ("entry", "a\udcff/ü\n", "file", 0o4755, 0, 1000, -5, 1 << 40, "", [], {"user.x": b"\0\xff"})
STREAM = b"".join(
    (
        records.message(*ENTRY),
        records.header(5) + b"12345",
        records.header(records.MAX_RECORD) + bytes(records.MAX_RECORD),
        records.message("result", {"entries": 1}),
    )
)


def decoded(stream: bytes, size: int) -> list[Any]:
    decoder, found = records.Decoder(), []
    for start in range(0, len(stream), size):
        decoder.feed(stream[start : start + size])
        while (one := decoder.take()) is not None:
            if isinstance(one, bytes) and found and isinstance(found[-1], bytes):
                found[-1] += one
            else:
                found.append(one)
    assert decoder.idle
    return found


@pytest.mark.parametrize("size", [1, 7, 4096, 1 << 20])
def test_records_come_back_however_they_are_cut(size: int) -> None:
    data = b"12345" + bytes(records.MAX_RECORD)
    assert decoded(STREAM, size) == [list(ENTRY), data, ["result", {"entries": 1}]]


@pytest.mark.parametrize(
    "stream",
    [
        records.header(records.MAX_RECORD + 1),
        (records.DATA | 0).to_bytes(4, "big"),
        (records.MAX_MESSAGE + 1).to_bytes(4, "big"),
        b"\0\0\0\0",
        b"\0\0\0\1\x80",  # a map
        b"\0\0\0\1\x90",  # an empty list
        b"\0\0\0\2\x91\x01",  # a number for a tag
        b"\0\0\0\x05\xdd\xff\xff\xff\xff",  # a list of four billion
        len(deep := b"\x91" * 2000).to_bytes(4, "big") + deep,
        len(extension := msgpack.packb(["x", msgpack.ExtType(1, b"")])).to_bytes(4, "big") + extension,
    ],
)
def test_what_is_malformed_is_refused(stream: bytes) -> None:
    decoder = records.Decoder()
    decoder.feed(stream)
    with pytest.raises(RemoteProtocolError):
        decoder.take()


def test_an_end_in_the_middle_is_seen() -> None:
    decoder = records.Decoder()
    decoder.feed(STREAM[:-1])
    while decoder.take() is not None:
        pass
    assert not decoder.idle
