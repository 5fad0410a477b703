"""byre without `async`: the same objects, driven from ordinary code.

    from byre.sync import UtilityVM

    with UtilityVM() as vm:
        print(vm.run(["uname", "-a"], capture_output=True, text=True).stdout)

Rule: there is no second implementation.  A facade passes each call to the asyncio object in one background loop and
waits for it; what comes back is a facade too, where it is one of byre's objects.  Coroutines become methods that
block, streams become binary files, the wait channel becomes a `threading.Event`.  Any thread may call, at once.
Ctrl-C cancels the call that it interrupts.  Signatures and documentation: the asyncio class of the same name.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import io
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Self, TypeVar

from . import cow, file_operation, file_streams, files, health, journal, local, pod, pool, snapshots, vm
from .networks import network
from .ports import connection, forward
from .shares import share

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

    from . import images

T = TypeVar("T")

#: Bytes that a file object of a stream buffers.
BUFFER = 64 * 1024


class _Job(Generic[T]):
    """A coroutine on its way through the loop, and its outcome for the thread that waits."""

    def __init__(self, work: Coroutine[Any, Any, T]) -> None:
        self.outcome: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._work = work
        self._task: asyncio.Task[T] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._work)
        self._task.add_done_callback(self._done)

    def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _done(self, task: asyncio.Task[T]) -> None:
        error = concurrent.futures.CancelledError() if task.cancelled() else task.exception()
        if error is not None:
            self.outcome.set_exception(error)
        else:
            self.outcome.set_result(task.result())


class _Loop:
    """The background loop; its thread starts with the first call, and ends with the program."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a finalizer may run within it
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine, awaited in the loop; interrupted, it is cancelled, and its end awaited."""
        loop = self._started()
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError("byre.sync was called from its own loop: use the asyncio classes there")
        job = _Job(work)
        loop.call_soon_threadsafe(job.start)
        try:
            return job.outcome.result()
        finally:
            if not job.outcome.done():  # this thread was interrupted
                loop.call_soon_threadsafe(job.cancel)
                concurrent.futures.wait([job.outcome])

    def soon(self, call: Callable[..., object], *arguments: object) -> None:
        """Have the loop call this, and wait for nothing."""
        self._started().call_soon_threadsafe(call, *arguments)

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name="byre-sync", daemon=True)
                self._thread.start()
            return self._loop


_loop = _Loop()


async def _in_loop(function: Callable[..., Any], arguments: Any, options: Any) -> Any:
    """Call in the loop's thread, and await what comes back where that has to be."""
    result = function(*arguments, **options)
    return await result if inspect.isawaitable(result) else result


