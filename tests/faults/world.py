"""What a phase and a strike know of their round."""

from __future__ import annotations

import asyncio
import os
import random
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import byre
from byre.errors import ByreError

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

    `deadline` is what calls have; `may_kill`: the strike may end a command by SIGKILL; `machines` are the emulators
    that there were before.
    """

    vm: Any
    image: str
    random: random.Random
    options: dict[str, Any]
    machines: frozenset[int]
    deadline: float = DEADLINE
    may_kill: bool = False
    struck: asyncio.Event = field(default_factory=asyncio.Event)

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

    async def another(self) -> byre.UtilityVM:
        """A VM of the phase's own, that is yet to begin."""
        return byre.UtilityVM(**self.options, boot_timeout=self.deadline)

    async def again(self, step: Callable[[], Awaitable[object]]) -> None:
        """Take something back: once more, where the strike made the first try fail."""
        try:
            await step()
        except ByreError:
            await self.struck.wait()
            if self.vm.bridge.lost is None:
                await step()

    def newest_machine(self) -> int:
        """The emulator that this round started last: of the second VM, where a phase boots one; 0: none."""
        return max(emulators() - self.machines, default=0)


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


def emulators() -> frozenset[int]:
    """Process ids of this process's children that are emulators."""
    return frozenset(child for child in children() if name_of(child).startswith("qemu-system"))


def children() -> frozenset[int]:
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            found.update(map(int, (task / "children").read_text().split()))
        except OSError:
            pass  # a thread that has ended
    return frozenset(found)


def name_of(pid: int) -> str:
    try:
        return os.path.basename(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode())
    except OSError:
        return ""
