"""Log lines of a guest through `logging`, at a rate that a hostile guest cannot raise (B50).

Rule: the text is data: never a format string, and control characters are escaped before they come here.
"""

from __future__ import annotations

import logging
import time

#: Lines per second, and at once, that reach `logging`: a busy kernel boots with fewer; handlers that write to a
#: file or a terminal keep up with them.
LINES_PER_SECOND = 500
BURST = 2000

# A library says nothing unless its user asks for it (logging's HOWTO, "Configuring Logging for a Library").
logging.getLogger("byre").addHandler(logging.NullHandler())

LEVELS = range(logging.DEBUG, logging.CRITICAL + 1)


class GuestLog:
    """The logger ``byre.guest.<label>``; lines over the rate are counted and the count is shown."""

    def __init__(self, label: str) -> None:
        self._logger = logging.getLogger(f"byre.guest.{label}" if label else "byre.guest")
        self._allowed = float(BURST)
        self._filled = time.monotonic()
        self._dropped = 0

    def emit(self, source: str, level: int, message: str, dropped: int) -> None:
        """One line; `dropped` lines before it were lost in the guest."""
        self._dropped += max(0, dropped)
        now = time.monotonic()
        self._allowed = min(BURST, self._allowed + (now - self._filled) * LINES_PER_SECOND)
        self._filled = now
        if self._allowed < 1:
            self._dropped += 1
            return
        self._allowed -= 1
        level = level if level in LEVELS else logging.INFO
        if self._dropped:
            self._logger.warning("%d lines of the guest's log were dropped", self._dropped)
            self._dropped = 0
        self._logger.log(level, "%s: %s", source, message)
