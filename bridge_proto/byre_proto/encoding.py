"""Control payloads as msgpack: what is sent can be decoded by the peer, what is received stays within the limits.

Rule: `pack` refuses whatever `unpack` on the other side would refuse, so that a mistake fails alone where it was
made (B45).  Strings are UTF-8; other bytes in them travel as lone surrogates (surrogateescape, PEP 383), because
Linux arguments, environments and paths are bytes.
"""

from __future__ import annotations

import msgpack

from . import limits
from .errors import printable
from .frames import LocalProtocolError, RemoteProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def pack(value: object) -> bytes:
    """msgpack of a control payload.  Raises `LocalProtocolError` for what the peer could not decode."""
    try:
        payload: bytes = msgpack.Packer(use_bin_type=True, unicode_errors="surrogateescape").pack(value)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise LocalProtocolError(f"cannot be encoded: {error}") from error
    try:
        unpack(payload)
    except RemoteProtocolError as error:
        raise LocalProtocolError(f"cannot be encoded: {error.message}") from error
    return payload


def unpack(payload: bytes) -> Any:
    """The value of a control payload, decoded within the limits.  Raises `RemoteProtocolError`.

    The dry run comes first: msgpack allocates a list of the length that its header claims, and nested claims in
    3 KiB of input would make it 128 MiB.  After it, no more elements are claimed than there are bytes.
    """
    try:
        dry_run = msgpack.Unpacker(read_size=len(payload) or 1, max_buffer_size=len(payload) or 1)
        dry_run.feed(payload)
        dry_run.skip()
        return msgpack.unpackb(
            payload,
            raw=False,
            unicode_errors="surrogateescape",
            strict_map_key=True,
            max_array_len=limits.MAX_ELEMENTS,
            max_map_len=limits.MAX_ELEMENTS,
            max_ext_len=0,  # timestamps do not pass by the hook
            ext_hook=_refuse_extension,
        )
    except Exception as error:  # msgpack raises whatever its C code does; all of it means the same
        reason = printable(str(error) or type(error).__name__)[:200]
        raise RemoteProtocolError(f"malformed message: {reason}") from error


def _refuse_extension(_code: int, _data: bytes) -> Any:
    raise ValueError("extension types are not used")


def unpack_fields(payload: bytes, *kinds: type | None, more: bool = False) -> list[Any]:
    """The fields of a control payload that is a list of just these kinds; None stands for "int or nil".

    `more`: a newer peer may have added fields at the end; they are cut off.  Raises `RemoteProtocolError`.
    """
    value = unpack(payload)
    if not isinstance(value, list) or len(value) < len(kinds) or (len(value) > len(kinds) and not more):
        raise RemoteProtocolError(f"a message of {len(kinds)} fields was expected")
    for field, kind in zip(value, kinds):
        if type(field) is not (kind or int) and not (kind is None and field is None):
            expected = kind.__name__ if kind else "int or nil"
            raise RemoteProtocolError(f"a {type(field).__name__} stands where {expected} was expected")
    return value[: len(kinds)]


def text(value: str, most: int) -> str:
    """`value` cut to `most` characters, with what no encoder takes (lone surrogates) escaped."""
    return value[:most].encode("utf-8", "backslashreplace").decode("utf-8")
