"""Entries and data from the host -> files below a directory.

Rule: constant memory, whatever the size.  A file that is replaced is replaced at once: cut, an operation leaves the
old one.  What the file system or our rights do not take of an entry's attributes is counted and told, not left out
without a word.
"""

from __future__ import annotations

import errno
import os
import stat

from byre_proto import records
from byre_proto.errors import PathIsDirectory, PathRefused

from . import places

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .exchange import Source
    from .places import Place

#: Kinds of attributes that were not taken and are told one by one.
MAX_DROPPED = 64


class Unpacker:
    """Once.  `keep`: directories that are there stay as they are."""

    def __init__(self, place: Place, base: str, *, keep: bool) -> None:
        self._place = place
        self._base = base
        self._keep = keep
        self._parent = ("", -1)  # the directory of the entry before this one, by its name
        self._inside: list[tuple[str, int, list[Any]]] = []  # directories with attributes to come: name, descriptor
        self._totals = {"entries": 0, "bytes": 0}
        self._dropped: dict[str, int] = {}

    def unpack(self, source: Source) -> dict[str, Any]:
        """To the end of what the host sends; returns how many entries and bytes, and what was not taken."""
        os.close(self._place.directory(self._base))
        for fields in source.entries():
            self._leave(fields[1])
            self._totals["entries"] += 1
            self._add(fields, source)
        self._leave("")
        return {**self._totals, "dropped": self._dropped}

    def _add(self, fields: list[Any], source: Source) -> None:
        name, kind = fields[1], fields[2]
        if name == ".":
            return  # that is there, and stays as it is
        directory, base = self._directory(name)
        if kind == records.DIRECTORY:
            self._new_directory(directory, base, fields)
            return
        try:
            places.place_new(directory, base, self._maker(directory, fields, source))
        except IsADirectoryError:
            raise PathIsDirectory(
                f"{name}: is a directory, and would become a {kind}", hint="remove it first", path=name
            ) from None

    def _maker(self, directory: int, fields: list[Any], source: Source) -> Callable[[str], None]:
        kind, mode, target, device = fields[2], fields[3], fields[8], fields[9]

        def make(name: str) -> None:
            if kind == records.FILE:
                self._file(directory, name, fields, source)
                return
            if kind == records.LINK:
                where, other = self._directory(target, cached=False)
                try:
                    os.link(other, name, src_dir_fd=where, dst_dir_fd=directory, follow_symlinks=False)
                finally:
                    os.close(where)
                return
            if kind == records.SYMLINK:
                os.symlink(target, name, dir_fd=directory)
            elif kind == records.FIFO:
                os.mkfifo(name, mode, dir_fd=directory)
            elif kind in (records.CHARACTER, records.BLOCK):
                what = stat.S_IFCHR if kind == records.CHARACTER else stat.S_IFBLK
                os.mknod(name, what | mode, os.makedev(*device), dir_fd=directory)
            else:
                raise PathRefused(f"{fields[1]}: a {kind} cannot be made", path=fields[1])
            self._own(lambda uid, gid: os.chown(name, uid, gid, dir_fd=directory, follow_symlinks=False), fields)
            os.utime(name, ns=(fields[6], fields[6]), dir_fd=directory, follow_symlinks=False)

        return make

    def _file(self, directory: int, name: str, fields: list[Any], source: Source) -> None:
        fd = places.create_file(directory, name)
        try:
            left = fields[7]
            while left:
                data = source.data()
                left -= len(data)
                places.write_all(fd, data)
            self._totals["bytes"] += fields[7]
            self._set_attributes(fd, fields)
        finally:
            os.close(fd)

    # -- directories ---------------------------------------------------------------------------------------

    def _directory(self, name: str, *, cached: bool = True) -> tuple[int, str]:
        """The directory in which an entry goes, made where it is missing, and the entry's name in it."""
        head, _, base = name.rpartition("/")
        places.check_names(name)
        if cached and self._parent[1] >= 0 and self._parent[0] == head:
            return self._parent[1], base
        path = f"{self._base}/{head}"
        try:
            fd = self._place.directory(path)
        except FileNotFoundError:
            make_directories(self._place, path)
            fd = self._place.directory(path)
        if cached:
            self._forget_parent()
            self._parent = (head, fd)
        return fd, base

    def _forget_parent(self) -> None:
        if self._parent[1] >= 0:
            os.close(self._parent[1])
        self._parent = ("", -1)

    def _new_directory(self, directory: int, base: str, fields: list[Any]) -> None:
        name, new = fields[1], True
        try:
            os.mkdir(base, 0o700, dir_fd=directory)
        except FileExistsError:
            new = False
        if new:
            opened = places.open_directory(base, directory)
        else:
            try:  # a link to a directory is as good, and stays
                fd = self._place.directory(f"{self._base}/{name}")
            except (NotADirectoryError, FileNotFoundError):
                raise places.not_a_directory(name) from None
            opened = places.reopen(fd, os.O_RDONLY | os.O_DIRECTORY)
            os.close(fd)
        if new or not self._keep:
            self._inside.append((name, opened, fields))
        else:
            os.close(opened)

    def _leave(self, name: str) -> None:
        """The next entry is `name`: directories that it is not in get their attributes, the times above all."""
        while self._inside:
            inside, fd, fields = self._inside[-1]
            if name and name.startswith(inside + "/"):
                return
            self._inside.pop()
            try:
                self._set_attributes(fd, fields)
            finally:
                os.close(fd)
        if not name:
            self._forget_parent()

    # -- attributes ----------------------------------------------------------------------------------------

    def _set_attributes(self, fd: int, fields: list[Any]) -> None:
        """Of an open file or directory: the owner first, since the kernel then takes special bits away."""
        mode = fields[3]
        if not self._own(lambda uid, gid: os.chown(fd, uid, gid), fields):
            mode &= 0o1777  # set-user-id for another user than was meant
        os.fchmod(fd, mode)
        for name, value in fields[10].items():
            try:
                if not name.startswith(records.XATTRS):
                    raise OSError(errno.ENOTSUP, "")
                os.setxattr(fd, name, value)
            except OSError as error:
                if error.errno not in (errno.ENOTSUP, errno.EPERM, errno.EINVAL):
                    raise
                self._drop(name)
        os.utime(fd, ns=(fields[6], fields[6]))

    def _own(self, chown: Callable[[int, int], None], fields: list[Any]) -> bool:
        """Whether it has the owner that it is to have."""
        uid, gid = fields[4], fields[5]
        if uid < 0 and gid < 0:
            return True
        try:
            chown(uid, gid)
        except PermissionError:
            self._drop("owner")
            return False
        return True

    def _drop(self, what: str) -> None:
        if what in self._dropped or len(self._dropped) < MAX_DROPPED:
            self._dropped[what] = self._dropped.get(what, 0) + 1


def make_directories(place: Place, path: str, mode: int = 0o755) -> None:
    """`path` and what is missing above it.  What is there is no error."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise PathRefused(f"{path!r}: directories are not made by way of '..'", path=path)
    at = "/"
    for part in parts:
        directory = place.directory(at)
        try:
            os.mkdir(part, mode, dir_fd=directory)
        except FileExistsError:
            pass
        finally:
            os.close(directory)
        at += part + "/"
