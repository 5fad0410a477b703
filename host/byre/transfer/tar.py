"""Tar archives as the records of a copy, and the other way round.

    records_of(file)    a tar, of any origin -> records for the guest
    TarWriter(file)     entries and data from a guest -> a tar

Rule: read strictly (`oci.tarstream`: whole or refused by name), written as POSIX pax, with nanoseconds, attributes
and names of any bytes.  Nothing touches a file system.  Blocking: for threads.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import IO

from byre.errors import FileFailed, ImageInvalid, PathRefused
from byre.file_operation import FileStatus, malformed
from byre.oci import tarstream
from byre_proto import records

#: GNU tar's record: archives are padded to it.
RECORD = 20 * 512

#: Read at once of what follows an archive, so that who writes it meets no broken pipe.
CHUNK = 256 * 1024

_TEXT = ("utf-8", "surrogateescape")

_TYPES = {
    records.FILE: tarfile.REGTYPE,
    records.DIRECTORY: tarfile.DIRTYPE,
    records.SYMLINK: tarfile.SYMTYPE,
    records.LINK: tarfile.LNKTYPE,
    records.FIFO: tarfile.FIFOTYPE,
    records.CHARACTER: tarfile.CHRTYPE,
    records.BLOCK: tarfile.BLKTYPE,
}
_KINDS = {
    tarstream.FILE: records.FILE,
    tarstream.DIRECTORY: records.DIRECTORY,
    tarstream.SYMLINK: records.SYMLINK,
    tarstream.LINK: records.LINK,
    tarstream.FIFO: records.FIFO,
    tarstream.CHAR: records.CHARACTER,
    tarstream.BLOCKDEV: records.BLOCK,
}


class _Forwards:
    """A binary file as a stream that only goes on, from where it is."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, size: int = -1, /) -> bytes:
        return self._file.read(size)

    def seekable(self) -> bool:
        return False

    def seek(self, _offset: int, _whence: int = 0, /) -> int:
        raise OSError("not seekable")


def records_of(file: IO[bytes]) -> Iterator[bytes]:
    """The records of an uncompressed tar, read to its end.  Raises `FileFailed` for one that is none."""
    reader = tarstream.TarReader(_Forwards(file))
    try:
        for entry in reader:
            name = _plain(entry.name)
            target = _plain(entry.target) if entry.kind == tarstream.LINK else entry.target
            yield FileStatus(
                name,
                _KINDS[entry.kind],
                entry.mode,
                entry.uid,
                entry.gid,
                entry.mtime * 1_000_000_000,
                entry.size,
                target,
                entry.device if entry.kind in (tarstream.CHAR, tarstream.BLOCKDEV) else (),
                dict(entry.xattrs),
            ).record()
            if entry.size:
                for piece in reader.data():
                    for start in range(0, len(piece), records.MAX_RECORD):
                        part = piece[start : start + records.MAX_RECORD]
                        yield records.header(len(part)) + part
    except ImageInvalid as error:
        raise FileFailed(f"the archive is refused: {error.message}", hint="is it a tar, not compressed?") from error
    while file.read(CHUNK):
        pass


def _plain(name: str) -> str:
    """A tar's name as records have it: "./a/" is "a"."""
    return "/".join(part for part in name.split("/") if part not in ("", ".")) or "."


class TarWriter:
    """Takes entries and data, writes a tar.  It has no limit but its file's."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._written = 0
        self._left = self._padding = 0
        self.dropped: dict[str, int] = {}

    def take(self, found: bytes | FileStatus) -> None:
        """The next record."""
        if isinstance(found, FileStatus):
            self._complete()
            self._entry(found)
            return
        if len(found) > self._left:
            raise malformed("more data than it had announced")
        self._left -= len(found)
        self._write(found)

    def finish(self) -> None:
        """The last one has come."""
        self._complete()
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self._written % RECORD))
        self._file.flush()

    def close(self) -> None:
        """The file is the caller's."""

    def _complete(self) -> None:
        if self._left:
            raise malformed("a file shorter than it had announced")
        self._write(bytes(self._padding))
        self._padding = 0

    def _entry(self, entry: FileStatus) -> None:
        if entry.kind not in _TYPES:
            raise PathRefused(
                f"{tarstream.show(entry.name)}: a {entry.kind} has no place in a tar", path=entry.name
            )
        self._left, self._padding = entry.size, -entry.size % tarfile.BLOCKSIZE
        self._write(_header(entry))

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._written += len(data)


def _header(entry: FileStatus) -> bytes:
    info = tarfile.TarInfo(entry.name)
    info.type = _TYPES[entry.kind]
    info.mode, info.uid, info.gid = entry.mode, entry.uid, entry.gid
    info.size, info.linkname = entry.size, entry.target
    if entry.device:
        info.devmajor, info.devminor = entry.device
    seconds, nanoseconds = divmod(entry.mtime_ns, 1_000_000_000)
    info.mtime = seconds
    pax = {f"SCHILY.xattr.{key}": value.decode(*_TEXT) for key, value in entry.xattrs.items()}
    if nanoseconds and seconds >= 0:
        pax["mtime"] = f"{seconds}.{nanoseconds:09d}"
    info.pax_headers = pax
    return info.tobuf(tarfile.PAX_FORMAT, *_TEXT)
