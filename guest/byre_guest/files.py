"""`files.start`: an operation on files, as a process whose child runs a function of the agent.

    read      one regular file -> its entry and data          stat    one entry
    write     data -> one file, replaced at once              list    the entries of a directory, or all below it
    mkdir, remove, rename                                     pack, unpack    trees (`packing`)

What it needs comes by its stdin and what it gives goes by its stdout, as `byre_proto.records`; so streams, back
pressure, exits and release are those of any process (`processes`).  It is cancelled by SIGTERM, which it takes for
an exception, and tidies up.

Rule: nothing here runs in the agent's loop but the fork (B47).  The child has its three streams, and runs in the
VM's namespaces: it sees a container by its root only (`places`).
"""

from __future__ import annotations

import errno
import os

from byre_proto.errors import (
    ByreError,
    Cancelled,
    ContainerNotReady,
    FileFailed,
    InvalidRequest,
    NoSpace,
    NotSupported,
    PathExists,
    PathIsDirectory,
    PathNotDirectory,
    PathNotFound,
    PathRefused,
    PermissionRefused,
    ReadOnlyFiles,
    to_wire,
)

from . import linux, rootfs, trees
from .exchange import Sink, Source
from .operations import OPERATIONS
from .places import Place
from .processes import Stdio
from .reaper import BLOCKED
from .signals import signals

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .loop import Loop
    from .processes import Process, Processes
    from .server import Call

#: Where the child has the pidfd of a container's first process.
PIDFD = 3

#: For killed operations to be gone before their container is removed, in seconds: a file system that does not
#: answer may hold them for ever.
END_TIMEOUT = 30.0

#: errno -> error, and what to do next.
_ERRORS: dict[int, tuple[type[ByreError], str]] = {
    errno.ENOENT: (PathNotFound, "is a directory above it missing? mkdir makes it"),
    errno.EEXIST: (PathExists, "remove it first, or let it be replaced"),
    errno.EISDIR: (PathIsDirectory, "name a file in it"),
    errno.ENOTDIR: (PathNotDirectory, "something on the way to it is a file"),
    errno.ENOTEMPTY: (FileFailed, "remove it with all that is in it: recursive=True"),
    errno.EACCES: (PermissionRefused, "the agent's user may not"),
    errno.EPERM: (PermissionRefused, "the agent's user may not"),
    errno.ENOSPC: (NoSpace, "remove something there, or give it more space"),
    errno.EDQUOT: (NoSpace, "remove something there, or give it more space"),
    errno.EROFS: (ReadOnlyFiles, "write to a volume, a tmpfs, or /run"),
    errno.ELOOP: (PathRefused, "there are too many links in it, or one of /proc's that lead anywhere"),
    errno.EXDEV: (FileFailed, "copy it, and remove the old one"),
    errno.EBUSY: (FileFailed, "something is mounted there: a process inside can write to it"),
    errno.EAGAIN: (FileFailed, "something on the way to it is renamed all the time: stop that, and try again"),
}


# -- the agent's side --------------------------------------------------------------------------------------


def start(call: Call, arguments: dict[str, Any]) -> None:
    """`files.start` in the VM itself."""
    begin(call, arguments, lambda: rootfs.open_root("/"))


def begin(
    call: Call,
    arguments: dict[str, Any],
    open_root: Callable[[], int],
    *,
    pidfd: int = -1,
    on_exit: Callable[[Process], object] | None = None,
) -> Process:
    """Fork the child below the root that `open_root` opens there, `pidfd` at hand; answers the call."""
    operation, path = arguments["operation"], arguments["path"]
    if operation not in OPERATIONS:
        raise NotSupported(f"the agent has no operation {operation[:80]!r} on files", operation=operation[:80])
    if not path or "\0" in path:
        raise InvalidRequest("a path is needed, without NUL characters", field="path")
    processes = call.server.processes
    number = processes.reserve()
    stdio = Stdio(call.server.session, {**arguments, "stderr": 0, "terminal": False})

    def fork() -> tuple[int, int]:
        pid = os.fork()
        if pid == 0:
            _child(stdio.theirs, pidfd, open_root, arguments)
        return pid, -1

    tree, _ = processes.launch(stdio, fork)
    process = processes.adopt(
        tree.pid,
        stdio,
        container=arguments["container"],
        args=[f"files.{operation}", path],
        tree=tree,
        number=number,
        on_exit=on_exit,
    )
    call.reply({"process": number, "pid": tree.pid})
    return process


