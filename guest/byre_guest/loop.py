"""One epoll loop for everything the agent waits for: descriptors, timers, and work for the end of a round.

Rule: nothing that it calls may block.  What may (a file system, a mount, a lookup) goes to `children.run`.

A callback gets the mask of events.  It must bear being called for nothing: when a descriptor is removed and its
number used again within one round, the new owner may see the old one's event.  An exception of a callback is
handed to `on_error` and the loop goes on.  The loop sleeps until something happens: no timer, no wake-up.
"""

from __future__ import annotations

import _heapq as heapq  # without what the standard library adds in Python
import select
from time import monotonic

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

EPOLLIN = select.EPOLLIN
EPOLLOUT = select.EPOLLOUT
EPOLLERR = select.EPOLLERR
EPOLLHUP = select.EPOLLHUP
EPOLLRDHUP = select.EPOLLRDHUP
EPOLLET = select.EPOLLET
EPOLLPRI = select.EPOLLPRI

#: Events taken per round: small enough that the channel is served often while many processes are busy.
MAX_EVENTS = 64

#: Seconds of quiet after which the loop sleeps soundly: to lift the watch over it and to set it again costs time.
DOZE = 1.0

#: Timers kept before the cancelled ones are looked for: most deadlines are cancelled long before they are due.
MIN_TIMERS = 64


def _ignore(*_arguments: object) -> None:
    """What the hooks are until someone sets them."""


class Timer:
    """A call that is due at `when` (monotonic seconds)."""

    __slots__ = ("callback", "when")

    def __init__(self, when: float, callback: Callable[[], object]) -> None:
        self.when = when
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        """Never call it.  Harmless when repeated or too late."""
        self.callback = None

    def __lt__(self, other: Timer) -> bool:
        return self.when < other.when


class Loop:
    """See the module's text."""

    def __init__(self, on_error: Callable[[Exception], object]) -> None:
        self._on_error = on_error
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[int], object]] = {}
        self._timers: list[Timer] = []
        self._most_timers = MIN_TIMERS
        self._soon: list[Callable[[], object]] = []
        self._running = False
        #: Called when all callbacks of a round are done.
        self.end_round: Callable[[], object] = _ignore
        #: Called with True when a round begins and with False before the loop sleeps for long.
        self.watch_over: Callable[[bool], object] = _ignore

    def add(self, fd: int, mask: int, callback: Callable[[int], object]) -> None:
        """Call `callback(mask)` when `fd` has one of the events; EPOLLHUP and EPOLLERR always count."""
        self._epoll.register(fd, mask)
        self._callbacks[fd] = callback

    def modify(self, fd: int, mask: int) -> None:
        """Wait for other events on `fd`."""
        self._epoll.modify(fd, mask)

    def remove(self, fd: int) -> None:
        """Forget `fd`; call it before closing it.  Harmless when it is not known."""
        if self._callbacks.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def call_later(self, seconds: float, callback: Callable[[], object]) -> Timer:
        """Call it once, `seconds` from now."""
        timer = Timer(monotonic() + seconds, callback)
        if len(self._timers) >= self._most_timers:
            self._timers = [kept for kept in self._timers if kept.callback is not None]
            heapq.heapify(self._timers)
            self._most_timers = max(MIN_TIMERS, 2 * len(self._timers))
        heapq.heappush(self._timers, timer)
        return timer

    def call_soon(self, callback: Callable[[], object]) -> None:
        """Call it once, after the callbacks of this round (and of another one before it, if events wait)."""
        self._soon.append(callback)

    def guarded(self, call: Callable[[], object]) -> None:
        """Call it now; an exception of it keeps nothing else from being done."""
        try:
            call()
        except Exception as error:
            self._on_error(error)

    def stop(self) -> None:
        """Make `run` return after this round."""
        self._running = False

    def run(self) -> None:
        """Serve until `stop`."""
        self._running = True
        self._round([])
        while self._running:
            events = self._wait()
            self.watch_over(True)
            self._round(events)

    def close(self) -> None:
        """Release the epoll descriptor."""
        self._epoll.close()

    def _wait(self) -> list[tuple[int, int]]:
        """The next events.  Before a long sleep, and only then, nobody needs to watch over the loop any more."""
        patience = self._patience()
        if 0 <= patience <= DOZE:
            return self._epoll.poll(patience, MAX_EVENTS)
        events = self._epoll.poll(DOZE, MAX_EVENTS)
        if not events:
            self.watch_over(False)
            events = self._epoll.poll(self._patience(), MAX_EVENTS)
        return events

    def _patience(self) -> float:
        """Seconds to sleep: until the next timer, 0 when work waits, -1 for ever."""
        if self._soon:
            return 0
        timers = self._timers
        while timers and timers[0].callback is None:
            heapq.heappop(timers)
        return max(0.0, timers[0].when - monotonic()) if timers else -1

    def _round(self, events: list[tuple[int, int]]) -> None:
        callbacks = self._callbacks
        for fd, mask in events:
            callback = callbacks.get(fd)
            if callback is not None:
                try:
                    callback(mask)
                except Exception as error:
                    self._on_error(error)
        if self._timers:
            self._run_timers()
        soon, self._soon = self._soon, []
        for call in soon:
            self.guarded(call)
        self.guarded(self.end_round)

    def _run_timers(self) -> None:
        now = monotonic()
        while self._timers and self._timers[0].when <= now:
            callback = heapq.heappop(self._timers).callback
            if callback is not None:
                self.guarded(callback)
