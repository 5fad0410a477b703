"""One operation of the guest's agent on files: records out by its stdin, records in by its stdout.

Rule: it has succeeded when its result came, and not before; an end of its streams is no success.  Whoever leaves
earlier cancels it: the guest tidies up what it had begun.  What comes from the guest is checked before it is used.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from byre_proto import records
from byre_proto.errors import from_wire, printable
from byre_proto.frames import ProtocolError

from .calls import CANCEL_GRACE
from .errors import ByreError, FileFailed
from .process import GuestProcess

if TYPE_CHECKING:
    from .bridge import Bridge

#: Read from a stream at once, and sent before the stream's room is waited for.
CHUNK = records.MAX_RECORD

SIGTERM = 15

#: Operations that take records.
_FED = ("write", "unpack")

#: Largest user or group id, device number, and size of a file (a signed 64 bit number, off_t).
MAX_ID, MAX_DEVICE, MAX_SIZE = 2**32 - 1, 2**32 - 1, 2**63 - 1

_KINDS = {
    *(records.FILE, records.DIRECTORY, records.SYMLINK, records.LINK),
    *(records.FIFO, records.CHARACTER, records.BLOCK, records.SOCKET),
}


@dataclass(frozen=True, slots=True)
class FileStatus:
    """What is known of a file.

    name      path below where the operation began, "." for that itself; other bytes than UTF-8 by surrogateescape
    kind      "file", "dir", "symlink", "fifo", "char", "block", "socket"; in a copy "link" for a further hard link
    mode      permission bits, with set-user-id and such
    uid, gid  owner's numbers where the file is
    mtime_ns  time of the last change, in nanoseconds since 1970
    size      bytes of a regular file; 0 for others
    target    where a link leads
    """

    name: str
    kind: str
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int
    target: str = ""
    device: tuple[int, ...] = field(default=(), repr=False)
    xattrs: dict[str, bytes] = field(default_factory=dict, repr=False)

    @property
    def is_file(self) -> bool:
        return self.kind == records.FILE

    @property
    def is_dir(self) -> bool:
        return self.kind == records.DIRECTORY

    @property
    def is_symlink(self) -> bool:
        return self.kind == records.SYMLINK

    def record(self) -> bytes:
        """As it is sent."""
        return records.message(
            *("entry", self.name, self.kind, self.mode, self.uid, self.gid, self.mtime_ns, self.size),
            *(self.target, self.device, self.xattrs),
        )

    @classmethod
    def of_record(cls, fields: list[Any]) -> FileStatus:
        """The guest's record.  Raises `FileFailed` for one that is none."""
        try:
            _, name, kind, mode, uid, gid, mtime_ns, size, target, device, xattrs = fields
            found = cls(name, kind, mode, uid, gid, mtime_ns, size, target, tuple(device), xattrs)
            if not found._is_plausible():
                raise ValueError(fields)
        except (TypeError, ValueError, AttributeError, IndexError):
            raise malformed("an entry") from None
        return found

    def _is_plausible(self) -> bool:
        """Whether all of it is of its kind and in its range."""
        numbers = (self.mode, self.uid, self.gid, self.mtime_ns, self.size, *self.device)
        return (
            all(isinstance(text, str) and "\0" not in text for text in (self.name, self.target, *self.xattrs))
            and all(isinstance(value, bytes) for value in self.xattrs.values())
            and self.kind in _KINDS
            and all(type(number) is int for number in numbers)
            and 0 <= self.mode <= 0o7777
            and 0 <= self.uid <= MAX_ID
            and 0 <= self.gid <= MAX_ID
            and -MAX_SIZE <= self.mtime_ns <= MAX_SIZE
            and 0 <= self.size <= (MAX_SIZE if self.kind == records.FILE else 0)
            and len(self.device) in (0, 2)
            and all(0 <= number <= MAX_DEVICE for number in self.device)
        )


def malformed(what: str) -> FileFailed:
    """The guest sent what it must not."""
    return FileFailed(f"the guest sent {what} that is malformed", hint="is the agent of this version?")


