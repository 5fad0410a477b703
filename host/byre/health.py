"""Whether a guest still answers, asked apart from ordinary calls (B48).

    ok             it answered the last time
    unresponsive   it has not answered for `deadline` seconds
    paused         nobody asks: its CPUs are stopped, by us
    lost           the connection is gone; nothing follows

Rule: a probe asks the agent's loop and nothing else; a state is told once, when it changes.  Time in which this
host slept, or this loop did not run, is not held against the guest.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from .errors import ConnectionLost, DeadlineExceeded
from .events import HealthChanged

if TYPE_CHECKING:
    from .bridge import Bridge
    from .owner import Owner

#: Seconds between probes: under emulation one costs the guest half a millisecond.
INTERVAL = 2.0

#: Seconds without an answer after which a guest is called unresponsive: far beyond a round trip of a loaded guest
#: under emulation.
PATIENCE = 8.0

OK, UNRESPONSIVE, PAUSED, LOST = "ok", "unresponsive", "paused", "lost"


class Health:
    """Probes a guest from `start` to `stop`.  `async for state in health` gives every change from now on."""

    #: A guest that hangs is noticed within this many seconds.
    deadline = INTERVAL + PATIENCE

    def __init__(self, owner: Owner, bridge: Bridge) -> None:
        self._owner = owner
        self._bridge = bridge
        self._state = OK
        self._changed = asyncio.Condition()
        self._listeners: list[asyncio.Queue[str]] = []
        self._resting = False
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def state(self) -> str:
        """One of "ok", "unresponsive", "paused", "lost"."""
        return self._state

    def start(self) -> None:
        self._task = asyncio.create_task(self._probe())

    async def stop(self) -> None:
        """No longer probe.  Harmless when repeated."""
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait((self._task,))
        await self._set(LOST)

    async def rest(self) -> None:
        """The VM is being paused or saved: its silence means nothing."""
        self._resting = True
        self._wake.set()
        await self._set(PAUSED)

    async def resume(self) -> None:
        """It runs again."""
        self._resting = False
        self._wake.set()
        await self._set(OK)

    async def wait_for(self, *states: str) -> str:
        """Wait until the state is one of these; which.  Raises `ConnectionLost` when it can no longer become so."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._state in (*states, LOST))
            if self._state not in states:
                raise self._bridge.lost or ConnectionLost("the VM is gone")
            return self._state

    def __aiter__(self) -> AsyncIterator[str]:
        changes: asyncio.Queue[str] = asyncio.Queue()
        self._listeners.append(changes)
        return self._listen(changes)

    async def _listen(self, changes: asyncio.Queue[str]) -> AsyncIterator[str]:
        try:
            if self._state == LOST:
                return
            while True:
                state = await changes.get()
                yield state
                if state == LOST:
                    return
        finally:
            self._listeners.remove(changes)

    async def _probe(self) -> None:
        try:
            while True:
                self._wake.clear()
                if self._resting:
                    await self._wake.wait()
                    continue
                await self._ask()
                try:
                    async with asyncio.timeout(INTERVAL):
                        await self._wake.wait()
                except TimeoutError:
                    pass
        except ConnectionLost:
            await self._set(LOST)

    async def _ask(self) -> None:
        loop = asyncio.get_running_loop()
        begin = loop.time()
        try:
            await self._owner.probe(self._bridge, PATIENCE)
        except DeadlineExceeded:
            late = loop.time() - begin - PATIENCE
            if self._resting or late > INTERVAL:
                return  # it was paused meanwhile, or it is we who were away: ask again
            await self._set(UNRESPONSIVE)
        else:
            if not self._resting:
                await self._set(OK)

    async def _set(self, state: str) -> None:
        if state != self._state and self._state != LOST:
            self._state = state
            if state != LOST:  # the end is an event of its own
                self._owner.note(HealthChanged, state=state)
            for changes in self._listeners:
                changes.put_nowait(state)
            async with self._changed:
                self._changed.notify_all()
