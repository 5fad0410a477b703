"""A descriptor kept for what must be possible when there is no other: to kill, to see who lives, to read why.

    with reserve.LENT:    inside, one file at a time can be opened, used and closed

Without it the agent could neither end what it has started nor answer for it, where its descriptors ran out.

Rule: for the agent's loop, within one callback.  What needs several files at once fails, with an error.
"""

from __future__ import annotations

import os


class _Reserve:
    """See the module's text.  Entering it when it is out already is harmless."""

    def __init__(self) -> None:
        self._fd = -1

    def keep(self) -> None:
        """Have it from now on.  Raises OSError."""
        if self._fd < 0:
            self._fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def forget(self) -> None:
        """In a forked child, which closes all that it inherits: its number may be another file's by then."""
        self._fd = -1

    def __enter__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __exit__(self, *_exception: object) -> None:
        try:
            self.keep()
        except OSError:
            pass  # its place was taken: the next one to be lent it tries again


LENT = _Reserve()
os.register_at_fork(after_in_child=LENT.forget)
