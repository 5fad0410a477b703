"""Spans: on a timeline, to OpenTelemetry where the program has it, and nowhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest

from byre.timings import Timeline, age, span


def test_spans_stand_in_order_below_those_that_they_are_in() -> None:
    timeline = Timeline()
    with span("outer"):
        with span("first"):
            pass
        with pytest.raises(ValueError, match="mine"), span("second"):
            raise ValueError("mine")
    with span("after"):
        pass
    timeline.stop()
    with span("unseen"):
        pass
    names = [line[20:] for line in str(timeline).splitlines()[1:]]
    assert names == ["outer", "  first", "  second", "after"]
    starts = sorted(start for start, _, _ in timeline.spans)
    assert abs(age() - starts[0]) < 1


def test_the_age_of_this_process_grows_as_time_does() -> None:
    before, now = age(), time.monotonic()
    while time.monotonic() == now:
        pass
    assert 0 < age() - before < 1


def test_open_telemetry_gets_them_where_the_program_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Tracer:
        @contextmanager
        def start_as_current_span(self, name: str) -> Iterator[None]:
            seen.append(name)
            yield
            seen.append(f"end of {name}")

    trace = ModuleType("opentelemetry.trace")
    trace.get_tracer = lambda name: Tracer()  # type: ignore[attr-defined]
    with span("before"):
        pass
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", trace)
    with span("boot"), span("machine"):
        pass
    assert seen == ["boot", "machine", "end of machine", "end of boot"]
