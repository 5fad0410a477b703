"""How files get into a store that processes share: locks that end with their holder, and names that are whole.

Rule: a file is written aside, synced and renamed, so that under its final name it is whole or not there, whatever
is killed when.  Locks are flock(2), which the kernel releases at its holder's death; they are polled, for flock has
no timeout of its own, and `waiting` is called meanwhile: what it raises ends the wait.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

#: Seconds between two looks at a lock that another process holds.
LOCK_POLL = 0.05


@contextmanager
def locked(path: Path, waiting: Callable[[], object], *, shared: bool = False) -> Iterator[None]:
    """Hold the lock file `path`, alone or `shared` with others."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while not _flock(fd, shared):
            waiting()
            time.sleep(LOCK_POLL)
        yield
    finally:
        os.close(fd)


@contextmanager
def locked_now(path: Path) -> Iterator[bool]:
    """Hold the lock file alone, if nobody else has it: False where somebody does."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield _flock(fd, False)
    finally:
        os.close(fd)


def _flock(fd: int, shared: bool) -> bool:
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write(new: Path, data: bytes, final: Path) -> None:
    """`data` as the file `final`, by way of `new`, which is the caller's own and must not exist."""
    with open(new, "xb") as file:
        file.write(data)
        sync(file)
    publish(new, final)


def sync(file: BinaryIO) -> None:
    """What was written is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def publish(new: Path, final: Path) -> None:
    """Give a finished, synced file its name; nobody is to write to it again."""
    os.chmod(new, 0o400)
    os.rename(new, final)
    flush(final.parent)


def flush(path: Path) -> None:
    """Wait until a file, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Lease:
    """Files that are in use, and so stay: a shared flock on each.  Ends with `close`, or with this process."""

    def __init__(self) -> None:
        self._fds: list[int] = []

    def add(self, path: Path) -> bool:
        """False where the file is gone, or about to be."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        if _flock(fd, True) and os.fstat(fd).st_nlink:
            self._fds.append(fd)
            return True
        os.close(fd)
        return False

    def hold(self, fd: int) -> int:
        """An open file as it is, with the lock that its holder has; the descriptor that is ours."""
        self._fds.append(os.dup(fd))
        return self._fds[-1]

    def close(self) -> None:
        """Harmless when repeated."""
        while self._fds:
            os.close(self._fds.pop())

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def remove_unless_leased(path: Path) -> int | None:
    """Bytes freed; None where it is in use."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return 0
    try:
        if not _flock(fd, False):
            return None
        size = os.fstat(fd).st_blocks * 512
        path.unlink(missing_ok=True)
        return size
    finally:
        os.close(fd)
