"""Who waits for a VM of a pool: in order, and each until there is a VM, an error, or no wish any longer.

Rule: a VM that is given to somebody who was cancelled at the same moment is given back.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from .errors import ByreError, MachineFailed
from .pool_member import Member


class Queue:
    """See the module."""

    def __init__(self) -> None:
        self._tickets: deque[asyncio.Future[Member]] = deque()

    def __len__(self) -> int:
        return len(self._tickets)

    def enter(self, again: bool = False) -> asyncio.Future[Member]:
        """A place in the queue, for `wait`; in front of it, for the second time."""
        ticket: asyncio.Future[Member] = asyncio.get_running_loop().create_future()
        (self._tickets.appendleft if again else self._tickets.append)(ticket)
        return ticket

    async def wait(self, ticket: asyncio.Future[Member]) -> Member:
        """Until `serve` or `turn_away` comes to this place."""
        try:
            return await ticket
        except asyncio.CancelledError:
            if not ticket.cancelled() and ticket.exception() is None:
                ticket.result().give_back()
            raise
        finally:
            if ticket in self._tickets:
                self._tickets.remove(ticket)

    def serve(self, next_one: Callable[[], Member | None]) -> None:
        """Give out VMs while somebody waits and there are any."""
        while self._tickets and (member := next_one()) is not None:
            ticket = self._tickets.popleft()
            if not ticket.done():
                ticket.set_result(member)
                member.take()

    def turn_away(self, error: Exception) -> None:
        """All who wait get this error."""
        while self._tickets:
            ticket = self._tickets.popleft()
            if not ticket.done():
                ticket.set_exception(again(error))


def again(error: Exception) -> Exception:
    """The same error for one more who waits: each has a traceback of its own."""
    if isinstance(error, ByreError):
        fresh: Exception = type(error)(error.message, hint=error.hint, **error.data)
    else:
        fresh = MachineFailed(f"no VM can be started: {error!r}")
    fresh.__cause__ = error
    return fresh
