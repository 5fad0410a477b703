"""A template's files, seen from the outside: whose they are, what they look like, what is in them.

Rule: no link is followed, and nothing is decided here but whether a file is what it is said to be.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import PermissionRefused

if TYPE_CHECKING:
    from collections.abc import Callable

_BLOCK = 64 * 1024
_ZEROS = bytes(_BLOCK)

#: Permissions that nobody but the owner may have.
_OTHERS = 0o077


def memory_digest(path: Path) -> str:
    """SHA-256 of the blocks that are not all zeros, each after its offset: holes take no time."""
    total = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        at = 0
        while at < size:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA) // _BLOCK * _BLOCK
            except OSError:  # ENXIO: no more data
                break
            block = os.pread(file.fileno(), _BLOCK, at)
            if block != _ZEROS[: len(block)]:
                total.update(at.to_bytes(8, "big"))
                total.update(block)
            at += _BLOCK
    return total.hexdigest()


def digest(path: Path) -> str:
    """SHA-256 of a small file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def look(path: Path) -> dict[str, int]:
    """What changes with the contents, at no cost."""
    status = path.stat()
    return {
        "size": status.st_size,
        "inode": status.st_ino,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
    }


def check_own(path: Path, kind: Callable[[int], bool]) -> os.stat_result:
    """The status of a path that is of this kind (`stat.S_ISREG`, ...) and for this user alone.

    Raises `PermissionRefused`, FileNotFoundError.
    """
    status = path.lstat()
    if not kind(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & _OTHERS:
        raise PermissionRefused(f"{path} is not what only you can use", hint=f"look who made it: ls -ld {path}")
    return status


def remove(path: Path) -> None:
    """A directory, file or link; harmless when it is not there."""
    if path.is_dir() and not path.is_symlink():
        # Out of the way in one step: nobody finds half of it.
        gone = path.with_name(f"{secrets.token_hex(8)}.gone")
        with contextlib.suppress(FileNotFoundError):
            path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
