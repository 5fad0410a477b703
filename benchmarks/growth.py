"""Ten thousand execs in one VM: whether the last ones take longer, or more memory, than the first."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path

import byre

from .report import Report, median

TARGET = "<= 1.1"

EXECS = 10_000

#: Compared at each end.
WINDOW = 100

#: Execs before the first window: the emulator translates code that has not run yet, and caches fill.
WARM = 200


async def run(runs: int) -> Report:
    """`runs` is not used: 10,000 is often enough."""
    times: list[float] = []
    async with byre.UtilityVM() as vm:
        for number in range(WARM + EXECS):
            if number == WARM:
                before = await memory(vm)
            started = time.perf_counter()
            await vm.run(["true"], check=True)
            if number >= WARM:
                times.append(time.perf_counter() - started)
        after = await memory(vm)
    first, last = median(times[:WINDOW]), median(times[-WINDOW:])
    figures = {"first_ms": first * 1000, "last_ms": last * 1000}
    for name, old, new in zip(("agent", "host"), before, after, strict=True):
        figures |= {f"{name}_before_mib": old, f"{name}_grown_mib": new - old}
    return Report(name="growth", runs=EXECS, ratio=last / first, target=TARGET, figures=figures)


async def memory(vm: byre.UtilityVM) -> tuple[float, float]:
    """MiB of memory of the agent, and of this process."""
    gc.collect()
    text = (await vm.run(["cat", "/proc/1/statm"], capture_output=True, text=True, check=True)).stdout
    return resident(text), own_memory()


def own_memory() -> float:
    """MiB."""
    return resident(Path("/proc/self/statm").read_text())


def resident(statm: str) -> float:
    """MiB; proc(5): the second number of /proc/PID/statm is in pages."""
    return int(statm.split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1024**2