class Operation:
    """See the module.  An async context manager; `options` are the operation's (`byre_guest.operations`)."""

    def __init__(self, bridge: Bridge, container: str, name: str, path: str, **options: Any) -> None:
        self.bridge = bridge
        self._container = container
        self._name, self._path, self._options = name, path, options
        self._process: GuestProcess
        self._decoder = records.Decoder()
        self.result: dict[str, Any] | None = None

    async def __aenter__(self) -> Self:
        """Start it.  Raises `ContainerNotFound`, `ContainerNotReady`, `StartFailed`, ..."""
        process = GuestProcess(self.bridge, stdin=self._name in _FED, stdout=True, stderr=False, terminal=False)

        async def undo(_: object) -> None:
            await process.signal(SIGTERM)

        try:
            await self.bridge.call(
                "files.start",
                accept=process.created,
                undo=undo,
                container=self._container,
                operation=self._name,
                path=self._path,
                options=self._options,
                **process.streams,
            )
        except BaseException:
            process.close_streams()
            raise
        self._process = process
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.bridge.finish(self._leave())

    async def _leave(self) -> None:
        process = self._process
        try:
            if self.result is None:
                with contextlib.suppress(ByreError):
                    await process.signal(SIGTERM)
            await process.close()
            if self.result is not None:
                return
            try:
                async with asyncio.timeout(CANCEL_GRACE):
                    await process.wait()
            except TimeoutError:
                await process.kill_tree()
        except ByreError:
            pass  # the connection is lost, and it with it

    async def send(self, *pieces: bytes) -> None:
        """Records, when there is room for them.  Raises the error with which the guest gave up."""
        writer = self._process.stdio.stdin
        assert writer is not None
        try:
            for piece in pieces:
                writer.write(piece)
            await writer.drain()
        except ConnectionError:
            await self._explain()
            raise

    async def send_data(self, data: bytes | bytearray | memoryview) -> None:
        """Data of any length."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), CHUNK):
            piece = view[start : start + CHUNK]
            await self.send(records.header(len(piece)), bytes(piece))

    async def finish(self) -> dict[str, Any]:
        """Say that all was sent, and wait for the result."""
        await self.send(records.message("end"))
        await self._process.close_stdin()
        while await self.receive():
            pass
        assert self.result is not None
        return self.result

    async def receive(self) -> list[bytes | list[Any]]:
        """Some records as they come: data, and the fields of entries; [] when the operation has succeeded.

        Raises the error with which it failed.
        """
        reader = self._process.stdio.stdout
        assert reader is not None
        while self.result is None:
            data = await reader.read(CHUNK)
            if not data:
                status = await self._process.wait()
                raise FileFailed(f"{self._path}: the operation ended early: {status}", path=self._path)
            self._decoder.feed(data)
            found = self._decode()
            if found:
                return found
        return []

    def _decode(self) -> list[bytes | list[Any]]:
        found: list[bytes | list[Any]] = []
        try:
            while (one := self._decoder.take()) is not None:
                if isinstance(one, bytes) or one[0] == "entry":
                    found.append(one)
                else:
                    self._end(one)
                    break
        except ProtocolError as error:
            raise FileFailed(f"{self._path}: {error.message}", path=self._path) from None
        return found

    def _end(self, fields: list[Any]) -> None:
        if fields[0] == "result" and len(fields) == 2 and isinstance(fields[1], dict):
            self.result = fields[1]
            return
        kinds = (str, str, str, str, dict)
        if fields[0] == "error" and [type(value) for value in fields] == list(kinds):
            raise from_wire(*fields[1:])
        raise malformed(f"a record {printable(fields[0])[:20]!r}")

    async def _explain(self) -> None:
        """The guest reads no more: what it says, before it is said that the pipe is broken."""
        while await self.receive():
            pass
        raise FileFailed(f"{self._path}: the guest did not take all of it", path=self._path)
