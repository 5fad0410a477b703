"""`GuestProcess`, and `GuestProcessHost`: what can make processes over a bridge.

Rule: a process is addressed by the id that the agent gave it, never by its pid.  What is known of its end came in
an exit event, and is never guessed (B9).  Nothing here waits for streams: an exit and an EOF are two things (B2).
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .calls import CALL_TIMEOUT
from .cow import ExitStatus, Process, ProcessHost, Stdio
from .errors import (
    ConnectionLost,
    InvalidRequest,
    NotATerminal,
    ProcessNotFound,
    ProcessRunning,
)
from .parameters import OCIProcess, ProcessConfig, ProcessParameters, Signal, check_size, signal_number
from .ports.methods import Sockets
from .run import run as run_process
from .streams import open_reader, open_writer

if TYPE_CHECKING:
    from .bridge import Bridge
    from .calls import Result
    from .files import Files
    from .streams import BridgeReader, StreamTransport

SIGKILL = 9


class GuestProcess(Process):
    """A process behind a bridge.  Close it (``async with`` does): the agent keeps its exit until then."""

    def __init__(self, bridge: Bridge, *, stdin: bool, stdout: bool, stderr: bool, terminal: bool) -> None:
        self._bridge = bridge
        self._terminal = terminal
        self._id = 0
        self._pid = 0
        self._ended = asyncio.Event()
        self._outcome: ExitStatus | ConnectionLost | None = None
        self._closed = False
        self._released = False
        self._written: tuple[int, int] = (-1, -1)
        self.streams: dict[str, int] = {}  # names of the streams, as the wire's request takes them
        self._stdin: StreamTransport | None = None
        self._stdout = self._stderr = None
        stdin_writer = None
        try:
            if stdin:
                self.streams["stdin"], stdin_writer, self._stdin = open_writer(bridge)
            if stdout:
                self._stdout = self._open_reader("stdout")
            if stderr:
                self._stderr = self._open_reader("stderr")
        except BaseException:
            self.close_streams()
            raise
        self._stdio = Stdio(stdin_writer, self._stdout, self._stderr)

    def _open_reader(self, name: str) -> BridgeReader:
        self.streams[name], reader = open_reader(self._bridge)
        return reader

    # -- its birth -----------------------------------------------------------------------------------------

    def created(self, result: Result) -> None:
        """The agent's answer: from here on its events are heard."""
        self._id, self._pid = result["process"], result["pid"]
        self._bridge.subscribe("process.exit", self._id, self._on_exit)

    async def undo(self, result: Result) -> None:
        """It was made although its creation was cancelled: end it with all that it started (B15)."""
        self._bridge.unsubscribe("process.exit", self._id)
        try:
            await self._bridge.call("process.signal", process=self._id, signal=SIGKILL, tree=True)
        finally:
            self._release()

    def close_streams(self) -> None:
        """Give the streams of a process that does not exist back."""
        self._closed = True
        if self._stdin is not None:
            self._stdin.abort()
        for reader in (self._stdout, self._stderr):
            if reader is not None:
                reader.stop()

    def _on_exit(self, event: Result | ConnectionLost) -> None:
        if self._outcome is not None:
            return
        if isinstance(event, ConnectionLost):
            self._outcome = event
        else:
            self._outcome = ExitStatus(event["code"], event["signal"], event["oom"])
            self._written = (event.get("stdout", -1), event.get("stderr", -1))
        self._bridge.unsubscribe("process.exit", self._id)
        self._ended.set()
        if self._closed:
            self._release()

    # -- the interface -------------------------------------------------------------------------------------

    @property
    def id(self) -> int:
        """The agent's name for it, never used again."""
        return self._id

    @property
    def pid(self) -> int:
        return self._pid

    @property
    def stdio(self) -> Stdio:
        return self._stdio

    async def close_stdin(self) -> None:
        if self._stdin is not None:
            self._stdin.close()

    async def close_stdout(self) -> None:
        if self._stdout is not None:
            self._stdout.stop()

    async def close_stderr(self) -> None:
        if self._stderr is not None:
            self._stderr.stop()

    async def resize_console(self, width: int, height: int) -> None:
        check_size(width, height)
        if not self._terminal:
            raise NotATerminal(f"the process {self._pid} has no terminal", hint="create it with terminal=True")
        if self._outcome is None:
            try:
                await self._bridge.call("process.resize", process=self._id, width=width, height=height)
            except ProcessNotFound:
                return  # it ended on the way (B11)

    async def kill(self) -> bool:
        return await self._deliver(SIGKILL)

    async def kill_tree(self) -> bool:
        """Kill it and all that it started (B15b); whether any was there."""
        return await self._deliver(SIGKILL, tree=True)

    async def signal(self, options: Signal) -> bool:
        return await self._deliver(signal_number(options))

    async def _deliver(self, number: int, *, tree: bool = False) -> bool:
        if self._released or (self._outcome is not None and not tree):
            return False
        try:
            answer = await self._bridge.call("process.signal", process=self._id, signal=number, tree=tree)
        except ProcessNotFound:
            return False
        return bool(answer["delivered"])

    async def wait(self) -> ExitStatus:
        await self._ended.wait()
        return self._status()

    def exit_code(self) -> int:
        if self._outcome is None:
            raise ProcessRunning(f"the process {self._pid} is running", hint="await wait() first")
        return self._status().code

    def missing(self, reader: BridgeReader) -> bool:
        """Whether bytes that it wrote before its end have not arrived on this stream yet."""
        return reader.received < self._written[0 if reader is self._stdout else 1]

    def _status(self) -> ExitStatus:
        if isinstance(self._outcome, ExitStatus):
            return self._outcome
        assert self._outcome is not None
        raise self._bridge.lost or self._outcome

    async def close(self) -> None:
        """See `Process.close`.  The end of a process that goes on is still told to whoever waits."""
        if self._closed:
            return
        self._closed = True
        if self._stdin is not None:
            self._stdin.close()
        await self.close_stdout()
        await self.close_stderr()
        if self._outcome is not None:
            self._release()

    def _release(self) -> None:
        """The agent need no longer keep its exit."""
        if not self._released:
            self._released = True
            self._bridge.post("process.release", process=self._id)

    def __del__(self) -> None:
        if getattr(self, "_closed", True) or not self._id or self._bridge.lost is not None:
            return
        warnings.warn(f"{self!r} was not closed", ResourceWarning, stacklevel=2, source=self)

    def __repr__(self) -> str:
        state = "running" if self._outcome is None else repr(self._outcome)
        return f"<GuestProcess {self._id} pid {self._pid} {state}>"


