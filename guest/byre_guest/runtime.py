"""The OCI runtime, crun: how it is called, what its words mean, and how it hands a terminal over.

Rule: crun gets the container's streams as its own, so that no copying process stands between; what it has to say
goes to a log file.  It is told nothing that it can be told by a file: no secret and no user's text is an
argument.  Source: crun(1), runc's --console-socket protocol (one message, the master in SCM_RIGHTS).
"""

from __future__ import annotations

import _socket  # not `socket`, which imports enum and selectors
import os

from byre_proto.errors import (
    ByreError,
    ContainerNotReady,
    DeadlineExceeded,
    ProgramNotExecutable,
    ProgramNotFound,
    RuntimeFailed,
    WorkingDirectoryNotFound,
)

from . import bundle, children, reserve

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from .loop import Loop
    from .processes import Stdio
    from .reaper import Reaper

CRUN = "/usr/bin/crun"
STATE = "/run/crun"

#: All that crun gets of the agent's environment.
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}

#: For one call of crun, in seconds.  It takes 0.1 s under emulation; this is for a VM that is overcommitted.
TIMEOUT = 60.0

#: What is read of a log or a pid file.
MAX_LOG = 64 * 1024

#: What crun says -> what it means, and what of the process object it is about.  The first that occurs counts.
MEANINGS: tuple[tuple[str, type[ByreError], str], ...] = (
    ("executable file", ProgramNotFound, "program"),
    ("open executable", ProgramNotExecutable, "program"),
    ("chdir `", WorkingDirectoryNotFound, "cwd"),
    ("is not running", ContainerNotReady, ""),
)


class Call:
    """One run of crun on a container.  `number` names its files in the bundle."""

    def __init__(self, loop: Loop, reaper: Reaper, container: str, number: int) -> None:
        self._loop = loop
        self._reaper = reaper
        self._container = container
        self._base = f"{bundle.path_of(container)}/{number}"
        self._console: _socket.socket | None = None
        self.process: dict[str, Any] = {}  # process object of what is to run, for errors to name
        self.process_file = f"{self._base}.json"

    def run(
        self,
        command: Sequence[str],
        done: Callable[[ByreError | None], object],
        *,
        stdio: Stdio | None = None,
        timeout: float | None = None,
    ) -> children.Child:
        """Run `crun COMMAND… CONTAINER`; `done(None)` or `done(error)` follows.  Raises `StartFailed`.

        With `stdio`, crun and so the container has its streams, or else a terminal whose master `finish` gives
        to it.
        """
        seconds = TIMEOUT if timeout is None else timeout
        argv = [CRUN, f"--root={STATE}", "--cgroup-manager=cgroupfs", f"--log={self._base}.log", *command]
        terminal = stdio is not None and stdio.terminal
        if stdio is not None:
            argv += ["--pid-file", f"{self._base}.pid"]
        if terminal:
            self._listen()
            argv += ["--console-socket", f"{self._base}.tty"]
        theirs = stdio.theirs if stdio is not None and not terminal else None

        def ended(code: int | None, _out: bytes, stderr: bytes) -> None:
            done(None if code == 0 else self._failure(command[0], code, stderr, seconds))

        return children.command(
            self._loop,
            self._reaper,
            [*argv, self._container],
            seconds,
            ended,
            env=ENVIRONMENT,
            stdin=theirs[0] if theirs else b"",
            stdout=theirs[1] if theirs else None,
            stderr=theirs[2] if theirs else None,
        )

    def finish(self, stdio: Stdio) -> int:
        """After success: the pid; a terminal's master goes to `stdio`.  Raises `RuntimeFailed`."""
        text = _read(f"{self._base}.pid")
        if not text.isdigit():
            raise RuntimeFailed(f"crun left no pid but {text!r}")
        if self._console is not None:
            stdio.set_master(self._receive_master(self._console))
        return int(text)

    def close(self) -> None:
        """Remove its files.  Harmless when repeated."""
        if self._console is not None:
            self._console.close()
            self._console = None
        for suffix in ("json", "log", "pid", "tty"):
            try:
                os.unlink(f"{self._base}.{suffix}")
            except FileNotFoundError:
                pass

    def _listen(self) -> None:
        kind = _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC | _socket.SOCK_NONBLOCK
        self._console = _socket.socket(_socket.AF_UNIX, kind)
        self._console.bind(f"{self._base}.tty")
        self._console.listen(1)

    @staticmethod
    def _receive_master(console: _socket.socket) -> int:
        """crun has connected and sent before it ended, so nothing of this waits."""
        try:
            fd, _address = console._accept()  # type: ignore[attr-defined]
            connection = _socket.socket(fileno=fd)
            connection.setblocking(False)
            messages = connection.recvmsg(256, _socket.CMSG_SPACE(4), _socket.MSG_CMSG_CLOEXEC)[1]
            connection.close()
        except OSError as error:
            raise RuntimeFailed(f"crun handed no terminal over: {error.strerror}") from error
        for level, kind, data in messages:
            if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
                return int.from_bytes(data[:4], "little")
        raise RuntimeFailed("crun handed no terminal over")

    def _failure(self, command: str, code: int | None, stderr: bytes, seconds: float) -> ByreError:
        if code is None:
            return DeadlineExceeded(f"crun {command} took longer than {seconds:g} s", timeout=seconds)
        try:
            log = _read(f"{self._base}.log")
        except OSError as error:  # then that is all that can be told: the caller waits for an answer
            log = f"its log cannot be read: {error.strerror}"
        words = meaning_text(log) or stderr.decode(errors="replace").strip()
        return error_of(self._container, command, words or f"it ended with {code}", self.process)


def _read(path: str) -> str:
    """A small file on the agent's own tmpfs."""
    try:
        with reserve.LENT, open(path, "rb", buffering=0) as file:
            return (file.read(MAX_LOG) or b"").decode(errors="replace").strip()
    except FileNotFoundError:
        return ""


def meaning_text(log: str) -> str:
    """crun's log without the time stamps that begin its lines."""
    return "\n".join(line.partition("Z: ")[2] or line for line in log.splitlines())


def error_of(container: str, command: str, words: str, process: dict[str, Any]) -> ByreError:
    """The typed error for what crun said, which names what it is about (B14)."""
    names = {"program": process.get("args", [""])[0], "cwd": process.get("cwd", "")}
    for text, cls, about in MEANINGS:
        if text in words:
            subject = f"{about} {names[about]!r}: " if about else ""
            data = {about: names[about]} if about else {}
            return cls(f"container {container}: {subject}{words}", container=container, **data)
    return RuntimeFailed(f"container {container}: crun {command}: {words}", container=container)
