"""The three interfaces: `ProcessHost`, `Container`, `Process`, after hcsshim's Go package ``internal/cow``.

Go's ``context`` becomes task cancellation and ``asyncio.timeout``.  Names are the same in snake_case and mean the
same; where they depart on purpose the docstring says *departs*.  No implementation lives here.
"""

from __future__ import annotations

import abc
import asyncio
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

from .parameters import ModifyRequest, Plan, ProcessConfig, Signal


class Stdio(NamedTuple):
    """A process's streams; None where one was not asked for (B6).  A terminal's output is `stdout` (B12)."""

    stdin: asyncio.StreamWriter | None
    stdout: asyncio.StreamReader | None
    stderr: asyncio.StreamReader | None


class ExitStatus(NamedTuple):
    """How a process or a container ended (B8).

    code    0 to 255; 128+n for a death by signal n
    signal  n, or 0 for an ordinary exit
    oom     the kernel killed it because its container was out of memory (B29)
    """

    code: int
    signal: int = 0
    oom: bool = False


class Process(abc.ABC):
    """A process in a container, in a VM or on the host itself."""

    @property
    @abc.abstractmethod
    def pid(self) -> int:
        """Its pid where it runs.  A label: the process is addressed by an id that is never used again."""

    @property
    @abc.abstractmethod
    def stdio(self) -> Stdio:
        """Its streams.  Any of them may end before or after the process does."""

    @abc.abstractmethod
    async def close_stdin(self) -> None:
        """End of its input.  On a terminal: sends the end-of-file character (B15c).  Repeatable (B6)."""

    @abc.abstractmethod
    async def close_stdout(self) -> None:
        """No longer read its output: it gets EPIPE or SIGPIPE (B4).  Harmless when repeated (B6)."""

    @abc.abstractmethod
    async def close_stderr(self) -> None:
        """As `close_stdout`."""

    @abc.abstractmethod
    async def resize_console(self, width: int, height: int) -> None:
        """Set the terminal's size in characters; the foreground job gets SIGWINCH (B11).

        Raises `NotATerminal`; after the exit it does nothing.
        """

    @abc.abstractmethod
    async def kill(self) -> bool:
        """Send SIGKILL; whether it was delivered.  False, and no error, when it had ended (B7)."""

    @abc.abstractmethod
    async def signal(self, options: Signal) -> bool:
        """Send a signal; whether it was delivered.  0 probes and never kills (B7; departs: the reference kills)."""

    @abc.abstractmethod
    async def wait(self) -> ExitStatus:
        """Wait for the exit, never for the streams (B2; departs).  Any number of tasks may wait (B10).

        Raises `ConnectionLost` when the VM or the channel dies first.
        """

    @abc.abstractmethod
    def exit_code(self) -> int:
        """The exit code, without waiting.  Raises `ProcessRunning`, `ConnectionLost` (B9); invents nothing."""

    @abc.abstractmethod
    async def close(self) -> None:
        """Release the host's side: its streams are closed, a terminal hangs up; it does not kill.  Repeatable."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kill it when it still runs, then `close`."""
        try:
            await self.kill()
        finally:
            await self.close()


class ProcessHost(abc.ABC):
    """Anything in which processes can be made: a container, a utility VM, the host itself."""

    @abc.abstractmethod
    async def create_process(self, config: ProcessConfig) -> Process:
        """Start a process (B14).  Cancelled half-way, it leaves none behind (B15)."""

    @property
    @abc.abstractmethod
    def os(self) -> str:
        """``"linux"``."""

    @property
    @abc.abstractmethod
    def is_oci(self) -> bool:
        """Whether `create_process` takes an OCI process object."""


class Container(ProcessHost):
    """A Linux container.  Leaving ``async with`` terminates and deletes it (B26)."""

    #: Set once, when the container has ended, was closed, or its VM is gone (B25).
    wait_channel: asyncio.Event

    @property
    @abc.abstractmethod
    def id(self) -> str:
        """The name under which it was created; unique in its VM while it exists."""

    @abc.abstractmethod
    async def start(self) -> None:
        """Run its init process (B20)."""

    @abc.abstractmethod
    async def shutdown(self) -> None:
        """Send its stop signal; does not wait (B23)."""

    @abc.abstractmethod
    async def terminate(self) -> None:
        """Kill it; does not wait (B23).  Ends the wait of one that was never started."""

    @abc.abstractmethod
    async def wait(self) -> ExitStatus:
        """Wait for its end.  Raises `ContainerClosed` after `close`, `ConnectionLost` when the VM dies (B25)."""

    @abc.abstractmethod
    def wait_error(self) -> Exception | None:
        """Why `wait` would raise, None when it returned a status.  Raises when `wait_channel` is not set (B25)."""

    @abc.abstractmethod
    async def properties(self, *types: str) -> Mapping[str, Any]:
        """ContainerProperties of schema1: types ``"Statistics"``, ``"ProcessList"``; none: the basic ones (B27)."""

    @abc.abstractmethod
    async def properties_v2(self, *types: str) -> Mapping[str, Any]:
        """Properties of hcsschema (v2); metrics have the shape of cgroup v1, converted from v2 (B27)."""

    @abc.abstractmethod
    async def modify(self, config: ModifyRequest | Sequence[ModifyRequest], *, dry_run: bool = False) -> Plan:
        """Change it while it runs (B28): all of it or, when a step fails, nothing; `dry_run` only plans.

        Raises `NotSupported`, and changes nothing, when a step cannot be done live; ``data["plan"]`` says why.
        """

    @abc.abstractmethod
    async def close(self) -> None:
        """Release the host's side; the container goes on (B26).  Harmless when repeated."""

    @abc.abstractmethod
    async def __aenter__(self) -> Self: ...

    @abc.abstractmethod
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
