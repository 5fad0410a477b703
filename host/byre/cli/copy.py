"""`byre cp`: files into a container and out of it, as themselves or as a tar."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, NamedTuple

from byre.errors import InvalidRequest

from . import foreground
from .selection import attach, talkative
from .status import say

if TYPE_CHECKING:
    import argparse

    from byre.copies import Copied
    from byre.files import Files

#: stdin or stdout, as a tar.
STREAM = "-"


class Operand(NamedTuple):
    """What can be copied from or to; `container` None is this host, "" the VM itself."""

    container: str | None
    path: str

    @classmethod
    def of(cls, text: str) -> Operand:
        """As container users write it: a colon after a container's name; "/" or "." first is a local path."""
        container, colon, path = text.partition(":")
        if not colon or text.startswith(("/", ".")) or "/" in container:
            return cls(None, text)
        if not path:
            raise InvalidRequest(f"{text!r} names no path", hint=f"{container}:/ is the root")
        return cls(container, path)


def cp(arguments: argparse.Namespace) -> int:
    return foreground.run(lambda _: _cp(arguments))


async def _cp(arguments: argparse.Namespace) -> int:
    source, destination = Operand.of(arguments.source), Operand.of(arguments.destination)
    if (source.container is None) == (destination.container is None):
        raise InvalidRequest(
            "one of SRC and DST is in a container, the other is on this host",
            hint="between two: byre cp A:PATH - | byre cp - B:PATH",
        )
    if source.container is None:
        async with _files(arguments, destination) as files:
            copied = await _copy_in(arguments, files, source.path, destination.path)
    else:
        async with _files(arguments, source) as files:
            copied = await _copy_out(arguments, files, source.path, destination.path)
    _report(copied, talkative(arguments))
    return 0


@contextlib.asynccontextmanager
async def _files(arguments: argparse.Namespace, operand: Operand) -> AsyncIterator[Files]:
    async with await attach(arguments.vm_name) as vm:
        if not operand.container:
            yield vm.files
            return
        container = await vm.open_container(operand.container)
        try:
            yield container.files
        finally:
            await container.close()


async def _copy_in(arguments: argparse.Namespace, files: Files, source: str, destination: str) -> Copied:
    if source != STREAM:
        return await files.copy_in(source, destination, archive=arguments.archive, follow=arguments.follow_link)
    if os.isatty(0):
        raise InvalidRequest("stdin is a terminal, not a tar", hint="tar -c DIRECTORY | byre cp - CONTAINER:PATH")
    return await files.put_archive(destination, sys.stdin.buffer)


async def _copy_out(arguments: argparse.Namespace, files: Files, source: str, destination: str) -> Copied:
    if destination != STREAM:
        return await files.copy_out(source, destination, archive=arguments.archive, follow=arguments.follow_link)
    if os.isatty(1):
        raise InvalidRequest("stdout is a terminal: it would get a tar", hint="byre cp CONTAINER:PATH - | tar -t")
    return await files.get_archive(source, sys.stdout.buffer, follow=arguments.follow_link)


def _report(copied: Copied, talkative: bool) -> None:
    """What was not copied is said always."""
    if talkative:
        say(f"copied {copied.entries} entries, {copied.bytes} bytes")
    if copied.sockets:
        say(f"left out {copied.sockets} sockets")
    for what, count in copied.dropped.items():
        say(f"not taken of {count} entries: {what}")
