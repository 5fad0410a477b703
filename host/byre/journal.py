"""The events of a VM, kept for whoever reads them.

    Journal         in the process that holds the VM: it hears the agent and the machine
    KeeperJournal   a client's view of the one that a keeper has
    EventReader     one reader: where it is, and what it has missed

Rule: bounded whatever the guest does, and however slow a reader is.  A reader is a number and nothing else; what it
has missed is seen by the gap in the numbers, so that nothing is lost without being counted.  Log lines are kept
apart: a flood of them pushes nothing else out.
"""

from __future__ import annotations

import abc
import asyncio
import heapq
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from itertools import islice
from typing import TYPE_CHECKING, Any

from byre_proto import events as wire
from byre_proto.limits import MAX_LOG_LINE

from .errors import ConnectionLost
from .events import (
    ContainerCreated,
    ContainerDeleted,
    ContainerExited,
    ContainerKilled,
    ContainerOutOfMemory,
    ContainerPidsLimit,
    ContainerStarted,
    Event,
    LogLine,
    Missed,
    VMEnded,
    from_wire,
)

if TYPE_CHECKING:
    from .bridge import Bridge

#: Events that are kept: some hundred containers' whole lives; less than 1 MB.
KEPT = 1024
KEPT_LINES = 256

#: Events in one answer of a keeper: as many of the longest log lines fit a frame (MAX_CONTROL).
BATCH = 1024 * 1024 // (MAX_LOG_LINE * 4) // 2

#: Characters that are kept of a name or a reason: a container's id has 64.
MAX_TEXT = 256

#: Event of the wire -> record; their fields have the same names.
_FROM_GUEST: dict[str, type[Event]] = {
    "container.created": ContainerCreated,
    "container.started": ContainerStarted,
    "container.killed": ContainerKilled,
    "container.oom": ContainerOutOfMemory,
    "container.pids": ContainerPidsLimit,
    "container.exit": ContainerExited,
    "container.deleted": ContainerDeleted,
}


class Events(abc.ABC):
    """See the module."""

    @abc.abstractmethod
    def now(self) -> asyncio.Future[int]:
        """The number of the last event, at the time of the call."""

    @abc.abstractmethod
    async def after(self, number: int) -> list[Event]:
        """Those with a higher number, BATCH at most; waits until there is one."""

    def read(self, after: int | None) -> EventReader:
        """A reader of those with a higher number; None: of those from now on."""
        return EventReader(self, after)


class EventReader(AsyncIterator[Event]):
    """Gives each event once, in order; ends after `VMEnded`.  Raises `ConnectionLost` when a keeper is gone."""

    def __init__(self, source: Events, after: int | None) -> None:
        self._source = source
        self._start = source.now() if after is None else None
        self._position = 0 if after is None else after
        self._batch: deque[Event] = deque()
        self._over = False

    def __aiter__(self) -> EventReader:
        return self

    async def __anext__(self) -> Event:
        if self._over:
            raise StopAsyncIteration
        if self._start is not None:
            self._position = await asyncio.shield(self._start)
            self._start = None
        if not self._batch:
            self._batch.extend(await self._source.after(self._position))
        event = self._batch[0]
        missed = event.number - self._position - 1
        if missed > 0:
            self._position = event.number - 1
            return Missed(number=self._position, time=event.time, count=missed)
        self._batch.popleft()
        self._position = event.number
        self._over = isinstance(event, VMEnded)
        return event


class Journal(Events):
    """See the module."""

    def __init__(self) -> None:
        self._last = 0
        self._kept: deque[Event] = deque(maxlen=KEPT)
        self._lines: deque[Event] = deque(maxlen=KEPT_LINES)
        self._news = asyncio.Event()
        self._over = False

    def add(self, make: Callable[..., Event], **details: Any) -> None:
        """Something has happened: `make` is its class."""
        if self._over:
            return
        self._last += 1
        event = make(number=self._last, time=time.time(), **details)
        (self._lines if isinstance(event, LogLine) else self._kept).append(event)
        self._over = isinstance(event, VMEnded)
        self._news.set()
        self._news = asyncio.Event()

    def listen(self, bridge: Bridge) -> None:
        """Hear of what the agent reports, and of the end."""
        bridge.observe(self._heard)

    def _heard(self, event: wire.EventReceived | wire.LogReceived | ConnectionLost) -> None:
        if isinstance(event, ConnectionLost):
            self.add(VMEnded, reason=str(event.data.get("reason", event.message))[:MAX_LOG_LINE])
        elif isinstance(event, wire.LogReceived):
            details = {"source": event.source, "level": event.level, "message": event.message}
            self.add(LogLine, **details, dropped=event.dropped)
        elif event.name in _FROM_GUEST:
            record = _FROM_GUEST[event.name]
            details = {name: value for name, value in event.fields.items() if name in record.__dataclass_fields__}
            self.add(record, **{**details, "container": event.fields["container"][:MAX_TEXT]})

    def now(self) -> asyncio.Future[int]:
        number: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        number.set_result(self._last)
        return number

    async def after(self, number: int) -> list[Event]:
        while self._last <= number and not self._over:
            await self._news.wait()
        if self._last <= number:  # it is all told
            return [VMEnded(number=number + 1, time=time.time(), reason="the VM has ended")]
        newer = (_newer(kept, number) for kept in (self._kept, self._lines))
        return list(islice(heapq.merge(*newer, key=lambda event: event.number), BATCH))


def _newer(kept: deque[Event], number: int) -> list[Event]:
    """Those after a number.  A reader is near the end, mostly."""
    found: list[Event] = []
    for event in reversed(kept):
        if event.number <= number:
            break
        found.append(event)
    return found[::-1]


class KeeperJournal(Events):
    """See the module.  `why` is why the VM has ended, "" while it has not."""

    def __init__(self, bridge: Bridge, why: Callable[[], str]) -> None:
        self._bridge = bridge
        self._why = why

    def now(self) -> asyncio.Future[int]:
        return self._bridge.background(self._now())  # before the guest can answer what is asked for next

    async def _now(self) -> int:
        last: int = (await self._bridge.call("vm.events"))["last"]
        return last

    async def after(self, number: int) -> list[Event]:
        try:
            while True:
                answer = await self._bridge.call("vm.events", timeout=None, after=number)
                known = [event for event in map(from_wire, answer["events"]) if event is not None]
                if known:
                    return known
                number = answer["events"][-1][0]
        except ConnectionLost:
            if not self._why():
                raise
            return [VMEnded(number=number + 1, time=time.time(), reason=self._why())]
