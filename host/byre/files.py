"""`Files`: the files of a container, or of a VM itself: `container.files`, `vm.files`.

    await files.write("/etc/motd", b"hello\n")          bytes; replaced at once
    async with files.open_read("/var/log/big") as log:  a stream
        async for piece in log: ...
    await files.copy_in("src", "/srv")                  as cp -r; archive=True as cp -a
    await files.copy_out("/srv/out", ".")
    await files.get_archive("/srv", file)               a tar

Paths are those of the place: absolute, or from its root.  Links are followed as a process inside would follow them,
and never lead outside; a name in a listing or a copy is taken as it is.  A container's files can be had from its
creation to its deletion, running or not (mounts of its own only while it runs).

Rule: constant memory, whatever the size, but where bytes are asked for at once.  An operation that was cancelled or
failed leaves the old file or the new one, and of a tree what came before.
"""

from __future__ import annotations

import asyncio
import os
import posixpath
from collections.abc import AsyncIterator, Iterable
from typing import IO, TYPE_CHECKING, Any, TypeAlias

from .calls import CALL_TIMEOUT
from .copies import Copied, Maker, Target, receive, send
from .errors import DeadlineExceeded, FileFailed, PathNotFound, ResourceExhausted
from .file_operation import FileStatus, Operation, malformed
from .file_streams import FileReader, FileWriter
from .machines.spawn import in_thread

if TYPE_CHECKING:
    from .process import GuestProcessHost
    from .transfer.rules import Source

#: A path of the place, as text or bytes.
Path: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]

#: Bytes that `read` takes into memory, unless told otherwise.
READ_LIMIT = 256 << 20

#: Entries of a directory that `list` takes into memory, about 500 bytes each.
MAX_LISTED = 1_000_000

#: Links that are followed at the end of a copy's destination, as the kernel does for a path.
MAX_LINKS = 40


