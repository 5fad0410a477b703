"""Names, locks and run directories of detached VMs: who is up, who died, who may take a name.

    $XDG_RUNTIME_DIR/byre/NAME/     (without it /tmp/byre-UID/NAME/; both 0700 and the user's own)
        lock        flock(2), exclusive, held by the keeper as long as it lives; the kernel lets go of it
        socket      where clients attach; listening from before the VM boots
        info        JSON: the keeper's pid, when it began
        keeper.log  what the keeper had to say; a new keeper of the name starts it anew
        tmp/        what the keeper's VM needs (its sockets), removed with the rest

Rule: a directory belongs to whoever holds its lock.  Without a holder it is *dead*, whatever else lies in it: its
keeper was killed, and the next keeper of the name, or `byre ps`, removes it.  No pid is ever trusted for that.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import socket
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .errors import InvalidRequest, PermissionRefused, VMExists, VMNotFound, host_failed

if TYPE_CHECKING:
    from typing import Any

#: Name of the detached VM that commands use when they are not told another one.
DEFAULT = "default"

#: A host name's label, and never a path: it becomes a directory.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,47}")

#: sockaddr_un has 108 bytes for the path and its NUL (unix(7)).
MAX_SOCKET_PATH = 107

#: A lock may be held for a moment by somebody who sweeps a dead directory; a keeper holds it for good.
LOCK_PATIENCE = 0.3


class RunDir(NamedTuple):
    """The run directory of one name; it need not exist."""

    name: str
    path: Path

    @property
    def socket(self) -> Path:
        return self.path / "socket"

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @property
    def log(self) -> Path:
        return self.path / "keeper.log"

    @property
    def tmp(self) -> Path:
        return self.path / "tmp"

    def info(self) -> dict[str, Any]:
        """What the keeper wrote about itself; {} when it is not there or not whole."""
        try:
            found = json.loads((self.path / "info").read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def write_info(self, **info: Any) -> None:
        """Replace what the keeper says about itself, in one step."""
        new = self.path / "info.new"
        with host_failed("cannot write the run directory"):
            new.write_text(json.dumps(info))
            new.replace(self.path / "info")


class Claim:
    """A name that is ours: the lock of its directory.  `release` removes the directory and lets go."""

    def __init__(self, run: RunDir, fd: int) -> None:
        self.run = run
        self._fd = fd

    def release(self) -> None:
        """Remove what is in the directory, the lock last: the next of the name begins with that.  Repeatable.

        Raises `HostFailed`; the directory is dead then, for the next one to remove.
        """
        if self._fd < 0:
            return
        try:
            with host_failed("cannot remove the run directory"):
                _empty(self.run)
                self.run.lock.unlink()
                with contextlib.suppress(OSError):  # the next of the name is in it already
                    self.run.path.rmdir()
        finally:
            self.give_up()

    def abandon(self, reason: str) -> None:
        """Let go of the name and leave the directory, as dead, with the reason: `byre ps` shows and removes it."""
        try:
            self.run.write_info(**{**self.run.info(), "died": reason})
            self.run.socket.unlink(missing_ok=True)
        finally:
            self.give_up()

    def give_up(self) -> None:
        """Let go of the name, and nothing else."""
        os.close(self._fd)
        self._fd = -1


def base() -> Path:
    """The directory of all run directories, made if need be.  Raises `PermissionRefused` if it is not safe."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(runtime) and _is_own(runtime):
        path = Path(runtime, "byre")
    else:
        path = Path(f"/tmp/byre-{os.geteuid()}")
    with host_failed("cannot make the directory of run directories"):
        path.mkdir(mode=0o700, exist_ok=True)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise PermissionRefused(
            f"{path} is not a directory that only you can use",
            hint=f"look who made it; if it is yours: chmod 700 {path}",
        )
    return path


def find(name: str) -> RunDir:
    """The run directory of a name, existing or not.  Raises `InvalidRequest` for what cannot be a name."""
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"{name!r} cannot be the name of a VM",
            hint="letters, digits, '_', '.' and '-', at most 48, the first a letter or digit",
        )
    run = RunDir(name, base() / name)
    if len(os.fsencode(run.socket)) > MAX_SOCKET_PATH:
        raise InvalidRequest(
            f"{run.socket} is too long for a socket", hint="use a shorter name or a shorter XDG_RUNTIME_DIR"
        )
    return run


def claim(name: str) -> Claim:
    """Take a name, and the directory over from a dead keeper.  Raises `VMExists` while another has it."""
    run = find(name)
    claim = Claim(run, _lock(run))
    try:
        with host_failed("cannot make the run directory"):
            _empty(run)
            run.tmp.mkdir(mode=0o700)
    except BaseException:
        claim.give_up()
        raise
    return claim


def connect(name: str) -> socket.socket:
    """A connected socket of the keeper of this name, the caller's to close.  Raises `VMNotFound`."""
    channel = _connect(find(name))
    if channel is None:
        raise VMNotFound(f"no VM named {name!r} is up", hint=_others(name))
    return channel


def is_up(name: str) -> bool:
    """Whether a keeper of this name takes clients; its VM may still be booting."""
    channel = _connect(find(name))
    if channel is not None:
        channel.close()
    return channel is not None


def _connect(run: RunDir) -> socket.socket | None:
    """None: nobody listens.  Raises `HostFailed`."""
    with host_failed(f"cannot reach the keeper of {run.name!r}"):
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            channel.connect(os.fspath(run.socket))
        except (FileNotFoundError, ConnectionRefusedError):
            channel.close()
            return None
        except OSError:
            channel.close()
            raise
        return channel


def names() -> list[str]:
    """Every name that has a directory, alive or dead, in alphabetical order."""
    return sorted(entry.name for entry in base().iterdir() if entry.is_dir() and _NAME.fullmatch(entry.name))


def sweep(name: str) -> bool:
    """Remove the directory of a dead keeper; False when it is alive, or there is none."""
    run = find(name)
    if not run.path.is_dir():
        return False
    try:
        fd = _lock(run)
    except VMExists:
        return False
    Claim(run, fd).release()
    return True


def _others(name: str) -> str:
    up = [other for other in names() if other != name and is_up(other)]
    if up:
        return f"up are: {', '.join(up)}"
    return "start one: byre up" if name == DEFAULT else f"start it: byre up {name}"


def _is_own(path: str) -> bool:
    try:
        return os.stat(path).st_uid == os.geteuid()
    except OSError:
        return False


def _empty(run: RunDir) -> None:
    for left in run.path.iterdir():
        if left == run.lock:
            continue
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        else:
            left.unlink()


def _lock(run: RunDir) -> int:
    """The exclusive lock of a directory, made if need be, as a descriptor.  Raises `VMExists`, `HostFailed`."""
    with host_failed(f"cannot lock the run directory of {run.name!r}"):
        return _lock_it(run)


def _lock_it(run: RunDir) -> int:
    patience = time.monotonic() + LOCK_PATIENCE
    while True:
        run.path.mkdir(mode=0o700, exist_ok=True)
        try:
            fd = os.open(run.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError:
            continue  # the directory was swept away between the two lines
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            if time.monotonic() > patience:
                raise VMExists(f"a VM named {run.name!r} is up", hint=f"end it: byre down {run.name}") from None
            time.sleep(LOCK_PATIENCE / 10)
            continue
        except BaseException:
            os.close(fd)
            raise
        # The file that we locked may have been removed meanwhile: then the lock guards nothing.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.stat(run.lock)):
                return fd
        os.close(fd)
