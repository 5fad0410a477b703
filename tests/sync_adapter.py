"""byre.sync behind the asyncio interfaces, so that the conformance suite runs through it unchanged.

Every call goes through the blocking facade in a thread; nothing here reaches round it to the asyncio object.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, NamedTuple

import byre.sync

#: One thread for each call under way: blocking calls must not wait for each other.
_threads = concurrent.futures.ThreadPoolExecutor(512, "sync-adapter")


async def _blocking(function: Any, *arguments: Any, **options: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(_threads, lambda: function(*arguments, **options))


class _Reader:
    def __init__(self, file: Any) -> None:
        self._file = file

    async def read(self, n: int = -1) -> bytes:
        data: bytes = await _blocking(self._file.read if n < 0 else self._file.read1, n)
        return data

    async def readuntil(self, separator: bytes) -> bytes:
        found = bytearray()
        while not found.endswith(separator):
            byte = await _blocking(self._file.read, 1)
            if not byte:
                raise asyncio.IncompleteReadError(bytes(found), None)
            found += byte
        return bytes(found)


class _Writer:
    """As asyncio's: `write` starts on its way at once, `drain` waits for it and raises what went wrong."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._last: asyncio.Task[None] | None = None

    def write(self, data: bytes) -> None:
        self._last = asyncio.ensure_future(self._send(bytes(data), self._last))

    async def _send(self, data: bytes, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await before
        await _blocking(self._file.write, data)
        await _blocking(self._file.flush)

    async def drain(self) -> None:
        if self._last is not None:
            await self._last


class _SyncConnection:
    """A connection of `byre.sync`."""

    def __init__(self, connection: byre.sync.Connection) -> None:
        self._connection = connection
        reader, writer = connection
        self.reader, self.writer = _Reader(reader), _Writer(writer)

    def __iter__(self) -> Any:
        return iter((self.reader, self.writer))

    async def write_eof(self) -> None:
        await self.writer.drain()
        await _blocking(self._connection.write_eof)

    async def close(self) -> None:
        await _blocking(self._connection.close)

    async def abort(self) -> None:
        await _blocking(self._connection.abort)


class _SyncPort:
    """A forward or an exposure of `byre.sync`."""

    def __init__(self, port: Any) -> None:
        self._port = port

    async def __aenter__(self) -> _SyncPort:
        await _blocking(self._port.__enter__)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await _blocking(self._port.__exit__, kind, error, trace)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._port, name)


class _Stdio(NamedTuple):
    stdin: _Writer | None
    stdout: _Reader | None
    stderr: _Reader | None


class SyncProcess:
    def __init__(self, process: byre.sync.Process) -> None:
        self._process = process
        stdin, stdout, stderr = process.stdio
        self.stdio = _Stdio(stdin and _Writer(stdin), stdout and _Reader(stdout), stderr and _Reader(stderr))

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._process, name)
        if not callable(value) or name == "exit_code":
            return value

        async def call(*arguments: Any, **options: Any) -> Any:
            if name == "close_stdin" and self.stdio.stdin is not None:
                await self.stdio.stdin.drain()
            return await _blocking(value, *arguments, **options)

        return call

    async def __aenter__(self) -> SyncProcess:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await _blocking(self._process.__exit__, kind, error, trace)


class _Opened:
    """A reader or writer of a file."""

    def __init__(self, opened: Any) -> None:
        self._opened = opened

    async def __aenter__(self) -> _Opened:
        await _blocking(self._opened.__enter__)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await _blocking(self._opened.__exit__, kind, error, trace)

    async def read(self, n: int = -1) -> bytes:
        data: bytes = await _blocking(self._opened.read, n)
        return data

    async def write(self, data: bytes) -> None:
        await _blocking(self._opened.write, data)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in await _blocking(list, self._opened):
            yield piece


class SyncFiles:
    """`byre.sync`'s files."""

    def __init__(self, files: Any) -> None:
        self._files = files

    def open_read(self, *arguments: Any, **options: Any) -> _Opened:
        return _Opened(self._files.open_read(*arguments, **options))

    def open_write(self, *arguments: Any, **options: Any) -> _Opened:
        return _Opened(self._files.open_write(*arguments, **options))

    async def walk(self, path: Any) -> AsyncIterator[Any]:
        for entry in await _blocking(lambda: list(self._files.walk(path))):
            yield entry

    def __getattr__(self, name: str) -> Any:
        async def call(*arguments: Any, **options: Any) -> Any:
            return await _blocking(getattr(self._files, name), *arguments, **options)

        return call


class SyncHost:
    """`byre.sync.LocalHost` as a `ProcessHost` with `run`."""

    def __init__(self) -> None:
        self._host = byre.sync.LocalHost()

    async def create_process(self, config: Any) -> SyncProcess:
        return SyncProcess(await _blocking(self._host.create_process, config))

    @property
    def files(self) -> SyncFiles:
        return SyncFiles(self._host.files)

    async def run(self, *arguments: Any, **options: Any) -> Any:
        return await _blocking(self._host.run, *arguments, **options)

    async def connect(self, *arguments: Any, **options: Any) -> _SyncConnection:
        return _SyncConnection(await _blocking(self._host.connect, *arguments, **options))

    async def wait_for_port(self, *arguments: Any, **options: Any) -> None:
        await _blocking(self._host.wait_for_port, *arguments, **options)

    def forward(self, *arguments: Any, **options: Any) -> _SyncPort:
        return _SyncPort(self._host.forward(*arguments, **options))

    def expose(self, *arguments: Any, **options: Any) -> _SyncPort:
        return _SyncPort(self._host.expose(*arguments, **options))

    async def __aenter__(self) -> SyncHost:
        await _blocking(self._host.__enter__)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await _blocking(self._host.__exit__, kind, error, trace)
