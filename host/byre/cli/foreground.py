"""One command in the foreground: its streams on ours, our signals to it, its exit status as ours.

Rule: every wait ends.  The command's end ends it; so do `--timeout`, the third impatient signal, and the loss of
the VM.  The terminal is put back in each case.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, cast

from byre.errors import ByreError, DeadlineExceeded
from byre.run import DRAIN_GRACE, DRAIN_LIMIT

from . import terminal
from .passthrough import Output, pump_input
from .status import TIMED_OUT, say

if TYPE_CHECKING:
    import argparse

    from byre.cow import ExitStatus
    from byre.process import GuestProcess
    from byre.streams import BridgeReader

#: Signals that are passed on to the command.
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

#: Of these the second kills, whatever the command makes of the first, and the third no longer waits for that.
IMPATIENT = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)

#: How long a command that was killed may take to be gone, in seconds: the kernel frees its memory first.
KILL_TIMEOUT = 30.0


class Signals:
    """What we do with signals.  Until a command is there they end what is being prepared for it."""

    def __init__(self) -> None:
        self.last = 0
        self.enter_raw: Callable[[], None] | None = None
        self.resize: Callable[[], Coroutine[Any, Any, None]] | None = None
        self._deliver: Callable[[int], Awaitable[object]] | None = None
        self._kill: Callable[[], Awaitable[object]] | None = None
        self._impatience = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @contextlib.contextmanager
    def to(self, deliver: Callable[[int], Awaitable[object]], kill: Callable[[], Awaitable[object]]) -> Any:
        """In the context, signals go to a command; `kill` ends it with all that it started."""
        self._deliver, self._kill = deliver, kill
        try:
            yield
        finally:
            self._deliver = self._kill = None

    def install(self) -> None:
        """Take the signals from now on, for the current task."""
        loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        for number in FORWARDED:
            loop.add_signal_handler(number, self._on_signal, number)
        loop.add_signal_handler(signal.SIGWINCH, self._on_resize)
        loop.add_signal_handler(signal.SIGCONT, self._on_continued)

    def _on_signal(self, number: int) -> None:
        self.last = number
        self._impatience += number in IMPATIENT
        if self._deliver is None or self._kill is None or self._impatience > 2:
            assert self._task is not None
            self._task.cancel()
        elif self._impatience == 2 and number in IMPATIENT:
            self._spawn(self._kill())
        else:
            self._spawn(self._deliver(number))

    def _on_resize(self) -> None:
        if self.resize is not None:
            self._spawn(self.resize())

    def _on_continued(self) -> None:
        if self.enter_raw is not None:  # the shell had put its own settings back
            self.enter_raw()

    def _spawn(self, work: Awaitable[object]) -> None:
        async def quietly() -> None:
            with contextlib.suppress(ByreError):  # it has ended; its status tells
                await work

        task = asyncio.get_running_loop().create_task(quietly())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def run(command: Callable[[Signals], Coroutine[Any, Any, int]]) -> int:
    """Run the coroutine of a command, with our signals handled from its first step to its last."""

    # What the library logs is the guest's, or meant for programs: a command says what matters itself.
    logging.getLogger("byre").addHandler(logging.NullHandler())

    async def main() -> int:
        signals = Signals()
        signals.install()
        try:
            return await command(signals)
        except asyncio.CancelledError:
            if not signals.last:
                raise
            return 128 + signals.last

    return asyncio.run(main())


async def attach(
    process: GuestProcess,
    signals: Signals,
    arguments: argparse.Namespace,
    *,
    kill: Callable[[], Awaitable[object]],
    release: Callable[[], Awaitable[object]] | None = None,
) -> int:
    """Connect us with a process until its end, as `-i`, `-t` and `--timeout` say; its exit status.

    kill     ends it with all that it started
    release  lets an init run that waits for us to be connected
    """
    interactive, tty, timeout = arguments.interactive, arguments.tty, arguments.timeout
    outputs = [
        Output(cast("BridgeReader", stream), fd, close)
        for stream, fd, close in (
            (process.stdio.stdout, 1, process.close_stdout),
            (process.stdio.stderr, 2, process.close_stderr),
        )
        if stream is not None
    ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(signals.to(process.signal, kill))
        if tty:
            await _follow_size(process, signals)
        if interactive and tty:
            signals.enter_raw = stack.enter_context(terminal.raw(0))
        tasks = [asyncio.create_task(output.pump()) for output in outputs]
        if interactive and process.stdio.stdin is not None:
            tasks.append(asyncio.create_task(pump_input(0, process.stdio.stdin, process.close_stdin)))
        else:
            await process.close_stdin()
        try:
            if release is not None:
                await release()
            status, timed_out = await _wait(process, kill, timeout)
            await _drain(process, outputs, tasks, patient=not timed_out)
        finally:
            signals.enter_raw = signals.resize = None
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    for output in outputs:
        if output.error is not None:
            raise output.error
    return TIMED_OUT if timed_out else status.code


async def _wait(
    process: GuestProcess, kill: Callable[[], Awaitable[object]], timeout: float | None
) -> tuple[ExitStatus, bool]:
    """Its status, and whether it took our kill to end it."""
    limit = asyncio.timeout(timeout)
    try:
        async with limit:
            return await process.wait(), False
    except TimeoutError:
        if not limit.expired():
            raise
    say(f"killed after {timeout:g} s (--timeout)")
    await kill()
    try:
        async with asyncio.timeout(KILL_TIMEOUT):
            return await process.wait(), True
    except TimeoutError:
        raise DeadlineExceeded(
            f"the command was killed, and is not gone after {KILL_TIMEOUT:g} s", hint="end its VM: byre down"
        ) from None


async def _drain(
    process: GuestProcess, outputs: list[Output], tasks: list[asyncio.Task[None]], *, patient: bool
) -> None:
    """After the exit: what it had written comes out whole, however slow our reader is (if we are to be patient).

    A child that it left behind and that still holds the stream is listened to as `byre.run` does: until DRAIN_GRACE
    of silence, DRAIN_LIMIT at most.
    """
    loop = asyncio.get_running_loop()
    limit = loop.time() + DRAIN_LIMIT
    pumps = dict(zip(tasks, outputs, strict=False))  # after them in `tasks` may be that of our stdin
    while pending := [task for task in pumps if not task.done()]:
        seen = sum(output.moved for output in outputs)
        await asyncio.wait(pending, timeout=DRAIN_GRACE)
        silent = sum(output.moved for output in outputs) == seen
        busy = any(pumps[task].writing or process.missing(pumps[task].reader) for task in pending)
        if (silent and not busy) or (loop.time() > limit and not (busy and patient)):
            break
    for task in pumps:
        if task.done():
            task.result()  # raises when bytes are missing


async def _follow_size(process: GuestProcess, signals: Signals) -> None:
    """Keep its terminal at the size of ours, which may have changed since it was created."""

    async def resize() -> None:
        await process.resize_console(*terminal.size(1))

    signals.resize = resize
    await resize()
