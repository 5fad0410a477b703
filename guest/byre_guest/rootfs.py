"""Files below a container's root, opened so that nothing in it can lead outside or make the reader hang.

Rule: the content of a root is hostile.  A symbolic link is followed as if the root were /, a magic link never; a
file is read only when it is a regular one, and only up to a size.  A device, a FIFO or a socket is not opened.
All of it may still block (a 9p mount): it runs in a helper child with a deadline, never in the loop (B47).
"""

from __future__ import annotations

import errno
import os
import select
import stat

from byre_proto.errors import ProgramNotExecutable, ProgramNotFound, WorkingDirectoryNotFound

from . import linux

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

#: As the kernel resolves below `root_fd` (openat2(2)): ".." and absolute links stay inside.
INSIDE = linux.RESOLVE_IN_ROOT | linux.RESOLVE_NO_MAGICLINKS

#: How often a path is tried in which something was renamed meanwhile: the kernel gives up on a ".." that it then
#: cannot vouch for (EAGAIN), and a container may rename without end.
MAX_RACES = 64

#: Where programs are looked for when the environment has no PATH.
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

#: A `#!` line is read up to this by the kernel (binfmt_script's BINPRM_BUF_SIZE).
HEAD_SIZE = 256

#: e_machine of the ELF header (elf.h) by what uname(2) says of this machine, with those that it runs besides.
ELF_MACHINES = {"x86_64": (62, 3), "aarch64": (183, 40)}

#: PT_INTERP, and how many program headers are looked at for it.
PT_INTERP = 3
MAX_HEADERS = 64


def open_root(path: str) -> int:
    """The directory that is the root, for the functions below."""
    return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def open_root_of(pid: int, pidfd: int) -> int:
    """The root as the process sees it, its mounts and all.  Raises ProcessLookupError, OSError when it has ended.

    It may end at any time, and its number then be another's.  If it lives after the root was opened, the root is
    its own.
    """
    root = open_root(f"/proc/{pid}/root")
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    if poll.poll(0):
        os.close(root)
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
    return root


def find(root_fd: int, path: str, flags: int = 0) -> int:
    """An O_PATH descriptor of what `path` names inside; `flags` may add O_NOFOLLOW and such.  Raises OSError."""
    for _ in range(MAX_RACES):
        try:
            return linux.openat2(path, os.O_PATH | flags, INSIDE, dir_fd=root_fd)
        except BlockingIOError:
            pass
    return linux.openat2(path, os.O_PATH | flags, INSIDE, dir_fd=root_fd)


def status(root_fd: int, path: str) -> os.stat_result | None:
    """stat(2) inside the root; None when it is not there."""
    try:
        fd = find(root_fd, path)
    except OSError:
        return None
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def read(root_fd: int, path: str, limit: int) -> bytes:
    """The first `limit` bytes of a regular file inside the root; b"" when there is no such regular file."""
    try:
        fd = find(root_fd, path)
    except OSError:
        return b""
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return b""
        with open(f"/proc/self/fd/{fd}", "rb", buffering=0) as file:
            return file.read(limit) or b""
    finally:
        os.close(fd)


def check_directory(root_fd: int, path: str) -> None:
    """Raises `WorkingDirectoryNotFound` when `path` is not a directory inside the root (B14)."""
    found = status(root_fd, path)
    if found is None or not stat.S_ISDIR(found.st_mode):
        raise WorkingDirectoryNotFound(
            f"the working directory {path!r} is not a directory of the container",
            hint="create it in the image, or give another one",
            cwd=path,
        )


def find_program(root_fd: int, program: str, cwd: str, search: str) -> str:
    """The path of `program`, "" when it is not found; `search` is the value of PATH (B14).

    The OCI runtime finds out what is missing; what it executes and the kernel refuses would show only as an exit.
    So its format is looked at: no interpreter, another machine's, neither ELF nor a script.  Raises
    `ProgramNotFound`, `ProgramNotExecutable`.
    """
    for path in candidates(program, cwd, search):
        found = status(root_fd, path)
        if found is not None and stat.S_ISREG(found.st_mode) and found.st_mode & 0o111:
            _check_format(root_fd, path)
            return path
    return ""


def candidates(program: str, cwd: str, search: str) -> Sequence[str]:
    """The paths where a program of this name is looked for, in order, as execvp(3) does."""
    if "/" in program:
        return [os.path.join(cwd, program)]
    return [os.path.join(cwd, directory, program) for directory in search.split(":")]


def _check_format(root_fd: int, path: str) -> None:
    head = read(root_fd, path, HEAD_SIZE)
    if head[:2] == b"#!":
        words = head[2:].split(b"\n")[0].split()
        interpreter = os.fsdecode(words[0]) if words else ""
    elif head[:4] == b"\x7fELF":
        if int.from_bytes(head[18:20], "little") not in ELF_MACHINES.get(os.uname().machine, ()):
            raise ProgramNotExecutable(
                f"{path}: a program for another kind of machine",
                hint=f"use an image for {os.uname().machine}",
                program=path,
            )
        interpreter = _elf_interpreter(root_fd, path, head)
        if not interpreter:
            return
    else:
        raise ProgramNotExecutable(
            f"{path}: {os.strerror(errno.ENOEXEC)}: neither an ELF program nor a script with a #! line",
            hint="run it by its interpreter, for example sh",
            program=path,
        )
    if status(root_fd, interpreter) is None:
        raise ProgramNotFound(
            f"{path}: its interpreter {interpreter!r} does not exist in the container",
            hint="is the image complete?",
            program=path,
        )


def _elf_interpreter(root_fd: int, path: str, head: bytes) -> str:
    """The dynamic loader that an ELF file asks for; "" when it is static (elf(5)).  64 bit only."""
    if head[4] != 2:
        return ""
    start, size = int.from_bytes(head[32:40], "little"), int.from_bytes(head[54:56], "little")
    count = min(int.from_bytes(head[56:58], "little"), MAX_HEADERS)
    data = read(root_fd, path, start + size * count) if start < HEAD_SIZE and size == 56 else b""
    for at in range(start, len(data) - 55, 56):
        if int.from_bytes(data[at : at + 4], "little") == PT_INTERP:
            offset = int.from_bytes(data[at + 8 : at + 16], "little")
            length = int.from_bytes(data[at + 32 : at + 40], "little")
            if offset + length <= 64 * 1024:
                name = read(root_fd, path, offset + length)[offset:].split(b"\0")[0]
                return os.fsdecode(name)
    return ""
