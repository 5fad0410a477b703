"""Work that may block, done in a child process with a deadline: functions, and programs such as crun.

    run(...)       forks; the function runs in the child and its result comes back over a pipe
    command(...)   spawns a program, gives it its input, captures what it says

Rule: the loop never waits for a child; `done` is called once, from the loop, whatever happens.  A child that
outlives its deadline is killed.  A child of `run` has no descriptors but 0 to 2, its result's and those of
`keep`: it would hold other processes' pipes open for as long as it blocks.
"""

from __future__ import annotations

import os

from byre_proto.encoding import pack, unpack
from byre_proto.errors import BY_CODE, ByreError, DeadlineExceeded, StartFailed, to_wire

from . import linux, scheduling
from .loop import EPOLLIN, EPOLLOUT
from .reaper import BLOCKED, IGNORED
from .signals import signals

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any

    from .loop import Loop
    from .reaper import Reaper

    Done = Callable[[Any, "ByreError | None"], object]
    CommandDone = Callable[["int | None", bytes, bytes], object]

#: The largest result of a function, and the most that is kept of a program's stdout or stderr.
MAX_RESULT = 1024 * 1024
MAX_OUTPUT = 256 * 1024

#: One read or write on the pipes below.
CHUNK = 64 * 1024

#: Until what must be done, and could not begin for want of descriptors or memory, is tried again, in seconds.
AGAIN_SECONDS = 0.5

#: The pid of a child that could not be made: it is nobody's, so that to cancel it is harmless.
NOBODY = 0


class Child:
    """A child at work, with its deadline.  `cancel()` kills it; its `done` follows, as after any end."""

    def __init__(self, loop: Loop, reaper: Reaper, pid: int, timeout: float) -> None:
        self.pid = pid
        self.overdue = False
        self._loop = loop
        self._reaper = reaper
        self._on_end: Callable[[int], object] | None = None
        self._timer = loop.call_later(timeout, self._expire)

    def watch(self, on_end: Callable[[int], object]) -> None:
        """Wait for its end."""
        self._on_end = on_end
        self._reaper.watch(self.pid, self._ended)

    def cancel(self) -> None:
        """Kill it.  Harmless when it has ended."""
        self._reaper.signal(self.pid, signals.SIGKILL)

    def _expire(self) -> None:
        self.overdue = True
        self.cancel()

    def _ended(self, status: int) -> None:
        self._timer.cancel()
        if self._on_end is not None:
            self._on_end(status)


class Collector:
    """Reads a pipe to its end into memory, up to `limit` bytes; what is over it is read and thrown away.

    `on_end()` is called at its end, which `finish` may declare.
    """

    def __init__(self, loop: Loop, fd: int, limit: int, on_end: Callable[[], object] = lambda: None) -> None:
        self.data = bytearray()
        self._loop = loop
        self._fd = fd
        self._limit = limit
        self._on_end = on_end
        os.set_blocking(fd, False)
        loop.add(fd, EPOLLIN, lambda _mask: self._read())

    def _read(self) -> bool:
        try:
            chunk = os.read(self._fd, CHUNK)
        except BlockingIOError:
            return False
        self.data += chunk[: max(0, self._limit - len(self.data))]
        if not chunk:
            self._close()
        return bool(chunk)

    def finish(self) -> bytes:
        """What the pipe holds now is the rest: somebody who lives on may hold its other end for ever."""
        while self._fd >= 0 and self._read():
            pass
        self._close()
        return bytes(self.data)

    def _close(self) -> None:
        if self._fd >= 0:
            self._loop.remove(self._fd)
            os.close(self._fd)
            self._fd = -1
            self._on_end()


