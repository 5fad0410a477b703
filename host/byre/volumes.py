"""Named volumes: disks that outlive VMs, and who has them.

    $XDG_DATA_HOME/byre/volumes/
        NAME.disk       a sparse file with a file system (`disk_files`)
        NAME.holder     JSON: the VM and the process that have it, or had it last
        .new-*          a disk that is being made

Rule: who has the flock on the disk has the volume.  The lock is of the open file, and QEMU has that too
(`machines.disks`), so it ends when the owner *and* the machine are gone, however they end, and nothing has to be
tidied up.  Under its name a disk is whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from . import disk_files
from .errors import ByreError, StorageFailed, VolumeExists, VolumeInUse, VolumeNotFound
from .mounts import check_name
from .oci.files import flush

#: How long a volume that is taken is waited for, in seconds: a QEMU whose owner was killed ends in a moment, and
#: whoever looks at a volume has the lock for as long as that takes.
PATIENCE = 1.0
_PAUSE = 0.02

_DISK, _HOLDER, _NEW = ".disk", ".holder", ".new-"


@dataclass(frozen=True, kw_only=True)
class VolumeInfo:
    """A volume.

    size_bytes    what fits in it, with the file system's own
    disk_bytes    what it takes on the host's disk
    written       when it was written last, in seconds since the epoch
    vm, pid       the VM that has it, and the process that this belongs to; "" and 0 where nobody has it
    """

    name: str
    path: Path
    size_bytes: int
    disk_bytes: int
    written: float
    vm: str = ""
    pid: int = 0


def create(name: str, size_bytes: int = disk_files.DEFAULT_BYTES) -> VolumeInfo:
    """Make a volume of at most so many bytes.  Raises `VolumeExists`, `InvalidRequest`, `StorageFailed`,
    `ToolMissing`."""
    path = path_of(name)
    disk_files.check_size(size_bytes)
    if path.exists():
        raise _exists(name)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _new(path.parent) as (fd, new):
            disk_files.make(fd, size_bytes, journal=True)
            os.fsync(fd)
            os.link(new, path)
        flush(path.parent)
    except FileExistsError:  # somebody else was faster
        raise _exists(name) from None
    except ByreError:
        raise
    except OSError as error:
        raise StorageFailed(f"the volume {name!r} could not be made: {error}", errno=error.errno) from error
    return inspect(name)


def ensure(name: str) -> Path:
    """The disk of a volume, which is made where there is none."""
    path = path_of(name)
    if not path.exists():
        with contextlib.suppress(VolumeExists):
            create(name)
    return path


def list_volumes() -> list[VolumeInfo]:
    """All volumes, by name."""
    found = []
    for path in _files(f"*{_DISK}"):
        with contextlib.suppress(VolumeNotFound):
            found.append(inspect(path.name.removesuffix(_DISK)))
    return found


def inspect(name: str) -> VolumeInfo:
    """What there is to know of one.  Raises `VolumeNotFound`."""
    path = path_of(name)
    with _opened(path) as fd:
        status = os.fstat(fd)
        vm, pid = ("", 0) if _locked(fd, fcntl.LOCK_SH) else _holder(path)
    return VolumeInfo(
        name=name,
        path=path,
        size_bytes=status.st_size,
        disk_bytes=status.st_blocks * 512,
        written=status.st_mtime,
        vm=vm,
        pid=pid,
    )


def remove(name: str) -> None:
    """Remove a volume and all that is in it.  Raises `VolumeNotFound`, `VolumeInUse`."""
    _remove(path_of(name), PATIENCE)


def prune(names: Collection[str] | None = None) -> list[VolumeInfo]:
    """Remove every volume (of these names) that no VM has, and what killed makers left; those volumes."""
    removed = []
    for info in list_volumes():
        if names is not None and info.name not in names:
            continue
        with contextlib.suppress(VolumeInUse, VolumeNotFound):
            _remove(info.path, 0)
            removed.append(info)
    for left in _files(f"{_NEW}*"):
        with contextlib.suppress(VolumeInUse, VolumeNotFound):
            _remove(left, 0)
    return removed


def take(path: Path, vm: str, check: Callable[[], None] = lambda: None) -> int:
    """The disk of a volume, open for writing and locked for `vm`; a descriptor, the caller's to close.

    Raises `VolumeInUse`, `VolumeNotFound`, and what `check` raises while the lock is waited for.
    """
    with _opened(path) as fd:
        _lock(fd, path, PATIENCE, check)
        path.with_suffix(_HOLDER).write_text(json.dumps({"vm": vm, "pid": os.getpid()}))
        return os.dup(fd)


def path_of(name: str) -> Path:
    """The disk of a volume of this name, which need not exist.  Raises `InvalidRequest`."""
    check_name(name)
    return _root() / f"{name}{_DISK}"


@contextlib.contextmanager
def _new(folder: Path) -> Iterator[tuple[int, Path]]:
    """A new file and its name, which it has inside only: locked, so that `prune` sees that somebody is at it."""
    while True:
        path = folder / f"{_NEW}{secrets.token_hex(8)}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if not os.fstat(fd).st_nlink:  # `prune` came between the two lines
                continue
            try:
                yield fd, path
            finally:
                path.unlink()
            return
        finally:
            os.close(fd)


def _remove(path: Path, patience: float) -> None:
    with _opened(path) as fd:
        _lock(fd, path, patience, lambda: None)
        path.unlink()
        path.with_suffix(_HOLDER).unlink(missing_ok=True)


def _lock(fd: int, path: Path, patience: float, check: Callable[[], None]) -> None:
    """The exclusive lock.  Raises `VolumeInUse`; `VolumeNotFound` when the volume is gone by then."""
    deadline = time.monotonic() + patience
    while not _locked(fd, fcntl.LOCK_EX):
        if time.monotonic() >= deadline:
            raise _in_use(path)
        check()
        time.sleep(_PAUSE)
    if not os.fstat(fd).st_nlink:
        raise _not_found(path)


def _locked(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise _not_found(path) from None
    except OSError as error:
        raise StorageFailed(f"the volume {path.stem!r} cannot be opened: {error}", errno=error.errno) from error
    try:
        yield fd
    finally:
        os.close(fd)


def _holder(path: Path) -> tuple[str, int]:
    """The VM and the process that wrote last that they have it."""
    try:
        found = json.loads(path.with_suffix(_HOLDER).read_text())
        return str(found["vm"]), int(found["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return "", 0


def _root() -> Path:
    return disk_files.data_home() / "volumes"


def _files(pattern: str) -> list[Path]:
    return sorted(_root().glob(pattern))


def _exists(name: str) -> VolumeExists:
    return VolumeExists(f"there is a volume {name!r} already", hint="see: byre volume ls", volume=name)


def _not_found(path: Path) -> VolumeNotFound:
    return VolumeNotFound(f"there is no volume {path.stem!r}", hint="see: byre volume ls", volume=path.stem)


def _in_use(path: Path) -> VolumeInUse:
    vm, pid = _holder(path)
    return VolumeInUse(
        f"the volume {path.stem!r} is in use by the VM {vm!r}, process {pid}",
        hint="containers of that VM can share it; it is free when they are deleted, or the VM has ended",
        volume=path.stem,
        vm=vm,
        pid=pid,
    )
