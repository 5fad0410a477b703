"""Copies of files that are mostly holes: the holes stay holes.

Rule: blocks, in the kernel (copy_file_range(2)), and without moving bytes where the file system lets files share
them; so it is for a thread, and `check`, which is called all along, ends it by what it raises.  Source: lseek(2).
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: Copied at once: a cancellation waits for no more than this.
PIECE = 1024 * 1024

#: Past the end of any file.
_NOWHERE = 1 << 62


def copy(source: int, target: int, check: Callable[[], None]) -> None:
    """Make an empty file what another one is; both are descriptors.  Raises OSError, and
    EOFError where it is cut off."""
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    for start, end in _data(source, size):
        while start < end:
            check()
            copied = os.copy_file_range(source, target, min(end - start, PIECE), start, start)
            if not copied:
                raise EOFError("the file was cut off while it was copied")
            start += copied


def next_data(file: int, at: int) -> int:
    """Where the first byte that is in no hole is, from here on; past the end of any file, where there is none."""
    try:
        return os.lseek(file, at, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return _NOWHERE


def _data(file: int, size: int) -> Iterator[tuple[int, int]]:
    """The parts of a file that are no holes."""
    end = 0
    while (start := next_data(file, end)) < size:
        end = os.lseek(file, start, os.SEEK_HOLE)
        yield start, end
