"""`GuestContainer`: a Linux container in a VM, behind its bridge.

Rule: its end is what the agent reported; `wait`, `wait_channel` and `wait_error` are three views of one outcome,
which is set once (B25).  Images, layers and specs are `UtilityVM.create_container`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from . import changes, properties
from .calls import CALL_TIMEOUT
from .cow import Container, ExitStatus
from .errors import (
    ByreError,
    ConnectionLost,
    ContainerClosed,
    ContainerNotFound,
    ContainerNotReady,
    answer_of_guest,
)
from .parameters import ModifyRequest, Plan, ProcessConfig
from .process import GuestProcess, GuestProcessHost
from .stats import ContainerStats, ProcessStats

if TYPE_CHECKING:
    from .bridge import Bridge
    from .calls import Result

#: How long leaving ``async with`` waits for the guest to kill and delete a container, in seconds; the guest itself
#: gives up on processes that cannot be killed after 30.
LEAVE_TIMEOUT = 60.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitStreams:
    """How the init process of a container is connected, once it is asked for (B20)."""

    stdin: bool = True
    terminal: bool = False
    width: int = 80
    height: int = 24


class LogPiece(NamedTuple):
    """`data` was written after `dropped` bytes that were no longer kept when it was asked for.  `ended`: nothing
    more will come."""

    data: bytes = b""
    dropped: int = 0
    ended: bool = False


class GuestContainer(GuestProcessHost, Container):
    """See the module.  Made by `UtilityVM.create_container` and `open_container`."""

    def __init__(
        self,
        bridge: Bridge,
        container: str,
        init: InitStreams,
        released: Callable[[], Awaitable[object]] | None = None,
    ) -> None:
        self.wait_channel = asyncio.Event()
        self._bridge = bridge
        self._container = container
        self._init_streams = init
        self._init: asyncio.Task[GuestProcess] | None = None
        self._outcome: ExitStatus | ConnectionLost | ContainerClosed | None = None
        self._deleted = False
        self._released = released
        self.changes = changes.Changes(bridge, container)
        self._watch: asyncio.Task[None] | None = None
        bridge.subscribe("container.exit", container, self._on_exit)

    # -- its end -------------------------------------------------------------------------------------------

    def _on_exit(self, event: Result | ConnectionLost) -> None:
        if isinstance(event, ConnectionLost):
            self._end(event)
        else:
            self._end(ExitStatus(event["code"], event["signal"], event["oom"]))

    def _end(self, outcome: ExitStatus | ConnectionLost | ContainerClosed) -> None:
        if self._outcome is None:
            self._outcome = outcome
            self.wait_channel.set()
        self._bridge.unsubscribe("container.exit", self._container)

    def watch(self) -> None:
        """Ask for the end of a container that somebody else created: its exit may have been told before."""

        async def ask() -> None:
            with contextlib.suppress(ByreError):
                self._on_exit(await self._bridge.call("container.wait", timeout=None, container=self._container))

        self._watch = self._bridge.background(ask())

    async def wait(self) -> ExitStatus:
        await self.wait_channel.wait()
        if isinstance(self._outcome, ExitStatus):
            return self._outcome
        error = self.wait_error()
        assert error is not None
        raise error

    def wait_error(self) -> Exception | None:
        if not self.wait_channel.is_set():
            raise ContainerNotReady(f"the container {self.id} has not ended", hint="await wait() first")
        if isinstance(self._outcome, ConnectionLost):
            return self._bridge.lost or self._outcome
        if isinstance(self._outcome, ContainerClosed):
            return ContainerClosed(self._outcome.message, hint=self._outcome.hint)
        return None

    # -- as a host of processes ----------------------------------------------------------------------------

    @property
    def bridge(self) -> Bridge:
        return self._bridge

    @property
    def id(self) -> str:
        return self._container

    @property
    def is_oci(self) -> bool:
        return True

    async def start_process(self, config: ProcessConfig, timeout: float = CALL_TIMEOUT) -> GuestProcess:
        """None is the init process, the same object each time (B20); anything else is an exec (B21)."""
        if config is not None:
            return await super().start_process(config, timeout)
        if self._init is None or (self._init.done() and (self._init.cancelled() or self._init.exception())):
            self._init = self._bridge.background(self._make_init(timeout))
        return await asyncio.shield(self._init)  # it is the container's; a caller who goes leaves it to the next

    async def _make_init(self, timeout: float) -> GuestProcess:
        how = self._init_streams
        process = GuestProcess(
            self._bridge, stdin=how.stdin, stdout=True, stderr=not how.terminal, terminal=how.terminal
        )
        try:
            await self._bridge.call(
                "container.init",
                timeout=timeout,
                accept=process.created,
                container=self._container,
                terminal=how.terminal,
                width=how.width,
                height=how.height,
                stdin=process.streams.get("stdin", 0),
                stdout=process.streams.get("stdout", 0),
                stderr=process.streams.get("stderr", 0),
            )
        except BaseException:
            process.close_streams()
            raise
        return process

    # -- its life ------------------------------------------------------------------------------------------

    async def start(self) -> None:
        await self._bridge.call("container.start", container=self._container)

    async def shutdown(self) -> None:
        await self._if_there("container.shutdown")

    async def terminate(self) -> None:
        await self._if_there("container.terminate")

    async def delete(self) -> None:
        """Remove it for good, killing what runs: its writable layer is gone, its id can be used again."""
        if self._deleted:
            return
        self._deleted = True
        await self._if_there("container.delete")
        if self._released is not None:
            await self._released()
        await self.changes.forget()

    async def _if_there(self, method: str) -> None:
        """What is harmless when the container, or its VM, is already gone (B23, B51)."""
        if not self._deleted or method == "container.delete":
            with contextlib.suppress(ContainerNotFound, ConnectionLost):
                await self._bridge.call(method, container=self._container)

    async def close(self) -> None:
        self._end(ContainerClosed(f"the container {self.id} was closed here", hint="open_container() finds it"))
        if self._watch is not None:
            self._watch.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Terminate, delete, close (B26); to the end, even when the task is cancelled meanwhile."""
        await self._bridge.finish(self._leave(), LEAVE_TIMEOUT)

    async def _leave(self) -> None:
        try:
            await self.delete()  # the guest kills it, tells its end, and then answers
        finally:
            if self._init is not None and self._init.done() and not self._init.exception():
                await self._init.result().close()
            await self.close()

    # -- what is known of it -------------------------------------------------------------------------------

    async def state(self) -> dict[str, Any]:
        """What the agent knows of it: ``state`` (creating, created, running, stopped), pid, exit, ..."""
        state: dict[str, Any] = await self._ask("container.state", "state")
        return state

    async def log(self) -> bytes:
        """The last output of an init that nobody asked for (B20)."""
        return (await self.read_log()).data

    async def follow_log(self, start: int = 0) -> AsyncIterator[LogPiece]:
        """That log from byte `start` of all that was written, and what comes, until the container has ended."""
        piece = LogPiece()
        while not piece.ended:
            piece = await self.read_log(start, wait=True)
            start += piece.dropped + len(piece.data)
            if piece.data or piece.dropped:
                yield piece

    async def read_log(self, start: int = 0, *, wait: bool = False) -> LogPiece:
        """What is kept of that log from byte `start` on; with `wait`, when there is any, or it has ended."""
        timeout = None if wait else CALL_TIMEOUT
        return LogPiece(
            **await self._bridge.call(
                "container.log", timeout=timeout, container=self._container, start=start, wait=wait
            )
        )

    async def stats(self) -> ContainerStats:
        """What it uses, and its limits."""
        return ContainerStats.of(self.id, await self._ask("container.stats", "stats"))

    async def processes(self) -> list[ProcessStats]:
        """What runs in it."""
        return [ProcessStats.of(found) for found in await self._ask("container.processes", "processes")]

    async def properties(self, *types: str) -> Mapping[str, Any]:
        found, _ = await self._properties(types)
        return found

    async def properties_v2(self, *types: str) -> Mapping[str, Any]:
        found, stats = await self._properties(types)
        if stats is not None:
            with answer_of_guest("statistics of a container"):
                found["LCOWMetrics"] = properties.metrics(stats)
        return found

    async def _properties(self, types: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any] | None]:
        properties.check_types(types)
        state, stats = await self.state(), None
        with answer_of_guest("statistics of a container"):
            found = properties.basic(self.id, str(state.get("state", "")))
            if "Statistics" in types:
                stats = await self._ask("container.stats", "stats")
                found["Statistics"] = properties.statistics(stats, int(state.get("started_ns") or 0))
            if "ProcessList" in types:
                found["ProcessList"] = properties.process_list(await self._ask("container.processes", "processes"))
        return found, stats

    async def _ask(self, method: str, field: str) -> Any:
        return (await self._bridge.call(method, container=self._container))[field]

    async def modify(self, config: ModifyRequest | Sequence[ModifyRequest], *, dry_run: bool = False) -> Plan:
        wanted = list(config) if isinstance(config, Sequence) else [config]
        plan = changes.plan(wanted, str((await self.state()).get("state", "")))
        if not dry_run:
            changes.check(plan)
            await self.changes.carry_out(wanted)
        return plan

    def __repr__(self) -> str:
        return f"<GuestContainer {self.id!r} {'running' if self._outcome is None else repr(self._outcome)}>"
