"""What a guest or an emulator wrote lately, bounded: a flood costs nothing but its own oldest lines.

Rule: bytes come in from the machine's own thread, text goes out escaped.  Nothing here blocks or grows.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from byre_proto.errors import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: A kernel panic with its whole log is 30 to 60 kB.
RING_SIZE = 128 * 1024


class ConsoleRing:
    """The last `RING_SIZE` bytes; safe to use from any thread."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._lock = threading.Lock()
        self._watches: list[tuple[bytes, Callable[[], object]]] = []

    def feed(self, data: bytes) -> None:
        """Append; calls the watches whose text has now been seen, in this thread."""
        with self._lock:
            self._bytes += data
            due = [watch for watch in self._watches if watch[0] in self._bytes]
            del self._bytes[:-RING_SIZE]
            for watch in due:
                self._watches.remove(watch)
        for _, found in due:
            found()

    def tail(self, lines: int) -> str:
        """The last `lines` lines, escaped, without the carriage returns of a serial line."""
        with self._lock:
            text = self._bytes.decode("utf-8", "replace")
        return printable("\n".join(text.replace("\r\n", "\n").rstrip("\n").split("\n")[-lines:]))

    @contextmanager
    def watch(self, text: str, found: Callable[[], object]) -> Iterator[None]:
        """Within the context, call `found` once when `text` is in the ring, be it there already."""
        watch = (text.encode(), found)
        with self._lock:
            there = watch[0] in self._bytes
            if not there:
                self._watches.append(watch)
        if there:
            found()
        try:
            yield
        finally:
            with self._lock:
                if watch in self._watches:
                    self._watches.remove(watch)
