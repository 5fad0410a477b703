"""The rate of this host's time-stamp counter, measured: a microvm under emulation has nothing to learn it from.

QEMU's emulator passes the host's counter through, and microvm has neither PM timer nor HPET to calibrate it
against, so one boot in three hangs unless the kernel is told `tsc_early_khz`.  A wrong number makes the guest's
clock run wrong; so no number is better than a doubtful one, and the caller then takes a machine with more clocks.

Rule: measured against CLOCK_MONOTONIC_RAW, twice, and believed only if both agree.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

#: rdtsc; shl rdx, 32; or rax, rdx; ret
_RDTSC = bytes.fromhex("0f31 48c1e220 4809d0 c3")
#: One measurement, in seconds.  Reading both clocks takes 0.3 us, so 20 ms give about 15 ppm at worst.
_WINDOW = 0.02
#: Readings of which the tightest counts: what was interrupted between the clocks is thrown away.
_READINGS = 16
#: The two measurements differ by at most this, relative.  NTP slews a guest's clock by up to 500 ppm.
_AGREEMENT = 100e-6
#: For `rough_tsc_khz`, which has to tell one processor's rate from another's: a tenth of the time, and of the care.
_ROUGH_WINDOW = 0.002
ROUGH_AGREEMENT = 1000e-6
_ATTEMPTS = 5


def cpu_flags() -> frozenset[str]:
    """The first CPU's flags of /proc/cpuinfo; empty where there are none."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "flags":
                return frozenset(value.split())
    except OSError:
        pass
    return frozenset()


@functools.cache
def tsc_khz() -> int | None:
    """The time-stamp counter's rate in kHz; None if it is not constant or cannot be measured (40 ms, once)."""
    return _rate(_WINDOW, _AGREEMENT)


@functools.cache
def rough_tsc_khz() -> int | None:
    """`tsc_khz` within ROUGH_AGREEMENT (5 ms, once): enough to know the host of a template again."""
    return _rate(_ROUGH_WINDOW, ROUGH_AGREEMENT)


def _rate(window: float, agreement: float) -> int | None:
    if platform.machine() != "x86_64" or not {"constant_tsc", "nonstop_tsc"} <= cpu_flags():
        return None
    try:
        with _machine_code(_RDTSC) as read:
            return agreed_rate(lambda: _measure(read, window), agreement)
    except OSError:  # a host that forbids new executable pages
        return None


def agreed_rate(measure: Callable[[], float], agreement: float = _AGREEMENT) -> int | None:
    """The mean of two successive measurements that agree, rounded; None if there are none."""
    previous = measure()
    for _ in range(_ATTEMPTS):
        current = measure()
        if abs(current - previous) <= agreement * current:
            return round((current + previous) / 2)
        previous = current
    return None


def _measure(read: Callable[[], int], window: float) -> float:
    start_time, start = _reading(read)
    time.sleep(window)
    end_time, end = _reading(read)
    return (end - start) * 1e6 / (end_time - start_time)


def _reading(read: Callable[[], int]) -> tuple[float, int]:
    """(ns, ticks) at the same moment."""
    tightest, found = None, (0.0, 0)
    for _ in range(_READINGS):
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        ticks = read()
        after = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        if tightest is None or after - before < tightest:
            tightest, found = after - before, ((before + after) / 2, ticks)
    return found


class _machine_code:
    """Within the context, `code` as a function without arguments; its page is never writable and executable."""

    def __init__(self, code: bytes) -> None:
        self._code = code

    def __enter__(self) -> Callable[[], int]:
        libc = ctypes.CDLL(None, use_errno=True)
        self._page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._page.write(self._code)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._page))
        mprotect = libc.mprotect
        mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        if mprotect(address, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_EXEC):
            raise OSError(ctypes.get_errno(), "mprotect")
        return ctypes.CFUNCTYPE(ctypes.c_uint64)(address)

    def __exit__(self, *_: object) -> None:
        self._page.close()
