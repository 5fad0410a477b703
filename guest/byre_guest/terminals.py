"""Pseudo-terminals: made with their size, resized, ended.

Rule: the size is set before the program starts, so that its first look is right (B15c).  Everything else about a
terminal (its output, EIO as end of file) is a pump's work.  Source: pty(7), tty_ioctl(4), termios(3).
"""

from __future__ import annotations

import os
import struct
from fcntl import ioctl

from byre_proto.errors import InvalidRequest

#: Rows and columns of a terminal whose size nobody gave: what a VT100 has.
DEFAULT_WIDTH = 80
DEFAULT_HEIGHT = 24

#: struct winsize has unsigned shorts.
MAX_SIZE = 0xFFFF

#: Index of the control characters in what tcgetattr(3) returns, and of the local modes.
_CC = 6
_LFLAG = 3


def open_terminal(width: int, height: int) -> tuple[int, int]:
    """`(master, slave)`, both close-on-exec, of the size given (0: the default).  Raises `InvalidRequest`."""
    master, slave = os.openpty()
    try:
        resize(master, width or DEFAULT_WIDTH, height or DEFAULT_HEIGHT)
    except BaseException:
        os.close(master)
        os.close(slave)
        raise
    return master, slave


def resize(master: int, width: int, height: int) -> None:
    """Set the size in characters; the foreground programs get SIGWINCH.  Raises `InvalidRequest`."""
    if not (0 < width <= MAX_SIZE and 0 < height <= MAX_SIZE):
        raise InvalidRequest(
            f"a terminal of {width} x {height} characters is not possible", hint=f"give 1 to {MAX_SIZE} of each"
        )
    import termios  # in each function that needs it: most VMs never have a terminal

    ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))


def make_controlling(slave: int) -> None:
    """In a new session's leader: make `slave` its controlling terminal."""
    import termios

    ioctl(slave, termios.TIOCSCTTY, 0)


def end_of_file(master: int, last: bytes) -> bytes:
    """What a user would type to end the input, after the byte `last`.

    In canonical mode the character ends a *read*: after an unfinished line the first one only hands it over, and
    a second one is the end of the file.  A program in raw mode sees the character itself, as when typed.
    """
    import termios

    modes = termios.tcgetattr(master)
    character: bytes = modes[_CC][termios.VEOF]
    if modes[_LFLAG] & termios.ICANON and last not in (b"", b"\n", b"\r", character):
        return character * 2
    return character
