"""Tar archives made byte by byte, so that they can be as bad as a test wants them."""

from __future__ import annotations

import struct


def header(
    name: bytes = b"file", kind: bytes = b"0", size: int | bytes = 0, *, target: bytes = b"", prefix: bytes = b""
) -> bytes:
    """One ustar header block, as bad as asked for, with the right checksum."""
    number = size if isinstance(size, bytes) else b"%011o\0" % size
    block = struct.pack(
        "<100s8s8s8s12s12s8sc100s8s32s32s8s8s155s12x",
        *(name, b"0000644\0", b"0000000\0", b"0000000\0", number, b"00000000000\0", b" " * 8, kind, target),
        *(b"ustar\00000", b"", b"", b"0000000\0", b"0000000\0", prefix),
    )
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def pax(*records: tuple[bytes, bytes]) -> bytes:
    """An extended header with these records."""
    body = b"".join(_record(key, value) for key, value in records)
    return header(b"pax", b"x", len(body)) + body + bytes(-len(body) % 512)


def _record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    while len(b"%d" % length) + len(key) + len(value) + 3 != length:
        length = len(b"%d" % length) + len(key) + len(value) + 3
    return b"%d %s=%s\n" % (length, key, value)


def sparse(table: bytes) -> bytes:
    return pax((b"GNU.sparse.map", table), (b"GNU.sparse.size", b"9"))


def file(name: bytes = b"file", data: bytes = b"", **more: bytes) -> bytes:
    return header(name, size=len(data), **more) + data + bytes(-len(data) % 512)
