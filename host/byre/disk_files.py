"""Sparse files that become disks which containers write: made and formatted here, mounted in VMs only.

Rule: the file is opened once, and all that works on it (mke2fs, QEMU) gets that descriptor: with it go its locks,
and a scratch needs no name, so that nothing of it is left whatever is killed.  The host's kernel never mounts one.

They are formatted on the host because that takes 10 ms for any size, and in an emulated guest a second.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from . import sparse
from .errors import ByreError, InvalidRequest, StorageFailed, ToolMissing

if TYPE_CHECKING:
    from collections.abc import Callable

#: What a disk may come to take on the host where nobody said how much; it begins with some 5 MB.
DEFAULT_BYTES = 10 * 2**30

#: An ext4 file system of this size has room for its journal and little else.
MIN_BYTES = 8 * 2**20
#: ext4 with blocks of 4 KiB and 64bit can be far larger; this is a slip of the keyboard.
MAX_BYTES = 16 * 2**40

#: Beside Debian's PATH of an ordinary user, which has no /sbin.
_SBIN = "/usr/sbin:/sbin"

#: mke2fs takes 10 ms; a host whose disk hangs is not waited for longer than this, in seconds.
_TIMEOUT = 60.0


def check_size(size: int) -> None:
    """Raises `InvalidRequest`."""
    if not MIN_BYTES <= size <= MAX_BYTES:
        raise InvalidRequest(
            f"a disk cannot have {size} bytes", hint=f"{MIN_BYTES // 2**20} MiB to {MAX_BYTES // 2**40} TiB"
        )


def data_home() -> Path:
    """``$XDG_DATA_HOME/byre``."""
    base = os.environ.get("XDG_DATA_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".local/share") / "byre"


def scratch(size: int) -> int:
    """A formatted disk without a name, which is gone when it is closed; its descriptor, the caller's to close.

    It lies beside the volumes: /tmp may be memory.  Raises `StorageFailed`, `ToolMissing`.
    """
    return _unnamed(lambda fd: make(fd, size, journal=False))  # after a crash nobody has a use for it


def copied(source: int, check: Callable[[], None]) -> int:
    """What `scratch` made, as it is now, as another one.  Nobody writes to it meanwhile.  `check`: see `sparse`."""
    return _unnamed(lambda fd: sparse.copy(source, fd, check))


def _unnamed(fill: Callable[[int], None]) -> int:
    folder = data_home() / "scratch"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            fill(file.fileno())
            return os.dup(file.fileno())
    except ByreError:
        raise
    except OSError as error:
        raise StorageFailed(f"no scratch disk can be made in {folder}: {error}", errno=error.errno) from error


def make(fd: int, size: int, *, journal: bool) -> None:
    """Make the open, empty file a disk of `size` bytes with an ext4 file system.  Raises `StorageFailed`,
    `ToolMissing`, OSError."""
    program = shutil.which("mke2fs", path=f"{os.environ.get('PATH', os.defpath)}:{_SBIN}")
    if program is None:
        raise ToolMissing("mke2fs is not installed", hint="apt install e2fsprogs", tool="mke2fs")
    os.ftruncate(fd, size)
    # No blocks are kept for root, who is who fills it.  Of a new file all is zeros already.
    options = ["-q", "-F", "-t", "ext4", "-m", "0", "-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1"]
    options += [] if journal else ["-O", "^has_journal"]
    command = [program, *options, f"/proc/self/fd/{fd}"]
    try:
        done = subprocess.run(
            command, pass_fds=[fd], stdin=subprocess.DEVNULL, capture_output=True, timeout=_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        raise StorageFailed(f"mke2fs took longer than {_TIMEOUT:g} s", hint="does the disk hang?") from None
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip()
        raise StorageFailed(f"mke2fs failed: {said[-500:]}", hint="is there room, and is the size sensible?")
