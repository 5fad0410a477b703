"""Spans: which step of a start took how long.

    with span("boot"): ...

They go to OpenTelemetry's API where the program has imported it (it is no dependency, and not imported here: that
would cost those who have it and trace nothing), and to a `Timeline` while there is one.

Rule: where nobody looks, a span costs two clock readings at most, and it changes nothing about errors.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: The tracer's name, as OpenTelemetry has it for a library.
TRACER = "byre"


class Timeline:
    """Collects the spans of this process, all tasks together, until `stop`.  Times are seconds since its start."""

    def __init__(self) -> None:
        self.spans: list[tuple[float, float, str]] = []  # start, end, name
        self._zero = time.monotonic() - age()
        _timelines.append(self)

    def add(self, name: str, start: float, end: float) -> None:
        """A span by the monotonic clock."""
        self.spans.append((start - self._zero, end - self._zero, name))

    def stop(self) -> None:
        """Collect no more."""
        _timelines.remove(self)

    def __str__(self) -> str:
        """A line for each span, by its start: when, how long (ms), name; indented below the one that it is in."""
        lines, open_until = ["   start      took"], list[float]()
        for start, end, name in sorted(self.spans, key=lambda span: (span[0], -span[1])):
            open_until = [until for until in open_until if until > start]
            lines.append(f"{start * 1000:8.1f} {(end - start) * 1000:9.1f}  {'  ' * len(open_until)}{name}")
            open_until.append(end)
        return "\n".join(lines)


_timelines: list[Timeline] = []


@contextmanager
def span(name: str) -> Iterator[None]:
    """What is done within it is one step, called so."""
    trace = sys.modules.get("opentelemetry.trace")
    if trace is not None:
        with trace.get_tracer(TRACER).start_as_current_span(name), _timed(name):
            yield
    else:
        with _timed(name):
            yield


@contextmanager
def _timed(name: str) -> Iterator[None]:
    start = time.monotonic()
    try:
        yield
    finally:
        end = time.monotonic()
        for timeline in _timelines:
            timeline.add(name, start, end)


def age() -> float:
    """Seconds since this process was started, to a clock tick (10 ms): proc(5), starttime of /proc/self/stat."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
