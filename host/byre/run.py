"""`run`, in the shape of `subprocess.run`: start a command, feed it, collect what it writes, return at its end.

Rule: it returns when the command has ended and all that it wrote before is here.  A background child that still
holds stdout is waited for DRAIN_GRACE of silence, DRAIN_LIMIT at most, and then no longer listened to.
A deadline or a cancellation kills all that the command started, not only its first process (B15b).

Departs from subprocess: stdin is /dev/null where none is given; `returncode` is 128+n for a death by signal n, as
everywhere in byre, and `signal` has the n; captured output is held in memory, without a bound, as there.
"""

from __future__ import annotations

import asyncio
import io
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any, TypeAlias

from .calls import CALL_TIMEOUT, CANCEL_GRACE
from .errors import ByreError, CommandFailed, DeadlineExceeded, InvalidRequest
from .machines.spawn import in_thread
from .parameters import ProcessParameters

if TYPE_CHECKING:
    from .cow import ExitStatus
    from .process import GuestProcess, GuestProcessHost
    from .streams import BridgeReader

PIPE = subprocess.PIPE
STDOUT = subprocess.STDOUT
DEVNULL = subprocess.DEVNULL

#: After the exit, silence for this long means that only a background child holds the stream, in seconds: what was
#: written before the exit is on its way and comes within a round trip or a few.
DRAIN_GRACE = 1.0

#: A background child that goes on writing is listened to for no longer than this after the exit, in seconds.
DRAIN_LIMIT = 10.0

#: Bytes read and written at once.
CHUNK = 256 * 1024

#: Where output goes: None (ours), PIPE, DEVNULL, STDOUT (stderr only), a descriptor, a file.
Target: TypeAlias = int | IO[Any] | None


class CompletedProcess(subprocess.CompletedProcess[Any]):
    """What `run` returns: subprocess's own class, and `signal` and `oom` of the `ExitStatus`."""

    def __init__(self, args: Any, status: ExitStatus, stdout: Any, stderr: Any) -> None:
        super().__init__(args, status.code, stdout, stderr)
        self.signal = status.signal
        self.oom = status.oom

    def check_returncode(self) -> None:
        """Raise `CommandFailed` when it did not end with 0."""
        if self.returncode:
            how = f"was killed by signal {self.signal}" if self.signal else f"ended with status {self.returncode}"
            raise CommandFailed(
                f"the command {self.args!r} {how}" + (", out of memory" if self.oom else ""),
                returncode=self.returncode,
                stdout=self.stdout,
                stderr=self.stderr,
            )