class ContainerFiles:
    """The operations on one container's files; `bundle` is its root as its mounts make it."""

    def __init__(self, loop: Loop, processes: Processes, bundle: str) -> None:
        self._loop = loop
        self._processes = processes
        self._bundle = bundle
        self._running: set[Process] = set()
        self._then: Callable[[], object] | None = None

    def start(self, call: Call, arguments: dict[str, Any], init: Process | None) -> None:
        """`files.start`; `init` is the container's first process."""
        pid, pidfd = 0, -1
        if init is not None and init.exit is None:
            try:
                pid, pidfd = init.pid, os.pidfd_open(init.pid)
            except ProcessLookupError:
                pid = 0  # it has just ended
        try:
            process = begin(
                call,
                arguments,
                lambda: _container_root(pid, self._bundle),
                pidfd=pidfd,
                on_exit=self._over,
            )
            self._running.add(process)
        finally:
            if pidfd >= 0:
                os.close(pidfd)

    def end(self, then: Callable[[], object]) -> None:
        """Kill them, then go on: with the root open they would keep the layers."""
        self._then = then
        for process in self._running:
            self._processes.trees.signal(process.tree, trees.SIGKILL)
        self._loop.call_later(END_TIMEOUT, self._go_on)
        if not self._running:
            self._go_on()

    def _over(self, process: Process) -> None:
        self._running.discard(process)
        if not self._running:
            self._go_on()

    def _go_on(self) -> None:
        then, self._then = self._then, None
        if then is not None:
            then()


def _container_root(pid: int, bundle: str) -> int:
    """The root of a container as its processes see it; without one, as its mounts make it.  In the child."""
    if pid:
        try:
            return rootfs.open_root_of(pid, PIDFD)
        except OSError:
            pass
    try:
        return rootfs.open_root(bundle)
    except OSError as error:
        raise ContainerNotReady("the container is gone", errno=error.errno) from error


# -- the child ---------------------------------------------------------------------------------------------


def _child(stdio: list[int], pidfd: int, open_root: Callable[[], int], arguments: dict[str, Any]) -> None:
    """Never returns."""
    try:
        os.setsid()
        linux.prctl(linux.PR_SET_PDEATHSIG, signals.SIGKILL)
        for target, fd in enumerate(stdio):
            os.dup2(fd, target)
        if pidfd >= 0:
            os.dup2(pidfd, PIDFD)
        linux.close_range(PIDFD + (pidfd >= 0), -1)
        signals.signal(signals.SIGTERM, _cancel)
        signals.pthread_sigmask(signals.SIG_UNBLOCK, BLOCKED)
        os.umask(0)  # every mode below is meant as it is given
        sink = Sink(1)
        try:
            operation = OPERATIONS[arguments["operation"]]
            place = Place(open_root())
            result = operation(place, arguments["path"], arguments["options"], Source(0), sink)
            sink.finish("result", result)
            os._exit(0)
        except BrokenPipeError:
            pass  # nobody listens any more
        except Exception as error:
            sink.finish("error", *to_wire(typed(error, arguments["path"])))
    finally:
        os._exit(1)


def _cancel(number: int, _frame: object) -> None:
    signals.signal(number, signals.SIG_IGN)
    raise Cancelled("the operation was cancelled")


def typed(error: Exception, path: str) -> ByreError:
    """The error that the host gets for what an operation on `path` raised."""
    if isinstance(error, ByreError):
        return error
    if not isinstance(error, OSError) or error.errno is None:
        return ByreError(f"an error of the agent itself: {error!r}")
    cls, hint = _ERRORS.get(error.errno, (FileFailed, ""))
    name = error.filename if isinstance(error.filename, str) and "/proc/self/fd/" not in error.filename else ""
    about = path if not name or path.endswith(name) else f"{path}: {name}"
    return cls(f"{about}: {os.strerror(error.errno)}", hint=hint, path=path, errno=error.errno)
