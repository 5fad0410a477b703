"""Entries and data that a guest sends -> files below a directory of this host.

Rule: whatever their names and links say, nothing is made outside that directory: each component is opened by itself
and is never a link (B65).  What must not be here is refused by its name; what came before it stays.  A file takes
its place when it is complete.  Constant memory.  Blocking: for threads.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from typing import Any

from byre.errors import FileFailed, PathIsDirectory, PathNotDirectory, PathRefused, ResourceExhausted
from byre.file_operation import FileStatus, malformed
from byre.oci.tarstream import MAX_NAME, MAX_PATH, show
from byre_proto import records

#: Entries and bytes that one copy may bring, unless told otherwise: a guest must not fill the host's disk.
MAX_ENTRIES = 1_000_000
MAX_BYTES = 64 << 30

#: What a file is called that is not complete yet.
TEMPORARY = ".byre-"

#: Attributes that were not taken and are told by name; the guest chooses the names.
MAX_DROPPED = 64

AS_SENT = "copy it exactly (archive=True, -a), or as a tar"


class LocalUnpacker:
    """Files below `directory`, which exists, as the records come.

    Plainly, they are the user's own, with permission bits as the umask leaves them; a link that leads out of what
    is copied is refused.  With `archive` they get owners, special bits and attributes as far as we may, and links
    lead where they led there.  Devices, FIFOs and sockets are refused always.
    """

    def __init__(
        self, directory: str, *, archive: bool, max_entries: int = MAX_ENTRIES, max_bytes: int = MAX_BYTES
    ) -> None:
        self._archive = archive
        self._entries_left, self._bytes_left = max_entries, max_bytes
        self._lock = threading.Lock()
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        self._levels: list[tuple[str, int, FileStatus | None]] = [("", os.open(directory, flags), None)]
        self._file: tuple[FileStatus, int, str] | None = None  # entry, descriptor, temporary name
        self._left = 0
        self.dropped: dict[str, int] = {}

    def take(self, found: bytes | FileStatus) -> None:
        """The next record."""
        with self._lock:
            if not self._levels:
                raise FileFailed("the copy was given up")
            if isinstance(found, bytes):
                self._data(found)
            else:
                self._complete(found.name)
                self._entry(found)

    def finish(self) -> None:
        """The last one has come."""
        with self._lock:
            self._complete("the end")
            self._leave(0)

    def close(self) -> None:
        """Give up what is not complete.  Harmless when repeated, and when a thread is still at work."""
        with self._lock:
            if self._file is not None:
                _, fd, temporary = self._file
                os.close(fd)
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=self._levels[-1][1])
                self._file = None
            while self._levels:
                os.close(self._levels.pop()[1])

    # -- entries -------------------------------------------------------------------------------------------

    def _entry(self, entry: FileStatus) -> None:
        self._entries_left -= 1
        self._bytes_left -= entry.size
        if self._entries_left < 0 or self._bytes_left < 0:
            raise ResourceExhausted(
                f"with {show(entry.name)} the copy is over its limit of entries or bytes",
                hint="give a larger one (max_entries, max_bytes)",
                path=entry.name,
            )
        if entry.name == ".":
            return  # the directory that is there, and stays as it is
        parts = _parts(entry.name)
        self._check(entry, parts)
        self._enter(parts[:-1])
        if entry.kind == records.DIRECTORY:
            self._directory(parts[-1], entry)
        elif entry.kind == records.FILE:
            self._begin_file(entry)
        elif entry.kind == records.SYMLINK:
            self._place(parts[-1], entry, lambda name, fd: os.symlink(entry.target, name, dir_fd=fd))
        else:
            self._link(parts[-1], entry)

    def _check(self, entry: FileStatus, parts: list[str]) -> None:
        name = show(entry.name)
        if entry.kind not in (records.FILE, records.DIRECTORY, records.SYMLINK, records.LINK):
            raise PathRefused(f"{name}: a {entry.kind} is not made here", hint="leave it out", path=entry.name)
        if entry.kind == records.LINK:
            _parts(entry.target)
        if entry.kind == records.SYMLINK and not self._archive and leads_out(entry.target, len(parts) - 1):
            raise PathRefused(
                f"{name}: a link to {show(entry.target)}, which may lead out of what is copied",
                hint=AS_SENT,
                path=entry.name,
            )

    def _directory(self, base: str, entry: FileStatus) -> None:
        here = self._levels[-1][1]
        new = True
        try:
            os.mkdir(base, (entry.mode & 0o777) | 0o700, dir_fd=here)
        except FileExistsError:
            new = False
        self._open_level(base, entry if new or self._archive else None)

    def _enter(self, parts: list[str]) -> None:
        """Stand in that directory, made where it is missing; what is left on the way gets its attributes."""
        names = [level[0] for level in self._levels[1:]]
        common = 0
        while common < min(len(parts), len(names)) and parts[common] == names[common]:
            common += 1
        self._leave(common + 1)
        for part in parts[common:]:
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, 0o777, dir_fd=self._levels[-1][1])
            self._open_level(part, None)

    def _open_level(self, name: str, entry: FileStatus | None) -> None:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(name, flags, dir_fd=self._levels[-1][1])
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            raise PathNotDirectory(
                f"{show(name)}: is there, and is not a directory but perhaps a link to one",
                hint="remove it, or copy to another place",
                path=name,
            ) from None
        self._levels.append((name, fd, entry))

    def _leave(self, depth: int) -> None:
        while len(self._levels) > depth:
            _, fd, entry = self._levels.pop()
            try:
                if entry is not None:
                    self._set_attributes(fd, entry)
            finally:
                os.close(fd)

    def _link(self, base: str, entry: FileStatus) -> None:
        """A further name of a file that came before: of a link it could be one that leads elsewhere."""
        *parents, first = _parts(entry.target)
        fd = os.dup(self._levels[0][1])
        try:
            for part in parents:
                flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                below = os.open(part, flags, dir_fd=fd)
                os.close(fd)
                fd = below
            if not stat.S_ISREG(os.stat(first, dir_fd=fd, follow_symlinks=False).st_mode):
                raise PathRefused(f"{show(entry.name)}: a further name of what is no file", path=entry.name)
            self._place(
                base,
                None,
                lambda name, here: os.link(first, name, src_dir_fd=fd, dst_dir_fd=here, follow_symlinks=False),
            )
        finally:
            os.close(fd)

    def _place(self, base: str, entry: FileStatus | None, make: Any) -> None:
        here = self._levels[-1][1]
        temporary = _temporary()
        try:
            make(temporary, here)
            if entry is not None:
                if self._archive:
                    self._own(
                        lambda uid, gid: os.chown(temporary, uid, gid, dir_fd=here, follow_symlinks=False), entry
                    )
                os.utime(temporary, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=here, follow_symlinks=False)
            self._rename(temporary, base)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=here)

    def _rename(self, temporary: str, base: str) -> None:
        here = self._levels[-1][1]
        try:
            os.rename(temporary, base, src_dir_fd=here, dst_dir_fd=here)
        except IsADirectoryError:
            raise PathIsDirectory(
                f"{show(base)}: is a directory here, and something else there", hint="remove it first", path=base
            ) from None

    # -- files ---------------------------------------------------------------------------------------------

    def _begin_file(self, entry: FileStatus) -> None:
        temporary = _temporary()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        mode = 0o600 if self._archive else entry.mode & 0o777  # the latter as the umask leaves it
        fd = os.open(temporary, flags, mode, dir_fd=self._levels[-1][1])
        self._file, self._left = (entry, fd, temporary), entry.size

    def _data(self, data: bytes) -> None:
        if self._file is None or len(data) > self._left:
            raise malformed("more data than it had announced")
        self._left -= len(data)
        view = memoryview(data)
        while view:
            view = view[os.write(self._file[1], view) :]

    def _complete(self, what: str) -> None:
        """Another record than data has come: the file before it is whole, and takes its place."""
        if self._file is None:
            return
        entry, fd, temporary = self._file
        if self._left:
            raise malformed(f"{show(what)} in the middle of {show(entry.name)}, or a file")
        self._set_attributes(fd, entry)
        self._rename(temporary, entry.name.rpartition("/")[2])
        os.close(fd)
        self._file = None

    # -- attributes ----------------------------------------------------------------------------------------

    def _set_attributes(self, fd: int, entry: FileStatus) -> None:
        if self._archive:
            own = self._own(lambda uid, gid: os.chown(fd, uid, gid), entry)
            os.fchmod(fd, entry.mode & (0o7777 if own else 0o1777))
            for name, value in entry.xattrs.items():
                self._set_xattr(fd, name, value)
        elif entry.kind == records.DIRECTORY:  # it was made so that files could be made in it
            os.fchmod(fd, stat.S_IMODE(os.fstat(fd).st_mode) & entry.mode)
        os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))

    def _set_xattr(self, fd: int, name: str, value: bytes) -> None:
        try:
            if not name.startswith(records.XATTRS):
                raise OSError(errno.ENOTSUP, "")
            os.setxattr(fd, name, value)
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.EPERM, errno.EINVAL):
                raise
            self._drop(name if name.startswith(records.XATTRS) else "other attributes")

    def _own(self, chown: Any, entry: FileStatus) -> bool:
        try:
            chown(entry.uid, entry.gid)
        except PermissionError:
            self._drop("owner")
            return False
        return True

    def _drop(self, what: str) -> None:
        what = what if what in self.dropped or len(self.dropped) < MAX_DROPPED else "other attributes"
        self.dropped[what] = self.dropped.get(what, 0) + 1


def leads_out(target: str, depth: int) -> bool:
    """Whether a link in a directory `depth` levels below the top may lead above it.

    ".." counts only at the begin of a target: behind a name it would depend on what that name is.
    """
    parts = target.split("/")
    climbs = 0
    while climbs < len(parts) and parts[climbs] in ("..", "."):
        climbs += 1
    ups = parts[:climbs].count("..")
    return target.startswith("/") or not target or ups > depth or ".." in parts[climbs:]


def _parts(name: str) -> list[str]:
    """The components of a name in a copy.  Raises `PathRefused` for one that is not plainly below the top."""
    parts = name.split("/")
    whole = name.encode("utf-8", "surrogateescape")
    if any(part in ("", ".", "..") for part in parts) or "\0" in name:
        raise PathRefused(f"{show(name)} is not a name below where it is put", path=name)
    if len(whole) > MAX_PATH or max(map(len, whole.split(b"/"))) > MAX_NAME:
        raise PathRefused(f"{show(name)} is longer than a name of {MAX_NAME} or a path of {MAX_PATH} bytes may be")
    return parts


def _temporary() -> str:
    return f"{TEMPORARY}{os.urandom(6).hex()}"
