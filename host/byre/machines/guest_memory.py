"""A guest's memory, read from outside its emulator: what the machine began with, and what was written since.

    began with   a file that is mapped privately (`Saved.memory`), or nothing but zeros
    written      the pages that the emulator's process has of its own: /proc/PID/pagemap, /proc/PID/mem

Rule: the emulator is only read, and is hostile input, as its guest is: what it says of its memory leads to a wrong
copy or an error, and nowhere else.  The kernel lets read whoever may trace the process, as its parent may where
Yama's ptrace_scope is 0 or 1.  Source: proc(5), Documentation/admin-guide/mm/pagemap.rst, lseek(2) on holes.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from byre import sparse
from byre.errors import MachineFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PAGE = 4096

#: In the last byte of an entry of the page map: the page is in memory, or swapped; it is the file's, not its own.
_PRESENT, _SWAPPED, _OF_FILE = 0x80, 0x40, 0x20
_ENTRY = 8
_OWN = bytes(bool(flags & (_PRESENT | _SWAPPED) and not flags & _OF_FILE) for flags in range(256))

#: Entries of the page map read at once: those of 512 MiB.
_ENTRIES = 128 * 1024

#: QEMU's monitor says: Host virtual address for 0x0 (memory0) is 0x7f49d7fff000
_ADDRESS = re.compile(r" is 0x([0-9a-f]{1,16})\s*\Z")


def parse_address(answer: object) -> int:
    """Where the guest's memory is in the emulator, from its answer to `gpa2hva 0`.  Raises `MachineFailed`."""
    found = _ADDRESS.search(answer) if isinstance(answer, str) else None
    if found is None:
        raise MachineFailed("QEMU does not say where its guest's memory is")
    return int(found[1], 16)


def copy_base(base: int, target: int, check: Callable[[], None]) -> None:
    """Copy what is no hole from one file to another.  `check`: see `sparse`."""
    try:
        sparse.copy(base, target, check)
    except EOFError as error:
        raise MachineFailed("the memory that the machine began with was cut off") from error


def copy_written(pid: int, address: int, size: int, target: int, check: Callable[[], None]) -> int:
    """Copy what was written since the machine began to its place in a file; bytes.  Zeros in holes stay holes.

    The machine is stopped, and `size` bytes of memory are at `address` of its emulator.
    """
    copied = 0
    os.ftruncate(target, size)
    buffer = memoryview(bytearray(sparse.PIECE))
    zeros = bytes(sparse.PIECE)
    memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for start, end in _written(pid, address, size):
            for at in range(start, end, sparse.PIECE):
                check()
                piece = buffer[: min(sparse.PIECE, end - at)]
                if os.preadv(memory, [piece], address + at) != len(piece):
                    raise MachineFailed("a part of the guest's memory could not be read")
                if piece != zeros[: len(piece)] or sparse.next_data(target, at) < at + len(piece):
                    os.pwrite(target, piece, at)
                copied += len(piece)
    finally:
        os.close(memory)
    return copied


def _written(pid: int, address: int, size: int) -> Iterator[tuple[int, int]]:
    """Runs of pages that are the process's own, as offsets into its guest's memory."""
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        for first in range(0, size // PAGE, _ENTRIES):
            count = min(_ENTRIES, size // PAGE - first)
            entries = os.pread(pagemap.fileno(), count * _ENTRY, (address // PAGE + first) * _ENTRY)
            if len(entries) != count * _ENTRY:
                raise MachineFailed("the guest's memory is not where QEMU says that it is")
            own = entries[_ENTRY - 1 :: _ENTRY].translate(_OWN)
            for run in re.finditer(b"\x01+", own):
                yield (first + run.start()) * PAGE, (first + run.end()) * PAGE