async def run(
    host: GuestProcessHost,
    args: Sequence[str] | str,
    *,
    input: bytes | str | None = None,
    stdin: int | IO[Any] | None = None,
    stdout: Target = None,
    stderr: Target = None,
    capture_output: bool = False,
    shell: bool = False,
    cwd: str = "",
    env: Mapping[str, str] | None = None,
    user: str = "",
    timeout: float | None = None,
    check: bool = False,
    text: bool = False,
    encoding: str | None = None,
    errors: str | None = None,
    **options: Any,
) -> CompletedProcess:
    """Run a command to its end; the arguments mean what they mean to `subprocess.run`.

    `options` are further fields of `ProcessParameters`.  With ``stderr=STDOUT`` the two are merged as they arrive,
    each in its own order (a shell's ``2>&1`` keeps the order between them).

    Raises what `create_process` raises when the command never ran; `CommandFailed` with `check`;
    `DeadlineExceeded` past `timeout` seconds, whose ``data`` has "ran" (whether it had; None: not known), and the
    output so far as "stdout" and "stderr".
    """
    if capture_output:
        if stdout is not None or stderr is not None:
            raise InvalidRequest("capture_output goes with neither stdout nor stderr")
        stdout = stderr = PIPE
    if input is not None and stdin is not None:
        raise InvalidRequest("of input and stdin only one can be given")
    if isinstance(args, str) and not shell:
        raise InvalidRequest("args is a sequence of strings", hint="shell=True runs a string by /bin/sh")
    command = {"command_line": args} if isinstance(args, str) else {"args": list(args)}
    codec = _Codec(encoding or "utf-8", errors or "strict") if text or encoding or errors else None
    source = _source(input, stdin, codec)
    job = _Job(_sink(stdout, lambda: sys.stdout), None)
    job.stderr = job.stdout if stderr == STDOUT else _sink(stderr, lambda: sys.stderr)
    parameters = ProcessParameters(
        **command,
        cwd=cwd,
        env=env,
        user=user,
        stdin=source is not None,
        stdout=job.stdout is not None,
        stderr=job.stderr is not None and not options.get("terminal"),
        **options,
    )
    loop = asyncio.get_running_loop()
    limit = asyncio.timeout_at(None if timeout is None else loop.time() + timeout)
    process = await host.start_process(parameters, CALL_TIMEOUT if timeout is None else timeout)
    try:
        async with limit:
            status = await job.communicate(process, source)
    except BaseException as error:
        await host.bridge.finish(job.give_up(process))
        if isinstance(error, TimeoutError) and limit.expired():
            out, err = job.results(codec)
            raise DeadlineExceeded(
                f"the command {args!r} did not end within {timeout:g} s, and was killed",
                ran=True,
                stdout=out,
                stderr=err,
            ) from None
        if isinstance(error, asyncio.CancelledError):
            error.add_note(f"the command {args!r} had run, and was killed")
        raise
    await process.close()
    out, err = job.results(codec)
    result = CompletedProcess(args, status, out, err)
    if check:
        result.check_returncode()
    return result


class _Codec:
    """Text as subprocess has it: decoded, with every line end made a newline."""

    def __init__(self, encoding: str, errors: str) -> None:
        self._encoding, self._errors = encoding, errors

    def encode(self, text: str) -> bytes:
        return text.encode(self._encoding, self._errors)

    def decode(self, data: bytes) -> str:
        return data.decode(self._encoding, self._errors).replace("\r\n", "\n").replace("\r", "\n")


class _Sink:
    """Where one output goes.  `collected` is None where it is not captured."""

    def __init__(self, write: Callable[[bytes], object] | None) -> None:
        self.collected: list[bytes] | None = [] if write is None else None
        self._write = write

    async def take(self, data: bytes) -> None:
        if self.collected is not None:
            self.collected.append(data)
        elif self._write is not None:
            write = self._write
            await in_thread(lambda: write(data))  # it may block, and must not block the loop


def _sink(target: Target, ours: Callable[[], Any]) -> _Sink | None:
    if target == DEVNULL:
        return None
    if target == PIPE:
        return _Sink(None)
    if isinstance(target, int):
        if target < 0:
            raise InvalidRequest("only stderr can be STDOUT")
        return _Sink(_fd_writer(target))
    file = ours() if target is None else target
    if file is None:  # a program without stdout, under pythonw
        return None
    file = getattr(file, "buffer", file)
    file.flush()
    try:
        return _Sink(_fd_writer(file.fileno()))
    except (OSError, io.UnsupportedOperation):
        return _Sink(file.write)


def _fd_writer(fd: int) -> Callable[[bytes], None]:
    def write(data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]

    return write


def _source(data: bytes | str | None, stdin: int | IO[Any] | None, codec: _Codec | None) -> bytes | int | None:
    """The input as bytes, or the descriptor from which it is read; None for no input."""
    if isinstance(data, str):
        if codec is None:
            raise InvalidRequest("input is a str", hint="give bytes, or text=True")
        return codec.encode(data)
    if data is not None:
        return bytes(data)
    if stdin is None or stdin == DEVNULL:
        return None
    if stdin == PIPE:
        raise InvalidRequest("run() cannot give you a pipe", hint="use input=, or create_process")
    return stdin if isinstance(stdin, int) else stdin.fileno()


