"""A file or a directory of this host -> the records of a copy.

Rule: constant memory but for the first names of files with several links.  Blocking: for threads.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator

from byre.errors import FileFailed
from byre.file_operation import FileStatus
from byre_proto import records


class Packer:
    """Records of what is at a path, the top by the name `name` ("." for what is in it alone).

    `archive`: with owners, special bits of modes, and attributes; else it is nobody's in particular.
    """

    def __init__(self, path: str, name: str, *, archive: bool, follow: bool) -> None:
        self._path, self._name = path, name
        self._archive, self._follow = archive, follow
        self._first: dict[tuple[int, int], str] = {}

    def __iter__(self) -> Iterator[bytes]:
        top = (self._path, self._name, os.stat(self._path, follow_symlinks=self._follow))
        levels = [iter([top])]
        while levels:
            found = next(levels[-1], None)
            if found is None:
                levels.pop()
                continue
            path, name, status = found
            yield from self._one(path, name, status)
            if stat.S_ISDIR(status.st_mode):
                levels.append(self._below(path, name))

    def _below(self, path: str, name: str) -> Iterator[tuple[str, str, os.stat_result]]:
        with os.scandir(path) as entries:
            for found in entries:
                yield (
                    found.path,
                    found.name if name == "." else f"{name}/{found.name}",
                    found.stat(follow_symlinks=False),
                )

    def _one(self, path: str, name: str, status: os.stat_result) -> Iterator[bytes]:
        kind = records.KINDS[stat.S_IFMT(status.st_mode)]
        if kind == records.FILE:
            yield from self._file(path, name)
        elif kind == records.DIRECTORY:
            yield self._entry(name, kind, status, path=path)
        elif kind == records.SYMLINK:
            yield self._entry(name, kind, status, os.readlink(path))
        elif kind != records.SOCKET:  # nothing is left of one without the process that listens
            yield self._entry(name, kind, status)

    def _file(self, path: str, name: str) -> Iterator[bytes]:
        with open(path, "rb", buffering=0, opener=_plainly) as file:
            status = os.fstat(file.fileno())
            first = self._first.setdefault((status.st_dev, status.st_ino), name) if status.st_nlink > 1 else name
            if first != name:
                yield self._entry(name, records.LINK, status, first)
                return
            yield self._entry(name, records.FILE, status, path=path)
            left = status.st_size  # what is appended meanwhile is not ours: the size has been told
            while left:
                data = file.read(min(left, records.MAX_RECORD))
                if not data:
                    raise FileFailed(f"{path}: became shorter while it was read", hint="copy it again", path=path)
                yield records.header(len(data))
                yield data
                left -= len(data)

    def _entry(self, name: str, kind: str, status: os.stat_result, target: str = "", path: str = "") -> bytes:
        devices = kind in (records.CHARACTER, records.BLOCK)
        return FileStatus(
            name,
            kind,
            stat.S_IMODE(status.st_mode) & (0o7777 if self._archive else 0o777),
            status.st_uid if self._archive else -1,
            status.st_gid if self._archive else -1,
            status.st_mtime_ns,
            status.st_size if kind == records.FILE else 0,
            target,
            (os.major(status.st_rdev), os.minor(status.st_rdev)) if devices else (),
            _xattrs(path) if self._archive and path else {},
        ).record()


def _plainly(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)


def _xattrs(path: str) -> dict[str, bytes]:
    try:
        return {name: os.getxattr(path, name) for name in os.listxattr(path) if name.startswith(records.XATTRS)}
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.ENODATA):
            return {}
        raise
