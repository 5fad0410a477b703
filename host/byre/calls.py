"""The calls of a bridge: each ends with an answer, a deadline, a cancellation and its verdict, or the loss.

Rule: a call that was given up is followed to its end, and undone when it had succeeded after all, so that nothing
half-done stays in the guest (B15).  The tidying outlives the task that asked for it.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from .errors import ByreError, ConnectionLost, DeadlineExceeded, ResourceExhausted

if TYPE_CHECKING:
    from byre_proto import events
    from byre_proto.session import Session

_log = logging.getLogger(__name__)

#: Deadline of a call that was given none, in seconds: a loaded guest under emulation takes its time, but no wait
#: is without an end.
CALL_TIMEOUT = 120.0

#: How long a cancelled call waits for the guest's verdict, in seconds (B15).  The tidying goes on after it.
CANCEL_GRACE = 4.0

#: How long taking something back is awaited that takes several calls, in seconds, while the guest says anything at
#: all.  A guest that is silent has CANCEL_GRACE for all of it, so that no call is overdue by much more.
TIDY_GRACE = 15.0

#: It is asked to say something when taking back takes longer than this, in seconds.
ASK_AFTER = 0.5

T = TypeVar("T")
Result = dict[str, Any]


class _Call(NamedTuple):
    future: asyncio.Future[Result]
    accept: Callable[[Result], None] | None


_VERDICTS = {True: "it had run, and was undone", False: "it had not run", None: "whether it ran is not known"}


class Calls(abc.ABC):
    """The half of `Bridge` that asks; the other half has the connection."""

    def __init__(self) -> None:
        self._calls: dict[int, _Call] = {}
        self._pings: dict[int, asyncio.Future[None]] = {}
        self._next_ping = 1
        self._silent_since: float | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    @abc.abstractmethod
    def session(self) -> Session:
        """The protocol's state."""

    @property
    @abc.abstractmethod
    def lost(self) -> ConnectionLost | None:
        """A fresh error that says why the connection is lost; None while it is not."""

    @abc.abstractmethod
    def flush_soon(self) -> None:
        """Send what is queued before the loop waits again: what one turn says goes out together."""

    def _check(self) -> None:
        error = self.lost
        if error is not None:
            raise error

    async def call(
        self,
        method: str,
        *,
        timeout: float | None = CALL_TIMEOUT,
        accept: Callable[[Result], None] | None = None,
        undo: Callable[[Result], Awaitable[object]] | None = None,
        **arguments: Any,
    ) -> Result:
        """Ask the guest and wait for its answer; raises the error that it answered with.

        accept  called at once with the answer, before any event that follows it is looked at
        undo    awaited with the answer of a call that was cancelled, or past its deadline, and yet succeeded

        Past `timeout` seconds: `DeadlineExceeded`, alone (B44).  With `undo`, its ``data["ran"]`` says whether the
        call had succeeded, False for no and None for unknown.  Cancelled: the guest is told, and its verdict
        awaited for CANCEL_GRACE, so that nothing half-done is left behind (B15).
        """
        self._check()
        number = self.session.request(method, arguments, timeout)
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._calls[number] = _Call(future, accept)
        self.flush_soon()
        try:
            done, _ = await asyncio.wait((future,), timeout=timeout)
        except asyncio.CancelledError as cancelled:
            ran = await self._abandon(number, future, undo)
            cancelled.add_note(f"{method}: {_VERDICTS[ran]}")
            raise
        if done:
            return future.result()
        if undo is None:
            self.session.forget(number)
            del self._calls[number]
            raise DeadlineExceeded(f"{method} was not answered within {timeout:g} s", method=method)
        ran = await self._abandon(number, future, undo)
        raise DeadlineExceeded(f"{method} was not done within {timeout:g} s", method=method, ran=ran)

    def post(self, method: str, **arguments: Any) -> None:
        """Ask for what needs no answer, such as giving something back.  Harmless when the connection is lost."""
        if self.lost is None:
            try:
                self.session.forget(self.session.request(method, arguments))
            except ResourceExhausted as error:
                _log.warning("! %s was not sent: %s", method, error)
            self.flush_soon()

    async def ping(self, timeout: float) -> float:
        """One round trip to the agent's loop, in seconds.  Raises `DeadlineExceeded`, `ConnectionLost`."""
        self._check()
        token, self._next_ping = self._next_ping, self._next_ping + 1
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pings[token] = future
        begin = time.perf_counter()
        self.session.ping(token)
        self.flush_soon()
        try:
            async with asyncio.timeout(timeout):
                await future
        except TimeoutError:
            raise DeadlineExceeded(f"no sign of life within {timeout:g} s") from None
        finally:
            self._pings.pop(token, None)
        return time.perf_counter() - begin

    def repeat_pings(self) -> None:
        """Over a new channel: unlike calls, they are not repeated by the session."""
        for token in self._pings:
            self.session.ping(token)

    async def _abandon(
        self, number: int, future: asyncio.Future[Result], undo: Callable[[Result], Awaitable[object]] | None
    ) -> bool | None:
        """Cancel a call: whether it had succeeded, None when that is not known in time."""
        if not future.done():
            self.session.cancel(number)
            self.flush_soon()
        return await self.finish(self._settle(future, undo), CANCEL_GRACE)

    async def finish(self, tidying: Coroutine[Any, Any, T], timeout: float = TIDY_GRACE) -> T | None:
        """Await `tidying`, which goes on when the awaiting task is cancelled (again), or after `timeout` seconds.

        Returns its result, None when it takes longer, or when the guest has been silent for CANCEL_GRACE since it
        was first asked for a sign of life: of several that are awaited one after the other, once.
        """
        task = self.background(tidying)
        now = asyncio.get_running_loop().time
        end = now() + timeout
        if self._silent_since is None:
            await asyncio.wait((task,), timeout=min(timeout, ASK_AFTER))
        while not task.done():
            until = end if self.lost is not None else min(end, self._ask_for_a_sign() + CANCEL_GRACE)
            if now() >= until:
                return None
            await asyncio.wait((task,), timeout=until - now())
        return task.result()

    def _ask_for_a_sign(self) -> float:
        """Since when the guest has been silent although it was asked to answer at once."""
        if self._silent_since is None:
            self._silent_since = asyncio.get_running_loop().time()
            self.session.ping(0)  # nobody's: any word will do
            self.flush_soon()
        return self._silent_since

    def heard(self) -> None:
        """The guest has said something."""
        self._silent_since = None

    async def _settle(
        self, future: asyncio.Future[Result], undo: Callable[[Result], Awaitable[object]] | None
    ) -> bool | None:
        try:
            result = await future
        except ConnectionLost:
            return None
        except ByreError:
            return False
        if undo is not None:
            with contextlib.suppress(ByreError):  # gone by itself, or with the connection
                await undo(result)
        return True

    def background(self, tidying: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """A task that `close` waits for."""
        task = asyncio.get_running_loop().create_task(tidying)
        self._tasks.add(task)
        task.add_done_callback(self._tidied)
        return task

    def _tidied(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.debug("! tidying: %r", task.exception())

    def lose_calls(self, error: Callable[[], ConnectionLost]) -> None:
        """The connection is lost: every call and ping ends, each with an error of its own."""
        for call in self._calls.values():
            _set_exception(call.future, error())
        self._calls.clear()
        for ping in self._pings.values():
            _set_exception(ping, error())

    def on_reply(self, event: events.ReplyReceived) -> None:
        call = self._calls.pop(event.call, None)
        if call is None:
            return
        if call.accept is not None:
            call.accept(event.result)
        if not call.future.done():
            call.future.set_result(event.result)

    def on_error(self, event: events.ErrorReceived) -> None:
        call = self._calls.pop(event.call, None)
        if call is not None:
            _set_exception(call.future, event.error)

    def on_pong(self, event: events.PongReceived) -> None:
        future = self._pings.get(event.token)
        if future is not None and not future.done():
            future.set_result(None)


def _set_exception(future: asyncio.Future[Any], error: Exception) -> None:
    """Fail a future that perhaps nobody awaits any longer, without asyncio's complaint about it."""
    if not future.done():
        future.set_exception(error)
        future.exception()