class Feeder:
    """Writes bytes into a pipe as it takes them, then closes it."""

    def __init__(self, loop: Loop, fd: int, data: bytes) -> None:
        self._loop = loop
        self._fd = fd
        self._rest = memoryview(data)
        os.set_blocking(fd, False)
        loop.add(fd, EPOLLOUT, lambda _mask: self._write())

    def _write(self) -> None:
        try:
            self._rest = self._rest[os.write(self._fd, self._rest[:CHUNK]) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self._rest = self._rest[:0]
        if not self._rest:
            self.close()

    def close(self) -> None:
        """Give up.  Harmless when repeated."""
        if self._fd >= 0:
            self._loop.remove(self._fd)
            os.close(self._fd)
            self._fd = -1


def run(
    loop: Loop,
    reaper: Reaper,
    function: Callable[[], object],
    timeout: float,
    done: Done,
    *,
    keep: Iterable[int] = (),
) -> Child:
    """Call `function` in a forked child; `done(result, None)` or `done(None, error)` follows.

    The result is what the wire can carry.  A `ByreError` raised in the child arrives as the same class; where
    there can be no child, the error is `StartFailed`.
    """
    try:
        pid, reading = _fork(function, keep)
    except OSError as problem:
        error = StartFailed(f"no new process of the agent: {problem.strerror}", errno=problem.errno)
        loop.call_soon(lambda: done(None, error))
        return Child(loop, reaper, NOBODY, timeout)
    child = Child(loop, reaper, pid, timeout)
    result = Collector(loop, reading, MAX_RESULT)
    child.watch(lambda status: done(*_outcome(child, status, result.finish(), timeout)))
    return child


def _fork(function: Callable[[], object], keep: Iterable[int]) -> tuple[int, int]:
    """`(pid, where its result can be read)`."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        pid = os.fork()
        if pid == 0:
            _in_child(function, writing, keep)
    except OSError:
        os.close(reading)
        raise
    finally:
        os.close(writing)
    return pid, reading


def _in_child(function: Callable[[], object], writing: int, keep: Iterable[int]) -> None:
    """Never returns."""
    try:
        linux.prctl(linux.PR_SET_PDEATHSIG, signals.SIGKILL)
        _close_all_but({writing, *keep})
        signals.pthread_sigmask(signals.SIG_UNBLOCK, BLOCKED)
        with open(writing, "wb", closefd=False) as out:
            out.write(_answer(function))
        os._exit(0)
    finally:
        os._exit(1)


def _answer(function: Callable[[], object]) -> bytes:
    try:
        packed = pack([True, function()])
        if len(packed) > MAX_RESULT:
            raise ByreError(f"the result has {len(packed)} bytes; {MAX_RESULT} is the most")
        return packed
    except ByreError as error:
        failure = to_wire(error)
    except Exception as error:
        failure = ("internal", f"{type(error).__name__}: {error}", "", {})
    try:
        return pack([False, *failure])
    except ByreError:  # evidence that cannot be carried must not cost the answer
        return pack([False, *failure[:3], {}])


def _close_all_but(kept: set[int]) -> None:
    first = 3
    for fd in sorted(kept):
        if fd > first:
            linux.close_range(first, fd - 1)
        first = max(first, fd + 1)
    linux.close_range(first, -1)


def _outcome(child: Child, status: int, data: bytes, timeout: float) -> tuple[Any, ByreError | None]:
    if status == 0 and data:
        answer = unpack(data)
        if answer[0]:
            return answer[1], None
        _, code, message, hint, details = answer
        error = BY_CODE.get(code, ByreError)(message, hint=hint)
        error.data = details
        return None, error
    if child.overdue:
        return None, DeadlineExceeded(f"not done within {timeout:g} s in the guest", timeout=timeout)
    return None, ByreError(f"a helper of the agent ended with wait status {status}", status=status)


def command(
    loop: Loop,
    reaper: Reaper,
    argv: list[str],
    timeout: float,
    done: CommandDone,
    *,
    stdin: bytes | int = b"",
    stdout: int | None = None,
    stderr: int | None = None,
    env: Mapping[str, str] | None = None,
    pass_fds: Iterable[int] = (),
) -> Child:
    """Run the program `argv[0]` (a path); `done(returncode, stdout, stderr)` follows its exit.

    `returncode` is -n after signal n and None when the deadline killed it.  A stream given as a descriptor is the
    child's own and not captured (b"" then).  The program must be on the VM's own root: the loop stands still
    until it has been loaded.  Raises `StartFailed`.
    """
    try:
        pipes = _Pipes(stdin, stdout, stderr)
    except OSError as error:
        raise StartFailed(f"{argv[0]}: {error.strerror}", errno=error.errno) from error
    try:
        pid = os.posix_spawn(
            argv[0],
            argv,
            os.environ if env is None else env,
            file_actions=[
                *((os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(pipes.theirs)),
                *((os.POSIX_SPAWN_DUP2, fd, fd) for fd in pass_fds),  # clears close-on-exec
            ],
            setsid=True,
            setsigmask=(),
            setsigdef=IGNORED,
            **scheduling.of_spawned,
        )
    except OSError as error:
        pipes.close_ours()
        raise StartFailed(f"{argv[0]}: {error.strerror}", errno=error.errno) from error
    finally:
        pipes.close_theirs()
    child = Child(loop, reaper, pid, timeout)
    feeder = Feeder(loop, pipes.ours[0], stdin) if isinstance(stdin, bytes) and stdin else None
    out, err = (Collector(loop, fd, MAX_OUTPUT) if fd >= 0 else None for fd in pipes.ours[1:])

    def ended(status: int) -> None:
        if feeder is not None:
            feeder.close()
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)
        done(None if child.overdue else code, out.finish() if out else b"", err.finish() if err else b"")

    child.watch(ended)
    return child


class _Pipes:
    """The three standard streams of a program: our ends (-1: not ours) and its ends."""

    def __init__(self, stdin: bytes | int, stdout: int | None, stderr: int | None) -> None:
        self.ours = [-1, -1, -1]
        self.theirs: list[int] = []
        self._to_close: list[int] = []
        try:
            self._make(stdin, stdout, stderr)
        except OSError:
            self.close_ours()
            self.close_theirs()
            raise

    def _make(self, stdin: bytes | int, stdout: int | None, stderr: int | None) -> None:
        if isinstance(stdin, int):
            self.theirs.append(stdin)
        elif not stdin:
            self._add(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), -1)
        else:
            reading, writing = os.pipe2(os.O_CLOEXEC)
            self._add(reading, writing)
        for given in (stdout, stderr):
            if given is not None:
                self.theirs.append(given)
            else:
                reading, writing = os.pipe2(os.O_CLOEXEC)
                self._add(writing, reading)

    def _add(self, theirs: int, ours: int) -> None:
        self.ours[len(self.theirs)] = ours
        self.theirs.append(theirs)
        self._to_close.append(theirs)

    def close_theirs(self) -> None:
        for fd in self._to_close:
            os.close(fd)

    def close_ours(self) -> None:
        for fd in self.ours:
            if fd >= 0:
                os.close(fd)
