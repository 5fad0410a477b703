"""`true`, warm: in the VM against fork + exec + wait inside the guest, and in a container beside `crun exec`."""

from __future__ import annotations

import time
from typing import Any

import byre

from .images import busybox
from .report import Report, median, percentile

#: Runs inside the guest's own Python: what the machine underneath asks for a process.
INSIDE = """
import os, time
times = []
for _ in range(%d):
    start = time.perf_counter()
    os.waitpid(os.posix_spawn(%r, %r, os.environ), 0)
    times.append(time.perf_counter() - start)
times.sort()
print(times[len(times) // 2])
"""

TARGET = "<= 3"

#: Ours and the yardstick take turns this often: what else is on the machine then meets both.
TURNS = 5


async def inside(vm: Any, argv: list[str], runs: int) -> float:
    """Median seconds of posix_spawn + wait of `argv` in the guest."""
    script = INSIDE % (runs, argv[0], argv)
    result = await vm.run(["/usr/bin/python3", "-c", script], capture_output=True, check=True, timeout=300)
    return float(result.stdout)


async def outside(host: Any, runs: int) -> list[float]:
    """Seconds of each `true` through byre."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        result = await host.run(["true"])
        times.append(time.perf_counter() - start)
        assert result.returncode == 0
    return times


async def run(runs: int) -> Report:
    async with byre.UtilityVM() as vm:
        await outside(vm, 20)
        bares: list[float] = []
        ours: list[float] = []
        for _ in range(TURNS):
            bares.append(await inside(vm, ["/usr/bin/true"], runs * 4))
            ours += await outside(vm, runs * 4)
        bare = median(bares)
    figures = {"exec_median_ms": median(ours) * 1e3, "exec_p95_ms": percentile(ours, 95) * 1e3}
    figures["posix_spawn_and_wait_inside_ms"] = bare * 1e3
    return Report(name="exec", runs=len(ours), ratio=median(ours) / bare, target=TARGET, figures=figures)


async def run_in_container(runs: int) -> Report:
    with busybox() as image:
        async with (
            byre.UtilityVM() as vm,
            await vm.create_container(image=image, args=["sleep", "infinity"]) as container,
        ):
            await container.start()
            await outside(container, 3)
            crun = ["/usr/bin/crun", "--root", "/run/crun", "exec", container.id, "true"]
            bare = await inside(vm, crun, runs * 2)
            ours = await outside(container, runs * 4)
    figures = {"exec_median_ms": median(ours) * 1e3, "crun_exec_inside_ms": bare * 1e3}
    return Report(name="exec-container", runs=len(ours), ratio=median(ours) / bare, figures=figures)
