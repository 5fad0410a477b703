"""Where the paths of a file operation begin: the root of a container, or of the VM, and what is done below it.

Rule: a path is resolved by the kernel with the root for its "/" (`rootfs.INSIDE`), and all else is done through
descriptors and single names, which no link leads away from.  So nothing that a container does meanwhile, with
links, mounts or renames, makes an operation leave its root (B65).  What is not a regular file is not opened: a FIFO
would block, a device would do things.
"""

from __future__ import annotations

import errno
import os
import stat

from byre_proto import records
from byre_proto.errors import FileFailed, InvalidRequest, PathIsDirectory, PathNotDirectory, PathRefused

from . import linux, rootfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

#: Links at the end of a path that `Place.final` follows; the kernel has the same limit for a whole path.
MAX_LINKS = 40

#: Levels of directories: two descriptors each, within the 4,096 that the kernel gives everybody.
MAX_DEPTH = 1024

#: What a name is called that is renamed to the right one when it is complete: a cut operation leaves the old file.
TEMPORARY = ".byre-"


class Place:
    """Below one root.  All of its methods may block, and raise OSError."""

    def __init__(self, root: int) -> None:
        self.root = root

    def find(self, path: str, flags: int = 0) -> int:
        """An O_PATH descriptor; see `rootfs.find`."""
        return rootfs.find(self.root, path, flags)

    def directory(self, path: str) -> int:
        """An O_PATH descriptor of a directory: good for `dir_fd`."""
        return self.find(path, os.O_DIRECTORY)

    def parent(self, path: str) -> tuple[int, str]:
        """The directory in which `path` is a name, and that name.  Raises `InvalidRequest` where it is none."""
        head, _, name = path.rstrip("/").rpartition("/")
        if name in ("", ".", ".."):
            raise InvalidRequest(f"{path!r} does not end with a name", field="path")
        return self.directory(head + "/" if head or path.startswith("/") else "."), name

    def final(self, path: str) -> tuple[int, str]:
        """As `parent`, of what the path leads to when links at its end are followed; it need not exist."""
        for _ in range(MAX_LINKS):
            directory, name = self.parent(path)
            try:
                target = os.readlink(name, dir_fd=directory)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOENT):  # no link; nothing there
                    raise
                return directory, name
            os.close(directory)
            path = os.path.join(os.path.dirname(path.rstrip("/")), target)
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)


def reopen(fd: int, flags: int) -> int:
    """The file of an O_PATH descriptor, opened: that very one, whatever its name means by now."""
    return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)


def open_regular(fd: int, path: str) -> int:
    """The regular file of an O_PATH descriptor, for reading; `path` is for the error."""
    check_regular(os.fstat(fd), path)
    return reopen(fd, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)


def check_regular(status: os.stat_result, path: str) -> None:
    """Raises `PathIsDirectory`, or `FileFailed` for a FIFO, a device, a socket."""
    kind = kind_of(status)
    if kind == records.DIRECTORY:
        raise PathIsDirectory(f"{path}: is a directory", hint="copy it, or name a file in it", path=path)
    if kind != records.FILE:
        raise FileFailed(f"{path}: is a {kind}, not a regular file", hint="a process inside can use it", path=path)


def open_directory(name: str, directory: int | None = None) -> int:
    """A directory by a single name, for reading its entries; no link is followed."""
    return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)


def kind_of(status: os.stat_result) -> str:
    """Its kind, as records have it."""
    return records.KINDS[stat.S_IFMT(status.st_mode)]


def entry(name: str, status: os.stat_result, target: str = "", xattrs: dict[str, bytes] | None = None) -> list[Any]:
    """The fields of an entry record."""
    kind = kind_of(status)
    device = (
        [os.major(status.st_rdev), os.minor(status.st_rdev)] if kind in (records.CHARACTER, records.BLOCK) else []
    )
    return [
        *("entry", name, kind, stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_mtime_ns),
        *(status.st_size if kind == records.FILE else 0, target, device, xattrs or {}),
    ]


