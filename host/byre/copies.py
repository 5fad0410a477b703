"""A copy under way: what blocks on this host, in threads, and the guest's operation, brought together.

Rule: one batch at a time, so that neither side holds more than that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, TypeAlias

from byre_proto import records
from byre_proto.errors import printable

from .file_operation import CHUNK, FileStatus, Operation, malformed
from .machines.spawn import in_thread

#: Linux: XATTR_NAME_MAX.
MAX_DROPPED_NAME = 255


class Copied(NamedTuple):
    """What a copy has done.

    entries, bytes  of what was copied
    sockets         that were left out
    dropped         what the receiving side did not take ("owner", a name of an attribute), and how often
    """

    entries: int
    bytes: int
    sockets: int = 0
    dropped: dict[str, int] = {}  # noqa: RUF012  a NamedTuple's default; nobody changes it


class Target(Protocol):
    """What takes the entries and data of a copy; blocking."""

    dropped: dict[str, int]

    def take(self, found: bytes | FileStatus) -> None: ...
    def finish(self) -> None: ...
    def close(self) -> None: ...


#: By the top of what comes: what takes it, and the name that the top gets there ("." for what is in it alone).
Maker: TypeAlias = Callable[[FileStatus], tuple[Target, str]]


async def send(operation: Operation, pieces: Iterable[bytes]) -> Copied:
    """Records that are made in a thread, to the guest."""
    batches = _batches(iter(pieces))
    while batch := await in_thread(lambda: next(batches, None)):
        await operation.send(*batch)
    return _copied(await operation.finish(), {})


async def receive(operation: Operation, make: Maker) -> Copied:
    """What the guest sends, to what `make` makes in a thread for it."""
    some = await operation.receive()
    if not some or isinstance(some[0], bytes):
        raise malformed("a copy without its top")
    top = FileStatus.of_record(some[0])
    target, name = await in_thread(lambda: make(top))
    try:
        while some:
            await in_thread(functools.partial(_take, target, some, name))
            some = await operation.receive()
        await in_thread(target.finish)
    finally:
        await operation.bridge.finish(in_thread(target.close))
    return _copied(operation.result or {}, target.dropped)


def _batches(pieces: Iterator[bytes]) -> Iterator[list[bytes]]:
    """What is sent at once."""
    batch: list[bytes] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece)
        if size >= CHUNK:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _take(target: Target, some: Iterable[bytes | list[Any]], name: str) -> None:
    """Give a target what came, below the name that it gets here."""
    for found in some:
        if isinstance(found, bytes):
            target.take(found)
            continue
        entry = FileStatus.of_record(found)
        if name != ".":
            entry = _renamed(entry, name)
        target.take(entry)


def _renamed(entry: FileStatus, top: str) -> FileStatus:
    """An entry whose top has a name."""
    target = f"{top}/{entry.target}" if entry.kind == records.LINK else entry.target
    return replace(entry, name=top if entry.name == "." else f"{top}/{entry.name}", target=target)


def _copied(result: dict[str, Any], dropped: dict[str, int]) -> Copied:
    numbers = [result.get(name, 0) for name in ("entries", "bytes", "sockets")]
    theirs = result.get("dropped", {})
    if not isinstance(theirs, dict) or any(type(number) is not int for number in (*numbers, *theirs.values())):
        raise malformed("a result")
    named = {printable(str(name))[:MAX_DROPPED_NAME]: number for name, number in theirs.items()}
    return Copied(numbers[0], numbers[1], numbers[2], {**named, **dropped})
