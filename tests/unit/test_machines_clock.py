"""The counter's rate is measured and doubted."""

from __future__ import annotations

import platform

import pytest

from byre.machines import clock


def test_two_that_agree_are_believed() -> None:
    values = iter([2_500_000.0, 2_596_100.0, 2_596_140.0])
    assert clock.agreed_rate(lambda: next(values)) == 2_596_120


def test_a_rate_that_drifts_is_no_rate() -> None:
    values = iter(range(1_000_000, 2_000_000, 1000))
    assert clock.agreed_rate(lambda: float(next(values))) is None


def test_no_number_without_a_constant_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "cpu_flags", lambda: frozenset({"tsc"}))
    assert clock.tsc_khz.__wrapped__() is None


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the counter is x86's")
def test_this_hosts_counter_is_measured_alike_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "cpu_flags", lambda: frozenset({"constant_tsc", "nonstop_tsc"}))
    first, second = clock.tsc_khz.__wrapped__(), clock.tsc_khz.__wrapped__()
    assert first and second
    assert abs(first - second) <= 2 * clock._AGREEMENT * first
