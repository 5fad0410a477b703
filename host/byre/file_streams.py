"""One file of a guest as a stream: `Files.open_read`, `Files.open_write`.

Rule: the end of what is read is given only when all was read, and what is written takes its place only when all was
written.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

from .file_operation import CHUNK, FileStatus, Operation, malformed


class FileReader:
    """A file's contents as they are read; an async context manager, and an async iterator of pieces.

    `status` is the file's when it was opened.  Its end is given (b"") only when all was read.
    """

    def __init__(self, operation: Operation) -> None:
        self._operation = operation
        self._pieces: list[bytes] = []
        self.status: FileStatus

    async def __aenter__(self) -> Self:
        await self._operation.__aenter__()
        try:
            some = await self._operation.receive()
            if not some or isinstance(some[0], bytes):
                raise malformed("contents without a status")
            self.status = FileStatus.of_record(some[0])
            self._add(some[1:])
        except BaseException as error:
            await self._operation.__aexit__(type(error), error, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._operation.__aexit__(kind, error, trace)

    async def read(self, n: int = -1) -> bytes:
        """Up to `n` bytes, as soon as there are any; all that is left without `n`; b"" at the end."""
        if n < 0:
            return b"".join([piece async for piece in self])
        if not self._pieces:
            self._add(await self._operation.receive())
        if not self._pieces or not n:
            return b""
        piece = self._pieces.pop(0)
        if len(piece) > n:
            self._pieces.insert(0, piece[n:])
        return piece[:n]

    def _add(self, some: Iterable[bytes | list[Any]]) -> None:
        for piece in some:
            if not isinstance(piece, bytes):
                raise malformed("a status in a file's contents")
            self._pieces.append(piece)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        piece = await self.read(CHUNK)
        if not piece:
            raise StopAsyncIteration
        return piece


class FileWriter:
    """A new file on its way; an async context manager.  It takes its place when the block ends without an error;
    otherwise, and when the connection or this program ends before, everything is as it was."""

    def __init__(self, operation: Operation) -> None:
        self._operation = operation

    async def __aenter__(self) -> Self:
        await self._operation.__aenter__()
        return self

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """The next bytes, when there is room for them.  Raises `NoSpace`, ..."""
        await self._operation.send_data(data)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                await self._operation.finish()
        finally:
            await self._operation.__aexit__(kind, error, trace)
