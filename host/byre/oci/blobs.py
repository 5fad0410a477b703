"""Where an image's files lie: a directory, or an archive that is read in place.

Rule: a file is read by its name inside the image, up to a limit, and never written.  An archive's members
are found once and then read at their offsets; only a compressed archive is decompressed, into a nameless
temporary file.
"""

from __future__ import annotations

import os
import posixpath
import stat
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from byre.errors import ImageInvalid, ImageNotFound
from byre.oci import tarstream
from byre.oci.compression import CHUNK, Reader, decompressed, is_compressed

_MAX_LINKS = 40  # the kernel's own limit for symbolic links in one path


class Files(Protocol):
    """A read-only set of named files."""

    def size(self, name: str) -> int | None:
        """Bytes of the file `name`, None where there is none."""
        ...

    def open(self, name: str) -> BinaryIO: ...


def read(files: Files, name: str, limit: int) -> bytes:
    """The whole file; ImageInvalid when it is missing or over `limit` bytes."""
    size = files.size(name)
    if size is None:
        raise ImageInvalid(f"the image lacks its file {tarstream.show(name)}", hint="copy the image anew")
    if size > limit:
        raise ImageInvalid(f"{tarstream.show(name)} has {size} bytes, over the limit of {limit}")
    with files.open(name) as stream:
        return stream.read(limit)


class Directory:
    """The files below `root`.  Only regular files: opening a FIFO would wait for ever."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def size(self, name: str) -> int | None:
        try:
            found = os.stat(self._root / name)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise ImageInvalid(f"{self._root / name} cannot be read: {error.strerror}") from error
        if not stat.S_ISREG(found.st_mode):
            raise ImageInvalid(f"{self._root / name} is not a regular file")
        return found.st_size

    def open(self, name: str) -> BinaryIO:
        try:
            fd = os.open(self._root / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise ImageInvalid(f"{self._root / name} cannot be read: {error.strerror}") from error
        return os.fdopen(fd, "rb", buffering=0)


class Archive:
    """The members of a tar file.  `keep` closes what it opens."""

    def __init__(self, path: Path, keep: ExitStack) -> None:
        try:
            file = keep.enter_context(open(path, "rb", buffering=0))  # noqa: SIM115 - `keep` is the context manager
        except OSError as error:
            raise ImageNotFound(f"{path} cannot be read: {error.strerror}") from error
        head = os.pread(file.fileno(), 6, 0)
        self._file = _unpacked(file, keep) if is_compressed(head) else file
        self._members: dict[str, tuple[int, int]] = {}
        self._links: dict[str, str] = {}
        self._scan()

    def _scan(self) -> None:
        reader = tarstream.TarReader(self._file)
        for entry in reader:
            name = posixpath.normpath(entry.name)
            self._links.pop(name, None)
            self._members.pop(name, None)
            if entry.kind == tarstream.FILE and not reader.sparse:
                self._members[name] = (reader.offset, entry.size)
            elif entry.kind == tarstream.SYMLINK:  # docker save before 25 stores a repeated layer so
                self._links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), entry.target))
            elif entry.kind == tarstream.LINK:
                self._links[name] = posixpath.normpath(entry.target)

    def _find(self, name: str) -> tuple[int, int] | None:
        name = posixpath.normpath(name)
        for _ in range(_MAX_LINKS):
            if name not in self._links:
                return self._members.get(name)
            name = self._links[name]
        return None

    def size(self, name: str) -> int | None:
        found = self._find(name)
        return found[1] if found else None

    def open(self, name: str) -> BinaryIO:
        found = self._find(name)
        if found is None:
            raise ImageInvalid(f"the archive lacks {tarstream.show(name)}")
        return cast(BinaryIO, _Window(self._file.fileno(), *found))


class _Window(Reader):
    """`size` bytes of a file from `offset` on; several may be read side by side."""

    def __init__(self, fd: int, offset: int, size: int) -> None:
        self._fd, self._offset, self._left = fd, offset, size

    def some(self, size: int) -> bytes:
        data = os.pread(self._fd, min(size, self._left), self._offset)
        self._offset += len(data)
        self._left -= len(data)
        return data


def _unpacked(file: BinaryIO, keep: ExitStack) -> BinaryIO:
    whole = keep.enter_context(tempfile.TemporaryFile(buffering=0))  # noqa: SIM115 - the same
    count = 0
    with decompressed(file) as stream:
        while data := stream.read(CHUNK):
            count += len(data)
            if count > tarstream.MAX_BYTES:
                raise ImageInvalid(f"the archive is over the limit of {tarstream.MAX_BYTES} bytes")
            whole.write(data)
    whole.seek(0)
    return cast(BinaryIO, whole)