class _Pump:
    """One output stream on its way to its sink."""

    def __init__(self, reader: BridgeReader, sink: _Sink) -> None:
        self.reader = reader
        self.busy = False
        self.task = asyncio.create_task(self._pump(sink))

    async def _pump(self, sink: _Sink) -> None:
        while data := await self.reader.read(CHUNK):
            self.busy = True
            try:
                await sink.take(data)
            except BrokenPipeError:
                self.reader.stop()  # our reader is gone, so the command gets SIGPIPE, as in a pipeline (B4)
                return
            finally:
                self.busy = False


class _Job:
    """The streams of one `run`."""

    def __init__(self, stdout: _Sink | None, stderr: _Sink | None) -> None:
        self.stdout = stdout
        self.stderr = stderr
        self._pumps: list[_Pump] = []
        self._feeder: asyncio.Task[None] | None = None

    def results(self, codec: _Codec | None) -> tuple[Any, Any]:
        """What was captured, None where nothing was to be."""
        sinks = (self.stdout, None if self.stderr is self.stdout else self.stderr)
        raw = [b"".join(s.collected) if s is not None and s.collected is not None else None for s in sinks]
        out, err = [data if data is None or codec is None else codec.decode(data) for data in raw]
        return out, err

    async def communicate(self, process: GuestProcess, source: bytes | int | None) -> ExitStatus:
        """Move the bytes until the end; raises what a sink or the connection raised."""
        readers: Any = process.stdio[1:]
        self._pumps = [
            _Pump(reader, sink)
            for reader, sink in zip(readers, (self.stdout, self.stderr), strict=True)
            if reader is not None and sink is not None
        ]
        if source is not None:
            self._feeder = asyncio.create_task(_feed(process, source))
        waiting = asyncio.create_task(process.wait())
        try:
            watched: set[asyncio.Task[Any]] = {waiting, *self._tasks()}
            while not waiting.done():
                done, watched = await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        finally:
            waiting.cancel()
        await self._drain(process)
        await self._stop()
        return waiting.result()

    def _tasks(self) -> list[asyncio.Task[None]]:
        return [pump.task for pump in self._pumps] + ([self._feeder] if self._feeder else [])

    async def _drain(self, process: GuestProcess) -> None:
        """See the module's rule."""
        loop = asyncio.get_running_loop()
        limit = loop.time() + DRAIN_LIMIT
        pumps = [pump for pump in self._pumps if not pump.task.done()]
        while pumps:
            seen = sum(pump.reader.received for pump in pumps)
            await asyncio.wait([pump.task for pump in pumps], timeout=DRAIN_GRACE)
            for pump in pumps:
                if pump.task.done():
                    pump.task.result()
            pumps = [pump for pump in pumps if not pump.task.done()]
            if any(pump.busy or process.missing(pump.reader) for pump in pumps):
                continue
            if sum(pump.reader.received for pump in pumps) == seen or loop.time() > limit:
                return

    async def _stop(self) -> None:
        tasks = self._tasks()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for task in tasks:
            if not task.cancelled():
                task.exception()  # whatever it is, it is told already or no longer matters

    async def give_up(self, process: GuestProcess) -> None:
        """Kill all of it, take what is there of its output, and forget it."""
        try:
            await process.kill_tree()
            async with asyncio.timeout(CANCEL_GRACE):
                await process.wait()
                await self._drain(process)
        except (ByreError, TimeoutError, OSError):
            pass  # the first error is the one to tell
        await self._stop()
        await process.close()


async def _feed(process: GuestProcess, source: bytes | int) -> None:
    writer = process.stdio.stdin
    assert writer is not None
    try:
        if isinstance(source, bytes):
            writer.write(source)
            await writer.drain()
        else:
            while data := await in_thread(lambda: os.read(source, CHUNK)):
                writer.write(data)
                await writer.drain()
    except BrokenPipeError:
        return  # it does not read all of its input: as subprocess, that is no error
    await process.close_stdin()
