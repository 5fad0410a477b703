"""Fakes for tests of programs that use byre: the real host library over a guest that is a dictionary of functions.

Rule: only the guest is played.  Protocol, flow control, deadlines and errors are the real ones, over a socket pair.

    async def greet(process):
        process.stdout.write(b"hello\\n")
        return 0

    async with MemoryHost({"greet": greet}) as host:
        assert (await host.run(["greet"], capture_output=True)).stdout == b"hello\\n"
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Self, TypeAlias

from byre_proto import events

from .bridge import Bridge
from .errors import (
    ByreError,
    Cancelled,
    ConnectionLost,
    NotSupported,
    ProcessNotFound,
    ProgramNotFound,
)
from .process import GuestProcessHost
from .streams import open_reader, open_writer

if TYPE_CHECKING:
    from types import TracebackType

    from .calls import Result

_log = logging.getLogger(__name__)

#: A socket pair answers at once.
OPEN_TIMEOUT = 10.0


class FakeProcess:
    """What a command of a `FakeGuest` sees: its request, its streams, the signals that it got."""

    def __init__(self, guest: FakeGuest, number: int, request: Result) -> None:
        self.id = number
        self.request = request
        self.args: list[str] = request["args"]
        self.stdin: asyncio.StreamReader | None = None
        self.stdout: asyncio.StreamWriter | None = None
        self.stderr: asyncio.StreamWriter | None = None
        self.signals: asyncio.Queue[int] = asyncio.Queue()
        self.task: asyncio.Task[None] | None = None
        self.killed = 0
        bridge = guest.bridge
        if request["stdin"]:
            _, self.stdin = open_reader(bridge, request["stdin"])
        if request["stdout"]:
            _, self.stdout, _ = open_writer(bridge, request["stdout"])
        if request["stderr"]:
            _, self.stderr, _ = open_writer(bridge, request["stderr"])


#: A program: awaited with its process; what it returns is the exit code.
Command: TypeAlias = Callable[[FakeProcess], Awaitable[int]]
#: Answers one request: its arguments in, its result out; raises a ByreError to refuse.
Handler: TypeAlias = Callable[[dict[str, Any]], Any]


class FakeGuest:
    """The guest's side of a connection.  `handlers` answer further methods, or replace those that are here."""

    def __init__(
        self,
        sock: socket.socket,
        commands: Mapping[str, Command] | None = None,
        handlers: Mapping[str, Handler] | None = None,
        *,
        secret: bytes | None = None,
    ) -> None:
        self.bridge = Bridge(sock, label="fake guest", secret=secret, server=self._serve)
        self.commands = dict(commands or {})
        self.handlers: dict[str, Handler] = {
            "process.create": self._create,
            "files.start": self._start_files,
            "process.signal": self._signal,
            "process.resize": self._nothing,
            "process.release": self._release,
            "process.list": lambda _: {"processes": [[p.id, p.id, p.args] for p in self.processes.values()]},
            "container.list": lambda _: {"containers": []},
            "system.configure": lambda _: {"info": {}},
            "system.info": lambda _: {"info": {}},
            "system.stacks": lambda _: {"text": "a fake has no stacks"},
            **(handlers or {}),
        }
        self.requests: list[tuple[str, Result]] = []
        self.processes: dict[int, FakeProcess] = {}
        self._next = 1
        self._calls: dict[int, asyncio.Task[None]] = {}

    async def open(self) -> None:
        await self.bridge.open(OPEN_TIMEOUT)

    async def close(self) -> None:
        """End the connection, as a VM that dies does."""
        await self.bridge.close("the fake guest was closed")
        tasks = [*self._calls.values(), *(p.task for p in self.processes.values() if p.task)]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _serve(self, event: events.RequestReceived | events.CancelReceived) -> None:
        if isinstance(event, events.CancelReceived):
            self._calls[event.call].cancel()
            return
        self.requests.append((event.method, event.arguments))
        task = asyncio.get_running_loop().create_task(self._answer(event))
        self._calls[event.call] = task
        task.add_done_callback(lambda _: self._calls.pop(event.call, None))

    async def _answer(self, event: events.RequestReceived) -> None:
        handler = self.handlers.get(event.method)
        try:
            if handler is None:
                raise NotSupported(f"the fake guest has no {event.method}")
            result = handler(event.arguments)
            if asyncio.iscoroutine(result):
                result = await result
        except ByreError as error:
            self.bridge.refuse(event.call, error)
        except asyncio.CancelledError:
            self.bridge.refuse(event.call, Cancelled("it was cancelled"))
        else:
            self.bridge.reply(event.call, result or {})

    def _create(self, request: Result) -> Result:
        name = request["args"][0] if request["args"] else request["command_line"]
        if name not in self.commands:
            raise ProgramNotFound(f"{name}: no such command", program=name)
        number, self._next = self._next, self._next + 1
        process = self.processes[number] = FakeProcess(self, number, request)
        process.task = asyncio.get_running_loop().create_task(self._run(process, self.commands[name]))
        return {"process": number, "pid": number}

    def _start_files(self, request: Result) -> Result:
        """An operation on files is the command "files.OPERATION", which exchanges `byre_proto.records`."""
        args = [f"files.{request['operation']}", request["path"]]
        return self._create({**request, "args": args, "stderr": 0})

    async def _run(self, process: FakeProcess, command: Command) -> None:
        await asyncio.sleep(0)  # the answer to process.create goes first
        code = 0
        try:
            code = await command(process)
        except asyncio.CancelledError:
            pass  # killed, or the guest has ended
        except Exception:
            _log.exception("the command %s failed", process.args)
            code = 1
        if process.killed:
            code = 128 + process.killed
        for writer in (process.stdout, process.stderr):
            if writer is not None:
                writer.close()
        if process.stdin is not None:
            process.stdin.stop()  # type: ignore[attr-defined]
        fields = {"process": process.id, "code": code, "signal": process.killed}
        self.bridge.tell("process.exit", fields)

    def _signal(self, request: Result) -> Result:
        process = self._find(request)
        if process.task is None or process.task.done():
            return {"delivered": False}
        number = request["signal"]
        process.signals.put_nowait(number)
        if number == signal.SIGKILL:
            process.killed = number
            process.task.cancel()
        return {"delivered": True}

    def _release(self, request: Result) -> Result:
        del self.processes[self._find(request).id]
        return {}

    def _nothing(self, request: Result) -> Result:
        self._find(request)
        return {}

    def _find(self, request: Result) -> FakeProcess:
        try:
            return self.processes[request["process"]]
        except KeyError:
            raise ProcessNotFound(f"no process has the id {request['process']}") from None


class MemoryHost(GuestProcessHost):
    """A `ProcessHost` whose programs are functions.  An async context manager; `guest` is its `FakeGuest`."""

    def __init__(
        self, commands: Mapping[str, Command] | None = None, handlers: Mapping[str, Handler] | None = None
    ) -> None:
        self._commands = commands
        self._handlers = handlers
        self._bridge: Bridge | None = None
        self.guest: FakeGuest

    @property
    def bridge(self) -> Bridge:
        if self._bridge is None:
            raise ConnectionLost("the fake is not running", hint="use: async with MemoryHost(...) as host")
        return self._bridge

    async def __aenter__(self) -> Self:
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setblocking(False)
        self.guest = FakeGuest(theirs, self._commands, self._handlers)
        self._bridge = Bridge(ours, label="fake")
        await asyncio.gather(self.guest.open(), self._bridge.open(OPEN_TIMEOUT))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.bridge.close()
        await self.guest.close()
