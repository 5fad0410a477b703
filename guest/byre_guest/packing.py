"""A file, or a directory with all that is in it, as a stream of entries and data; and its removal.

Rule: constant memory, whatever the size: an entry is forgotten when the next one comes, but for the first names of
files with several links (`MAX_HARD_LINKS`) and the directories on the way to it.
"""

from __future__ import annotations

import errno
import os

from byre_proto import records
from byre_proto.errors import FileFailed, PathRefused

from . import places

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .exchange import Sink
    from .places import Place

#: Files with several links whose first name is remembered, each in about 200 bytes.  A link to one that was
#: forgotten becomes a file of its own.
MAX_HARD_LINKS = 100_000

#: How often a directory is looked through that is not empty after all: somebody may fill it without end.
MAX_LOOKS = 8

#: A file of size 0 that has contents all the same (below /proc) is read up to this.
MAX_PSEUDO = 1024 * 1024


class Packer:
    """See the module's text."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._first: dict[tuple[int, int], list[Any]] = {}  # name of a file's first link, links to come
        self._totals = {"entries": 0, "bytes": 0, "sockets": 0}

    def pack(self, place: Place, path: str, *, follow: bool) -> dict[str, int]:
        """All of it, the top by the name "."; returns how many entries and bytes, and sockets left out."""
        top = place.find(path, 0 if follow else os.O_NOFOLLOW)
        status = os.fstat(top)
        if places.kind_of(status) == records.DIRECTORY:
            opened = places.reopen(top, os.O_RDONLY | os.O_DIRECTORY)
            self._entry(places.entry(".", status, xattrs=places.read_xattrs(opened)))
            for name, directory, base, found in places.walk(opened, recursive=True):
                self._add(name, directory, base, found)
        elif places.kind_of(status) == records.FILE:
            self._file(".", top, path)
        elif places.kind_of(status) == records.SYMLINK:
            self._entry(places.entry(".", status, os.readlink("", dir_fd=top)))
        else:
            places.check_regular(status, path)
        os.close(top)
        return self._totals

    def _add(self, name: str, directory: int, base: str, status: os.stat_result) -> None:
        kind = places.kind_of(status)
        if kind == records.SOCKET:  # nothing is left of one without the process that listens
            self._totals["sockets"] += 1
        elif kind == records.SYMLINK:
            self._entry(places.entry(name, status, os.readlink(base, dir_fd=directory)))
        elif kind in (records.FILE, records.DIRECTORY):
            try:
                fd = os.open(base, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
            except FileNotFoundError:
                return
            try:
                self._open(name, fd)
            finally:
                os.close(fd)
        else:
            self._entry(places.entry(name, status))

    def _open(self, name: str, fd: int) -> None:
        """A file or directory, by an O_PATH descriptor: what has the name by now is looked at again."""
        status = os.fstat(fd)
        kind = places.kind_of(status)
        if kind == records.FILE and not self._is_known(name, status):
            self._file(name, fd, name)
        elif kind == records.DIRECTORY:
            opened = places.reopen(fd, os.O_RDONLY | os.O_DIRECTORY)
            try:
                self._entry(places.entry(name, status, xattrs=places.read_xattrs(opened)))
            finally:
                os.close(opened)

    def _is_known(self, name: str, status: os.stat_result) -> bool:
        """Whether it was another link to a file that came before."""
        if status.st_nlink < 2:
            return False
        key = (status.st_dev, status.st_ino)
        first = self._first.get(key)
        if first is None:
            if len(self._first) < MAX_HARD_LINKS:
                self._first[key] = [name, status.st_nlink - 1]
            return False
        fields = places.entry(name, status, first[0])
        fields[2], fields[7] = records.LINK, 0
        self._entry(fields)
        first[1] -= 1
        if not first[1]:
            del self._first[key]
        return True

    def _file(self, name: str, fd: int, label: str) -> None:
        opened = places.open_regular(fd, label)
        try:
            status = os.fstat(opened)
            fields = places.entry(name, status, xattrs=places.read_xattrs(opened))
            if not status.st_size:
                data = _read_pseudo(opened)
                fields[7] = len(data)
                self._entry(fields)
                for start in range(0, len(data), records.MAX_RECORD):
                    self._sink.data(data[start : start + records.MAX_RECORD])
                return
            self._entry(fields)
            left = status.st_size  # what is appended meanwhile is not ours: the size has been told
            while left:
                data = os.read(opened, min(left, records.MAX_RECORD))
                if not data:
                    raise FileFailed(f"{label}: became shorter while it was read", hint="copy it again", path=label)
                self._sink.data(data)
                left -= len(data)
        finally:
            os.close(opened)

    def _entry(self, fields: list[Any]) -> None:
        self._totals["entries"] += 1
        self._totals["bytes"] += fields[7]
        self._sink.message(*fields)


def _read_pseudo(fd: int) -> bytes:
    found = b""
    while len(found) < MAX_PSEUDO:
        data = os.read(fd, records.MAX_RECORD)
        if not data:
            break
        found += data
    return found


def remove_tree(directory: int, name: str) -> None:
    """A directory with all that is in it.  No link is followed."""
    levels = [_Level(directory, name)]
    try:
        while levels:
            if _step(levels):
                levels.pop().close()
    finally:
        for level in levels:
            level.close()


def _step(levels: list[_Level]) -> bool:
    """Remove one more thing, or enter it; whether it was the last directory itself."""
    level = levels[-1]
    found = next(level.entries, None)
    if found is None:
        return level.remove()
    if not found.is_dir(follow_symlinks=False):
        try:
            os.unlink(found.name, dir_fd=level.fd)
        except FileNotFoundError:
            pass
    elif len(levels) > places.MAX_DEPTH:
        raise PathRefused(f"{found.name}: directories in more than {places.MAX_DEPTH} levels", path=found.name)
    else:
        levels.append(_Level(level.fd, found.name))
    return False


class _Level:
    """A directory that is being emptied."""

    def __init__(self, parent: int, name: str) -> None:
        self._parent = parent
        self._name = name
        self._looks = 1
        self.fd = places.open_directory(name, parent)
        self.entries = os.scandir(self.fd)

    def remove(self) -> bool:
        """All was removed that was seen; whether the directory is gone now, too."""
        try:
            os.rmdir(self._name, dir_fd=self._parent)
        except OSError as error:
            if error.errno != errno.ENOTEMPTY or self._looks >= MAX_LOOKS:
                raise
            self._looks += 1
            self.entries = os.scandir(self.fd)
            return False
        return True

    def close(self) -> None:
        self.entries.close()
        os.close(self.fd)
