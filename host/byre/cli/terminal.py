"""Our own terminal while a terminal inside is shown on it: raw, and put back whatever happens.

Rule: `raw` is the only place that changes the terminal, and it restores what it found, once.
"""

from __future__ import annotations

import contextlib
import os
import termios
import tty
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: What a terminal is taken to be when it does not say.
DEFAULT_SIZE = (80, 24)


def size(fd: int) -> tuple[int, int]:
    """Width and height in characters."""
    try:
        width, height = os.get_terminal_size(fd)
    except OSError:
        return DEFAULT_SIZE
    return (width, height) if width and height else DEFAULT_SIZE


@contextlib.contextmanager
def raw(fd: int) -> Iterator[Callable[[], None]]:
    """Raw mode in the context, where `fd` is a terminal; gives a function that enters it again (after SIGCONT)."""
    if not os.isatty(fd):
        yield lambda: None
        return
    before = termios.tcgetattr(fd)

    def enter() -> None:
        # What was typed ahead is kept (not TCSAFLUSH), output held by Ctrl-S not waited for (not TCSADRAIN).
        tty.setraw(fd, termios.TCSANOW)

    enter()
    try:
        yield enter
    finally:
        with contextlib.suppress(termios.error):  # the terminal is gone: nothing to restore
            termios.tcsetattr(fd, termios.TCSANOW, before)