async def start_process(
    bridge: Bridge, config: ProcessParameters | OCIProcess, *, container: str = "", timeout: float = CALL_TIMEOUT
) -> GuestProcess:
    """Create a process with its streams open (B14).

    After `timeout` seconds `DeadlineExceeded`, whose ``data["ran"]`` says whether it had run.
    """
    if isinstance(config, ProcessParameters):
        request = _request(config)
        wanted = {"stdin": config.stdin, "stdout": config.stdout, "stderr": config.stderr}
        terminal = config.terminal
    else:
        terminal = bool(config.get("terminal", False))
        size = config.get("consoleSize") or {}
        request = {"oci": dict(config), "width": size.get("width", 80), "height": size.get("height", 24)}
        wanted = {"stdin": True, "stdout": True, "stderr": not terminal}
    process = GuestProcess(bridge, terminal=terminal, **wanted)
    try:
        await bridge.call(
            "process.create",
            timeout=timeout,
            accept=process.created,
            undo=process.undo,
            container=container,
            terminal=terminal,
            **process.streams,
            **request,
        )
    except BaseException:
        process.close_streams()
        raise
    return process


def _request(config: ProcessParameters) -> dict[str, Any]:
    return {
        "args": list(config.args),
        "command_line": config.command_line,
        "env": None if config.env is None else dict(config.env),
        "add_env": dict(config.add_env),
        "cwd": config.cwd,
        "user": config.user,
        "additional_gids": list(config.additional_gids),
        "capabilities": None if config.capabilities is None else list(config.capabilities),
        "rlimits": [[name, soft, hard] for name, (soft, hard) in config.rlimits.items()],
        "no_new_privileges": config.no_new_privileges,
        "width": config.width,
        "height": config.height,
    }


class GuestProcessHost(Sockets, ProcessHost):
    """A `ProcessHost` whose processes and sockets are an agent's; `_container` "" is where the agent is."""

    _container = ""
    run = run_process

    @property
    def bridge(self) -> Bridge:
        """The connection to the agent.  Raises `ConnectionLost` before the start and after the end."""
        raise NotImplementedError

    @property
    def files(self) -> Files:
        """The files where its processes run."""
        from .files import Files

        return Files(self, self._container)

    @property
    def os(self) -> str:
        return "linux"

    @property
    def is_oci(self) -> bool:
        return False

    async def create_process(self, config: ProcessConfig) -> Process:
        return await self.start_process(config)

    async def start_process(self, config: ProcessConfig, timeout: float = CALL_TIMEOUT) -> GuestProcess:
        """`create_process` with a deadline of its own (see `process.start_process`)."""
        if config is None:
            raise InvalidRequest("only a container has an init process", hint="give ProcessParameters")
        if isinstance(config, Mapping) and not self.is_oci:
            raise InvalidRequest("this host takes no OCI process", hint="give ProcessParameters")
        return await start_process(self.bridge, config, container=self._container, timeout=timeout)