def _call(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    plain = [_plain(value) for value in arguments]
    return _facade(_loop.run(_in_loop(function, plain, {name: _plain(v) for name, v in options.items()})))


class Facade:
    """One asyncio object, seen from ordinary code.  Attributes and methods are the object's."""

    _target: Any

    @classmethod
    def _of(cls, target: Any) -> Self:
        """The facade of an object: always the same one, as `create_process(None)` gives the same process (B20)."""
        found = vars(target).get("_sync_facade")
        if found is None:
            found = cls.__new__(cls)
            found._target = target
            target._sync_facade = found
        return found  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _loop.run(_in_loop(getattr, (self._target, name), {}))
        if not callable(value):
            return _facade(value)

        def method(*arguments: Any, **options: Any) -> Any:
            return _call(value, *arguments, **options)

        method.__name__, method.__doc__ = name, value.__doc__
        return method

    def __dir__(self) -> list[str]:
        return [name for name in dir(self._target) if not name.startswith("_")]

    def __repr__(self) -> str:
        return f"<byre.sync {self._target!r}>"

    def __enter__(self) -> Self:
        _call(self._target.__aenter__)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _call(self._target.__aexit__, kind, error, trace)


class Process(Facade):
    """A `byre.Process`; `stdio` has binary files."""

    _files: Stdio

    @property
    def stdio(self) -> Stdio:
        """Its streams as files, always the same ones, since each has a buffer; None where not asked for (B6)."""
        if "_files" not in vars(self):
            stdin, stdout, stderr = self._target.stdio
            self._files = Stdio(
                None if stdin is None else _BufferedWriter(stdin),
                None if stdout is None else io.BufferedReader(_Reader(stdout), BUFFER),
                None if stderr is None else io.BufferedReader(_Reader(stderr), BUFFER),
            )
        return self._files


class Container(Facade):
    """A `byre.Container`; `wait_channel` is a `threading.Event`."""


class Pod(Facade):
    """A `byre.Pod`."""


class Files(Facade):
    """A `byre.files.Files`; what is opened is a context manager, `walk` an ordinary iterator."""


class FileReader(Facade):
    """A `byre.file_streams.FileReader`; iterating gives its pieces."""

    def __iter__(self) -> Iterator[bytes]:
        while piece := self.read(file_operation.CHUNK):
            yield piece


class FileWriter(Facade):
    """A `byre.file_streams.FileWriter`."""


class Forward(Facade):
    """A `byre.Forward`."""


class Exposure(Facade):
    """A `byre.Exposure`."""


class Connection(Facade):
    """A `byre.Connection`; its reader and writer are binary files, and closing the writer closes both."""

    _pair: tuple[io.BufferedReader, io.BufferedWriter]

    def __iter__(self) -> Iterator[Any]:
        if "_pair" not in vars(self):
            reader, writer = self._target
            self._pair = io.BufferedReader(_Reader(reader), BUFFER), _BufferedWriter(writer)
        return iter(self._pair)

    @property
    def reader(self) -> io.BufferedReader:
        """What comes from there."""
        return next(iter(self))

    @property
    def writer(self) -> io.BufferedWriter:
        """What goes there; flush it."""
        return tuple(self)[1]  # type: ignore[no-any-return]

    def write_eof(self) -> None:
        """No more is written; reading goes on."""
        self.writer.flush()
        _call(self._target.write_eof)

    def close(self) -> None:
        """End both directions; what was written goes first."""
        self.writer.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        super().__exit__(kind, error, trace)


class Health(Facade):
    """A VM's health; iterating gives every change of its state."""

    def __iter__(self) -> Iterator[str]:
        return _iterate(aiter(self._target))


def _iterate(values: Any) -> Iterator[Any]:
    """An async iterator, from ordinary code; left early, it is closed."""

    async def following() -> Any:
        return await anext(values)

    try:
        while True:
            try:
                yield _loop.run(following())
            except StopAsyncIteration:
                return
    finally:
        if hasattr(values, "aclose") and not sys.is_finalizing():
            _loop.run(values.aclose())


class UtilityVM(Facade):
    """A `byre.UtilityVM`, with the same arguments."""

    def __init__(self, **options: Any) -> None:
        self._target = _loop.run(_in_loop(vm.UtilityVM, (), options))
        self._target._sync_facade = self

    @classmethod
    def attach(cls, name: str = "default") -> UtilityVM:
        """A VM that is up under a name.  Raises `VMNotFound`."""
        return cls._of(_loop.run(vm.UtilityVM.attach(name)))


class Snapshot(Facade):
    """A `byre.Snapshot`."""


class Share(Facade):
    """A `byre.Share`."""


class Network(Facade):
    """A `byre.Network`."""


class EventReader(Facade):
    """What `UtilityVM.events` gives; iterating gives every event."""

    def __iter__(self) -> Iterator[Any]:
        return _iterate(aiter(self._target))


class LocalHost(Facade):
    """A `byre.LocalHost`."""

    def __init__(self) -> None:
        self._target = _loop.run(_in_loop(local.LocalHost, (), {}))
        self._target._sync_facade = self


class Pool(Facade):
    """A `byre.Pool`, with the same arguments; threads may acquire at once."""

    def __init__(self, **options: Any) -> None:
        self._target = _loop.run(_in_loop(pool.Pool, (), options))
        self._target._sync_facade = self


class Lease(Facade):
    """What `Pool.acquire` gives: ``with pool.acquire() as vm``."""

    def __enter__(self) -> Any:
        return _call(self._target.__aenter__)


def pull_image(name: str, **options: Any) -> images.Image:
    """`byre.images.pull`."""
    from . import images

    return _loop.run(images.pull(name, **options))


def import_image(source: str, name: str = "", **options: Any) -> images.Image:
    """`byre.images.import_image`."""
    from . import images

    return _loop.run(images.import_image(source, name, **options))


class Event(threading.Event):
    """An `asyncio.Event` of the background loop, as the event that threads wait for."""

    def __init__(self, event: asyncio.Event) -> None:
        super().__init__()
        self._event = event

    def is_set(self) -> bool:
        return self._event.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        async def wait() -> bool:
            try:
                async with asyncio.timeout(timeout):
                    return await self._event.wait()
            except TimeoutError:
                return False

        return _loop.run(wait())


class Stdio(NamedTuple):
    """A process's streams as binary files; None where one was not asked for (B6)."""

    stdin: io.BufferedWriter | None
    stdout: io.BufferedReader | None
    stderr: io.BufferedReader | None


class _Reader(io.RawIOBase):
    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer).cast("B")
        data = _loop.run(self._reader.read(len(view)))
        view[: len(data)] = data
        return len(data)


class _Writer(io.RawIOBase):
    dropped = False  # nobody has it any longer, nor can wait

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer

    def writable(self) -> bool:
        return True

    def write(self, data: ReadableBuffer, /) -> int:
        async def write(piece: bytes) -> int:
            self._writer.write(piece)
            await self._writer.drain()
            return len(piece)

        if not self.dropped:
            return _loop.run(write(bytes(data)))
        _loop.soon(self._writer.write, bytes(data))
        return memoryview(data).nbytes

    def close(self) -> None:
        if not self.closed:
            super().close()
            _loop.soon(self._writer.close)


class _BufferedWriter(io.BufferedWriter):
    """What is dropped without being closed is flushed and closed by whatever thread the garbage collector runs in,
    and that may be one whose start the loop is waiting for."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._below = _Writer(writer)
        super().__init__(self._below, BUFFER)

    def __del__(self) -> None:
        self._below.dropped = True
        super().__del__()


_FACADES: tuple[tuple[type, type[Facade]], ...] = (
    (cow.Process, Process),
    (cow.Container, Container),
    (vm.UtilityVM, UtilityVM),
    (local.LocalHost, LocalHost),
    (health.Health, Health),
    (pod.Pod, Pod),
    (files.Files, Files),
    (file_streams.FileReader, FileReader),
    (file_streams.FileWriter, FileWriter),
    (pool.Pool, Pool),
    (pool.Lease, Lease),
    (forward.Forward, Forward),
    (forward.Exposure, Exposure),
    (connection.Connection, Connection),
    (snapshots.Snapshot, Snapshot),
    (share.Share, Share),
    (network.Network, Network),
    (journal.EventReader, EventReader),
)


def _facade(value: Any) -> Any:
    """What ordinary code gets for a value of the asyncio side."""
    for kind, facade in _FACADES:
        if isinstance(value, kind):
            return facade._of(value)
    if isinstance(value, asyncio.Event):
        return Event(value)
    if isinstance(value, AsyncGenerator):
        return _iterate(value)
    return value


def _plain(value: Any) -> Any:
    """What the asyncio side gets for a value of ordinary code."""
    return value._target if isinstance(value, Facade) else value
