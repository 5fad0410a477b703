"""Bytes between our own stdin, stdout, stderr and a process's streams, unchanged and at full speed.

Our descriptors may be files, pipes or terminals that we share with others: they are never made non-blocking.  A
daemon thread for each does the blocking calls, one at a time, so that a reader who does not read stops only its own
stream, and never the event loop.
"""

from __future__ import annotations

import asyncio
import errno
import os
import queue
import threading
from typing import TYPE_CHECKING

from byre.errors import ByreError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import Any

    from byre.streams import BridgeReader

#: Bytes per call: a few frames of the wire, and what a pipe of the largest default size takes at once.
CHUNK = 256 * 1024


class OutputFailed(ByreError, OSError):
    """Our own stdout or stderr does not take what the process wrote (a full disk, say)."""

    code = "output-failed"


class Worker:
    """A thread that makes one blocking call after the other.  A call that never returns holds up nothing else,
    not even the end of the program."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[..., Any], tuple[Any, ...], asyncio.Future[Any]]]
        self._jobs = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._serve, name=f"byre-{name}", daemon=True)
        self._thread.start()

    async def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the function returns or raises; cancelled, it goes on in the thread and nobody hears of it."""
        done: asyncio.Future[Any] = self._loop.create_future()
        self._jobs.put((function, arguments, done))
        return await done

    def _serve(self) -> None:
        while True:
            function, arguments, done = self._jobs.get()
            result, error = None, None
            try:
                result = function(*arguments)
            except Exception as caught:
                error = caught
            try:
                self._loop.call_soon_threadsafe(_settle, done, result, error)
            except RuntimeError:  # the loop is closed: the program ends
                return


def _settle(done: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if done.done():
        return
    if error is None:
        done.set_result(result)
    else:
        done.set_exception(error)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


class Output:
    """One output stream of a process on its way to a descriptor of ours."""

    def __init__(self, reader: BridgeReader, fd: int, close: Callable[[], Awaitable[None]]) -> None:
        self.reader = reader
        self._fd = fd
        self._close = close  # tells the process that nobody reads any more (B4)
        self.moved = 0  # bytes written: whoever waits for the end sees progress by it
        self.writing = False
        self.error: OutputFailed | None = None

    async def pump(self) -> None:
        """Until the stream ends, or our side takes no more: then the process gets SIGPIPE, as in a pipeline."""
        worker = Worker(f"output-{self._fd}")
        while data := await self.reader.read(CHUNK):
            self.writing = True
            try:
                await worker.call(_write_all, self._fd, data)
            except OSError as error:
                if error.errno != errno.EPIPE:
                    self.error = OutputFailed(f"cannot write to descriptor {self._fd}: {error.strerror}")
                await self._close()
                return
            finally:
                self.writing = False
            self.moved += len(data)


async def pump_input(fd: int, writer: asyncio.StreamWriter, end: Callable[[], Awaitable[None]]) -> None:
    """Our stdin into a process's, as fast as it reads; then its end.  A process that reads no more ends it too."""
    worker = Worker("input")
    try:
        while data := await worker.call(os.read, fd, CHUNK):
            writer.write(data)
            await writer.drain()
    except OSError as error:
        # Broken pipe or a lost connection: the process's end tells more.  EIO: our terminal hung up.
        if not isinstance(error, ConnectionError) and error.errno != errno.EIO:
            raise
    await end()
