"""What a phase and a strike know of their round."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import byre
from byre.errors import ByreError

from .places import Place, emulators

#: Seconds that one call may take, and the longest that it may be overdue.
DEADLINE = 60.0
GRACE = 5.0

#: A call's own deadline comes first, by this much.
MARGIN = 0.1

#: Seconds that leaving a container or a VM may take, of which QEMU gets ten to end in order.
CLOSING = 12.0

T = TypeVar("T")


class Wrong(Exception):
    """A result that is not the right one: invented, lost, or of somebody else."""


class Hung(Exception):
    """A call that went on long past its deadline; the text says where it is."""


@dataclass
class World:
    """One round's.

    `deadline` is what calls have; `may_kill`: the strike may end a command by SIGKILL; `latest` is the place that
    was begun last, `client` the process that does the work where that is another one.
    """

    place: Place
    image: str
    random: random.Random
    deadline: float = DEADLINE
    may_kill: bool = False
    struck: asyncio.Event = field(default_factory=asyncio.Event)
    client: asyncio.subprocess.Process | None = None

    def __post_init__(self) -> None:
        self.latest = self.place
        self._others = emulators() - {getattr(self.vm, "machine_pid", 0)}

    @property
    def vm(self) -> Any:
        return self.place.vm

    async def call(self, awaitable: Awaitable[T], deadline: float | None = None) -> T:
        """Await it, cancelled at its deadline if it has none of its own.  Raises `Hung` when neither ends it."""
        deadline = self.deadline if deadline is None else deadline
        task = asyncio.ensure_future(_within(awaitable, deadline))
        try:
            await asyncio.wait({task}, timeout=deadline + GRACE)
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait({task}, timeout=GRACE)
            raise
        if not task.done():
            where = whereabouts(task)
            task.cancel()
            raise Hung(where)
        return task.result()

    @asynccontextmanager
    async def using(self, making: Awaitable[AbstractAsyncContextManager[T]]) -> AsyncIterator[T]:
        """`async with await making`, each step of it a call."""
        made = await self.call(making)
        try:
            yield await self.call(made.__aenter__())
        finally:
            await self.call(made.__aexit__(*sys.exc_info()), CLOSING)

    @asynccontextmanager
    async def container(self, *args: str) -> AsyncIterator[byre.GuestContainer]:
        """A container that is left as soon as that can be done."""
        made = await self.call(self.vm.create_container(image=self.image, args=args))
        try:
            yield made
        finally:
            await self.call(self.again(lambda: made.__aexit__(*sys.exc_info())), CLOSING)

    @asynccontextmanager
    async def another(self) -> AsyncIterator[Place]:
        """A second place, the phase's own."""
        place = self.latest = self.place.another(self.deadline)
        try:
            await self.call(place.start())
            yield place
        finally:
            await self.call(place.close(), CLOSING)

    async def again(self, step: Callable[[], Awaitable[object]]) -> None:
        """Take something back: once more, where the strike made the first try fail."""
        try:
            await step()
        except ByreError:
            await self.struck.wait()
            if self.vm.bridge.lost is None:
                await step()

    def newest_machine(self) -> int:
        """Of the second VM, where a phase has begun one; 0: none."""
        return max(emulators() - self._others, default=0)


async def repeated(phase: Callable[[World], Awaitable[None]], world: World) -> None:
    """The phase's work again and again, the last time from begin to end after the strike, or until it fails."""
    after = False
    while not after:
        after = world.struck.is_set()
        await phase(world)


async def _within(awaitable: Awaitable[T], deadline: float) -> T:
    async with asyncio.timeout(deadline + MARGIN):
        return await awaitable


def whereabouts(task: asyncio.Task[Any]) -> str:
    """What a task awaits, from the outside in."""
    places, coroutine = [], task.get_coro()
    while (frame := getattr(coroutine, "cr_frame", None)) is not None:
        places.append(f"{frame.f_code.co_qualname}:{frame.f_lineno}")
        coroutine = getattr(coroutine, "cr_await", None)
    return f"{' > '.join(places)} > {coroutine!r}"