def link_target(name: str, directory: int, status: os.stat_result) -> str:
    """Where a symbolic link leads; "" for what is none."""
    return os.readlink(name, dir_fd=directory) if stat.S_ISLNK(status.st_mode) else ""


def read_xattrs(fd: int) -> dict[str, bytes]:
    """Those that are carried, of an open file or directory."""
    try:
        return {name: os.getxattr(fd, name) for name in os.listxattr(fd) if name.startswith(records.XATTRS)}
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.ENODATA):  # none here; gone meanwhile
            return {}
        raise


def place_new(directory: int, name: str, make: Callable[[str], None]) -> None:
    """Have `make` make something under a temporary name, and put it in the place of whatever has the name."""
    temporary = f"{TEMPORARY}{os.urandom(6).hex()}"
    try:
        make(temporary)
        os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    finally:
        try:  # also after a rename: between two links to one file it does nothing
            os.unlink(temporary, dir_fd=directory)
        except OSError:
            pass


def create_file(directory: int, name: str) -> int:
    """A new file, for writing, that nobody else can open yet."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(name, flags, 0o600, dir_fd=directory)


def write_all(fd: int, data: bytes) -> None:
    """All of it."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def walk(top: int, *, recursive: bool) -> Iterator[tuple[str, int, str, os.stat_result]]:
    """What is below an open directory, each before what is in it: `(path from the top, directory, name, status)`.

    No link is followed, and no file system entered that is the kernel's own view of itself.  What disappears
    meanwhile is left out.  The directory is open only until the next step.  `top` is closed at the end.
    """
    levels = [("", top, os.scandir(top))]
    try:
        while levels:
            prefix, directory, entries = levels[-1]
            found = next(entries, None)
            if found is None:
                levels.pop()
                entries.close()
                os.close(directory)
                continue
            try:
                status = os.stat(found.name, dir_fd=directory, follow_symlinks=False)
            except FileNotFoundError:
                continue
            path = prefix + found.name
            yield path, directory, found.name, status
            if recursive and stat.S_ISDIR(status.st_mode):
                if len(levels) > MAX_DEPTH:
                    raise PathRefused(f"{path[:200]}...: directories in more than {MAX_DEPTH} levels", path=path)
                inner = _enter(found.name, directory)
                if inner >= 0:
                    levels.append((path + "/", inner, os.scandir(inner)))
    finally:
        for _, directory, entries in levels:
            entries.close()
            os.close(directory)


def _enter(name: str, directory: int) -> int:
    """A directory to go on in; -1 for one that is gone, or not to be entered."""
    try:
        inner = open_directory(name, directory)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):  # something else has its name now
            return -1
        raise
    if os.fstat(inner).st_dev != os.fstat(directory).st_dev and is_pseudo(inner):
        os.close(inner)
        return -1
    return inner


#: Magic numbers of file systems that are a view of the kernel, and may have no end (`linux/magic.h`): proc, sysfs,
#: cgroup, cgroup2, devpts, debugfs, tracefs, securityfs, bpf, mqueue, pstore, efivarfs, configfs, fusectl.
PSEUDO = frozenset(
    (
        *(0x9FA0, 0x62656572, 0x27E0EB, 0x63677270, 0x1CD1, 0x64626720, 0x74726163, 0x73636673, 0xCAFE4A11),
        *(0x19800202, 0x6165676C, 0xDE5E81E4, 0x62656570, 0x65735543),
    )
)


def is_pseudo(fd: int) -> bool:
    """Whether the file system is the kernel's view of itself."""
    return linux.filesystem_type(fd) in PSEUDO


def check_names(name: str) -> list[str]:
    """The components of an entry's name.  Raises `PathRefused` for one that is not plainly below."""
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\0" in name:
        raise PathRefused(f"{name[:200]!r} is not a name below where it is put", path=name)
    return parts


def not_a_directory(path: str) -> PathNotDirectory:
    """The error for something that is in a directory's way."""
    return PathNotDirectory(f"{path}: is there, and is not a directory", path=path)