class Files:
    """See the module.  Errors: `PathNotFound`, `PathExists`, `PathIsDirectory`, `PathNotDirectory`, `PathRefused`,
    `PermissionRefused`, `NoSpace`, `ReadOnlyFiles`; all others that files can have are `FileFailed`.  ``data`` has
    "path" and "errno"."""

    def __init__(self, host: GuestProcessHost, container: str) -> None:
        self._host = host
        self._container = container

    def _operation(self, name: str, path: Path, **options: Any) -> Operation:
        return Operation(self._host.bridge, self._container, name, os.fsdecode(path), **options)

    async def _short(self, name: str, path: Path, **options: Any) -> list[list[Any]]:
        """An operation that takes no time: the entries that it gives."""
        found: list[Any] = []
        try:
            async with asyncio.timeout(CALL_TIMEOUT), self._operation(name, path, **options) as operation:
                while some := await operation.receive():
                    found += some
                    if len(found) > 1:
                        raise malformed("more than was asked for")
        except TimeoutError as error:
            if isinstance(error, DeadlineExceeded):
                raise
            raise DeadlineExceeded(
                f"{os.fsdecode(path)}: no answer within {CALL_TIMEOUT:g} s",
                hint="does the file system that it is on answer?",
            ) from None
        return found

    # -- single files --------------------------------------------------------------------------------------

    def open_read(self, path: Path, *, offset: int = 0, length: int | None = None) -> FileReader:
        """A regular file as a stream, an async context manager; `length` bytes from `offset`, or to its end."""
        return FileReader(self._operation("read", path, offset=offset, length=-1 if length is None else length))

    async def read(self, path: Path, *, limit: int = READ_LIMIT) -> bytes:
        """A regular file's contents.  Raises `ResourceExhausted` when there are more than `limit` bytes."""
        found = bytearray()
        async with self.open_read(path) as file:
            async for piece in file:
                found += piece
                if len(found) > limit:
                    raise ResourceExhausted(
                        f"{os.fsdecode(path)} has more than {limit} bytes",
                        hint="read it as a stream (open_read), or copy it (copy_out)",
                    )
        return bytes(found)

    def open_write(
        self, path: Path, *, mode: int | None = None, owner: str = "", exclusive: bool = False
    ) -> FileWriter:
        """As `write`, of what is not at hand at once.  An async context manager; see `FileWriter`."""
        return FileWriter(self._operation("write", path, mode=mode, owner=owner, exclusive=exclusive))

    async def write(
        self,
        path: Path,
        data: bytes | bytearray | memoryview,
        *,
        mode: int | None = None,
        owner: str = "",
        exclusive: bool = False,
    ) -> None:
        """Make a file, or replace one, at once: whoever reads it sees the old or the new contents.

        mode       permission bits; without them those of the file that was there, or 0o644
        owner      "uid", "uid:gid", "name" or "name:group" as known inside; without it as the old one's, or root
        exclusive  raise `PathExists` when there is one
        """
        async with self.open_write(path, mode=mode, owner=owner, exclusive=exclusive) as file:
            await file.write(data)

    async def stat(self, path: Path, *, follow: bool = True) -> FileStatus:
        """What is known of it; of a link itself with `follow` off."""
        found = await self._short("stat", path, follow=follow)
        if len(found) != 1 or isinstance(found[0], bytes):
            raise malformed("a status")
        return FileStatus.of_record(found[0])

    async def exists(self, path: Path) -> bool:
        """Whether there is something by this path; a link that leads nowhere is nothing."""
        try:
            await self.stat(path)
        except PathNotFound:
            return False
        return True

    # -- directories ---------------------------------------------------------------------------------------

    async def list(self, path: Path) -> list[FileStatus]:
        """The entries of a directory, sorted by name.  Raises `ResourceExhausted` over MAX_LISTED."""
        found = []
        async for entry in self._entries(path, recursive=False):
            found.append(entry)
            if len(found) > MAX_LISTED:
                raise ResourceExhausted(
                    f"{os.fsdecode(path)} has more than {MAX_LISTED} entries", hint="walk gives them one by one"
                )
        return sorted(found, key=lambda entry: entry.name)

    def walk(self, path: Path) -> AsyncIterator[FileStatus]:
        """All that is below a directory, each before what is in it; names are paths from there.

        No link is followed; what the kernel shows of itself (/proc, /sys) is not entered.  Left early, close it
        (`contextlib.aclosing`): it goes on reading until then.
        """
        return self._entries(path, recursive=True)

    async def _entries(self, path: Path, *, recursive: bool) -> AsyncIterator[FileStatus]:
        async with self._operation("list", path, recursive=recursive) as operation:
            while some := await operation.receive():
                for fields in some:
                    if isinstance(fields, bytes):
                        raise malformed("data in a listing")
                    yield FileStatus.of_record(fields)

    async def mkdir(
        self, path: Path, *, mode: int = 0o755, owner: str = "", parents: bool = False, exist_ok: bool = False
    ) -> None:
        """Make a directory; `parents`: and those above it, as 0o755; `exist_ok`: one that is there will do."""
        await self._short("mkdir", path, mode=mode, owner=owner, parents=parents, exist_ok=exist_ok)

    async def remove(self, path: Path, *, recursive: bool = False, missing_ok: bool = False) -> None:
        """Remove a file, a link, an empty directory; `recursive`: a directory with all that is in it."""
        async with self._operation("remove", path, recursive=recursive, missing_ok=missing_ok) as operation:
            await operation.receive()

    async def rename(self, path: Path, destination: Path) -> None:
        """rename(2): a file that is at the destination is replaced."""
        await self._short("rename", path, destination=os.fsdecode(destination))

    # -- copies --------------------------------------------------------------------------------------------

    async def copy_in(
        self, source: str | os.PathLike[str], destination: Path, *, archive: bool = False, follow: bool = False
    ) -> Copied:
        """A file or directory of this host into the place, by the rules of `transfer.rules`.

        Modes, times and hard links are kept; what is made is root's.  `archive`: owners by number, set-user-id and
        such, and attributes too.  `follow`: a source that is a link stands for what it leads to.
        """
        from .transfer import rules
        from .transfer.packing import Packer

        path = os.path.join(os.getcwd(), source)
        status = await in_thread(lambda: os.stat(path, follow_symlinks=follow or path.endswith("/")))
        is_directory = (status.st_mode & 0o170000) == 0o040000
        target, found = await self._destination(os.fsdecode(destination))
        where = rules.place(rules.Source.of(path), is_directory, target, found)
        pieces = Packer(path, where.name, archive=archive, follow=follow or path.endswith("/"))
        return await self._send(where.directory, pieces, keep=not archive)

    async def copy_out(
        self,
        source: Path,
        destination: str | os.PathLike[str],
        *,
        archive: bool = False,
        follow: bool = False,
        max_entries: int | None = None,
        max_bytes: int | None = None,
    ) -> Copied:
        """A file or directory of the place onto this host, by the rules of `transfer.rules`.

        What comes is not trusted.  Nothing is made outside the destination; devices, FIFOs, and links that may lead
        out of what is copied are refused by name (`PathRefused`), as is what goes over `max_entries` or `max_bytes`
        (`ResourceExhausted`; `transfer.unpacking` has the defaults).  Files are this user's, with the permission
        bits that the umask leaves.  `archive`: links as they are, and owners (for root), set-user-id and such, and
        attributes: only from a place that you trust.
        """
        from .transfer import rules, unpacking

        local = os.path.join(os.getcwd(), destination)
        limits = {
            "max_entries": unpacking.MAX_ENTRIES if max_entries is None else max_entries,
            "max_bytes": unpacking.MAX_BYTES if max_bytes is None else max_bytes,
        }

        def target(top: FileStatus) -> tuple[Target, str]:
            where = rules.place(rules.Source.of(os.fsdecode(source)), top.is_dir, local, _found(local))
            return unpacking.LocalUnpacker(where.directory, archive=archive, **limits), where.name

        return await self._receive(source, target, follow)

    async def get_archive(self, path: Path, file: IO[bytes], *, follow: bool = False) -> Copied:
        """Write a tar (POSIX pax) of a file or directory, by its last name, to a binary file of this host.

        A path with "/." at its end stands for what is in the directory.
        """
        from .transfer import rules
        from .transfer.tar import TarWriter

        source: Source = rules.Source.of(os.fsdecode(path))

        def target(top: FileStatus) -> tuple[Target, str]:
            name = "." if source.contents and top.is_dir else source.name
            return TarWriter(file), name

        return await self._receive(path, target, follow)

    async def put_archive(self, path: Path, file: IO[bytes]) -> Copied:
        """Unpack a tar, read from a binary file of this host, into a directory that is there, exactly."""
        from .transfer.tar import records_of

        return await self._send(os.fsdecode(path), records_of(file), keep=False)

    async def _destination(self, path: str) -> tuple[str, str]:
        """Where a destination leads when links at its end are followed; the kind of what is there ("": nothing)."""
        for _ in range(MAX_LINKS):
            try:
                found = await self.stat(path, follow=path.endswith("/"))
            except PathNotFound:
                return path, ""
            if not found.is_symlink:
                return path, found.kind
            path = posixpath.join(posixpath.dirname(path), found.target)
        raise FileFailed(f"{path}: too many links", path=path)

    async def _send(self, directory: str, pieces: Iterable[bytes], *, keep: bool) -> Copied:
        async with self._operation("unpack", directory, keep=keep) as operation:
            return await send(operation, pieces)

    async def _receive(self, source: Path, make: Maker, follow: bool) -> Copied:
        async with self._operation("pack", source, follow=follow) as operation:
            return await receive(operation, make)


def _found(path: str) -> str:
    if os.path.isdir(path):
        return "dir"
    return "file" if os.path.lexists(path) else ""
