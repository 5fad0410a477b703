"""What a bridge whose channel was cut waits for: another channel, the news that there will be none, or the time.

Rule: it knows nothing of channels and sessions; it makes attempts, one after the other, and ends with one answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from byre_proto.connection import ChannelEnded

from .errors import ByreError, ConnectionLost

#: Between two attempts to carry a session on, growing from the first to the second, and for each of them; seconds.
REDIAL_PAUSE = (0.01, 1.0)
REDIAL_TIMEOUT = 10.0


async def until_open(attempt: Callable[[], Awaitable[None]]) -> None:
    """Make attempts until one succeeds.  Raises the ByreError that says why the session cannot go on.

    An attempt that fails for now raises OSError, or `ChannelEnded`, and has tidied up.
    """
    pause, longest = REDIAL_PAUSE
    while True:
        try:
            async with asyncio.timeout(REDIAL_TIMEOUT):
                await attempt()
            return
        except OSError as error:
            if isinstance(error, ByreError) and not isinstance(error, ChannelEnded):
                raise
        await asyncio.sleep(pause)
        pause = min(2 * pause, longest)


async def why_not(coming: Awaitable[None], ending: Awaitable[str] | None, seconds: float) -> Exception:
    """Wait for `coming`, for the explanation that makes it vain, or for so many seconds.

    Returns what stood in the way; when `coming` has come, nobody asks.
    """
    tasks = [asyncio.ensure_future(coming)]
    if ending is not None:
        tasks.append(asyncio.ensure_future(_raised(ending)))
    try:
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        errors = [task.exception() for task in tasks if not task.cancelled()]
    found = [error for error in errors if isinstance(error, Exception)]
    late = f"the channel to the guest ended, and no other one came within {seconds:g} s"
    return found[-1] if found else ConnectionLost(late)


async def _raised(explanation: Awaitable[str]) -> None:
    raise ConnectionLost(await explanation)
