"""Many clones alive at once, each of which answers: what one that idles costs in memory and processor time."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from pathlib import Path

import byre

from .clone import first_output, proportional_set_size
from .report import Report, median

TARGET = "<= 20 MB each"

#: Started at once: as many as there are processors to start them.
AT_ONCE = os.cpu_count() or 1

#: Seconds in which they idle, after as many to fall quiet.
IDLE = 10.0


async def run(vms: int) -> Report:
    await first_output("auto")  # which makes the template
    started = time.perf_counter()
    async with contextlib.AsyncExitStack() as stack:
        machines = await start(vms)
        for vm in machines:
            stack.push_async_callback(vm.close)
        up = time.perf_counter() - started
        await asyncio.sleep(IDLE)
        before, now = sum(map(processor_time, machines)), time.perf_counter()
        await asyncio.sleep(IDLE)
        idle = (sum(map(processor_time, machines)) - before) / (time.perf_counter() - now) / vms
        shares = [proportional_set_size(vm.machine_pid) for vm in machines]
        answers = [await answer(vm) for vm in machines]
    figures = {"vms": float(vms), "started_per_s": vms / up, "idle_percent_of_a_core_each": idle * 100}
    figures |= {"pss_mb_each": median(shares), "slowest_answer_s": max(answers), "answer_s": median(answers)}
    return Report(name="density", runs=vms, target=TARGET, figures=figures)


async def start(vms: int) -> list[byre.UtilityVM]:
    """That many clones, all running; this program's end ends them."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def one() -> byre.UtilityVM:
        async with gate:
            vm = byre.UtilityVM()
            await vm.start()
            return vm

    return await asyncio.gather(*(one() for _ in range(vms)))


async def answer(vm: byre.UtilityVM) -> float:
    """Seconds of an exec."""
    started = time.perf_counter()
    assert (await vm.run(["echo", "alive"], capture_output=True)).stdout == b"alive\n"
    return time.perf_counter() - started


def processor_time(vm: byre.UtilityVM) -> float:
    """Seconds that the emulator has used; proc(5): utime and stime of /proc/PID/stat."""
    fields = Path(f"/proc/{vm.machine_pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
