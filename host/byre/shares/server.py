"""`Server`: diod, in a process of its own that sees one directory, behind one socket.

Rule: whoever is connected to the socket is hostile; all that keeps it in the directory is done by `confine`, before
a first byte from there can come.  The server dies with this process (`machines.spawn`), and is killed, not asked.
"""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import socket
import stat
import struct
import sys
from pathlib import Path

from byre.errors import (
    ByreError,
    PathNotDirectory,
    PathNotFound,
    PermissionRefused,
    ShareFailed,
    ToolMissing,
)
from byre.helper import Helper
from byre.machines.namespaces import HINT

#: The program.
DIOD = "diod"

#: For the server to be there, in seconds: a tenth of one when all is well.
START_TIMEOUT = 30.0

#: Bytes of one message: what diod takes; it keeps to the first that it was told.
MSIZE = 65536

#: Tversion: size, type 100, tag NOTAG, largest message, "9P2000.L".  What answers has type 101.
HELLO = struct.pack("<IBHIH8s", 21, 100, 0xFFFF, MSIZE, 8, b"9P2000.L")
HELLO_ANSWER = 101

#: A line of `confine`, in bytes.
MAX_LINE = 1024


class Server(Helper):
    """See the module.  `sock` is connected to it, and non-blocking; it is the caller's."""

    def __init__(self, directory: str, read_only: bool) -> None:
        self.directory = directory
        self.sock, theirs = socket.socketpair()
        self._control, control = socket.socketpair()
        for ours in (self.sock, self._control):
            ours.setblocking(False)
        fd = theirs.fileno()
        super().__init__(
            [
                *(sys.executable, "-I", "-S", str(Path(__file__).with_name("confine.py"))),
                *(str(control.fileno()), str(fd), directory, "ro" if read_only else "rw"),
                *(found(), "--foreground", "--no-auth", "--no-userdb", "--export", "/", "--logdest", "stderr"),
                *("--rfdno", str(fd), "--wfdno", str(fd)),
            ],
            handed=(control.detach(), theirs.detach()),
        )

    async def begin(self) -> None:
        """Start it, shut it in, and wait for its first answer.

        Raises `ShareFailed`; after an error, or a cancellation, nothing is left of it.
        """
        self.start()
        try:
            async with asyncio.timeout(START_TIMEOUT):
                await self._start()
        except TimeoutError:
            await self._give_up()
            raise ShareFailed(f"the server of {self.directory} did not start in {START_TIMEOUT:g} s") from None
        except OSError as error:
            await self._give_up()
            if isinstance(error, ByreError):
                raise
            raise self._failed(f"{error.filename or ''} {error.strerror or error}".strip()) from error
        except BaseException:
            await self._give_up()
            raise
        finally:
            self._control.close()

    async def _start(self) -> None:
        loop = asyncio.get_running_loop()
        await self._step("map")
        assert self.pid, "it has said something"
        map_users(self.pid)
        await loop.sock_sendall(self._control, b".")
        await self._step("loading")
        await loop.sock_sendall(self.sock, HELLO)
        answer = await loop.sock_recv(self.sock, len(HELLO))
        if len(answer) < len(HELLO) or answer[4] != HELLO_ANSWER:
            raise self._failed("it did not answer")
        await loop.sock_sendall(self._control, b".")
        await self._step("ready")

    async def _step(self, expected: str) -> None:
        line = (
            (await asyncio.get_running_loop().sock_recv(self._control, MAX_LINE)).decode(errors="replace").strip()
        )
        if line.startswith("error unshare"):
            raise ShareFailed(f"{self.directory} cannot be shared: {line}", hint=HINT)
        if line != expected:
            raise self._failed(line or "it has ended")

    def _failed(self, why: str) -> ShareFailed:
        return ShareFailed(f"the server of {self.directory} did not start: {why}{self.last_words}")

    async def _give_up(self) -> None:
        self.sock.close()
        self.kill()
        await self.wait()


def found() -> str:
    """The server's program.  Raises `ToolMissing`."""
    from byre_images.tools import SEARCH

    path = shutil.which(DIOD, path=SEARCH)
    if path is None:
        raise ToolMissing("there is no diod to share directories with", hint="apt install diod")
    return path


def check(directory: str) -> None:
    """Whether there is such a directory.  Raises `PathNotFound`, `PathNotDirectory`, `PermissionRefused`."""
    try:
        mode = os.stat(directory).st_mode
        if not stat.S_ISDIR(mode):
            raise PathNotDirectory(f"{directory} is not a directory of this host", path=directory)
        if not os.access(directory, os.R_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except FileNotFoundError:
        raise PathNotFound(
            f"there is no directory {directory} on this host", hint="make it first", path=directory
        ) from None
    except PermissionError as error:
        raise PermissionRefused(f"{directory}: {error.strerror}", path=directory) from error


def map_users(pid: int) -> None:
    """Say who is who in the user namespace of a process that has just made it (user_namespaces(7)).

    Everybody is himself where this is root's; else there is one user inside, root, and that is us.  Raises OSError.
    """
    whole = os.geteuid() == 0
    if not whole:
        Path(f"/proc/{pid}/setgroups").write_text("deny")
    for name, own in (("uid_map", os.geteuid()), ("gid_map", os.getegid())):
        lines = [line.split() for line in Path(f"/proc/self/{name}").read_text().splitlines()]
        text = "".join(f"{inside} {inside} {count}\n" for inside, _, count in lines) if whole else f"0 {own} 1\n"
        Path(f"/proc/{pid}/{name}").write_text(text)
