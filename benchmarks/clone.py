"""A clone of a template, to its first exec's output: against a boot, against a bare clone, and from the shell."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path

import byre
import byre_images

from . import floor
from .report import Report, median

TARGET = "<= 0.05"
TARGET_ECHO = "<= 2"

#: Clones alive while their memory is measured: what they share is shared by so many.
ALIVE = 8

#: Seconds of doing nothing before that.
IDLE = 2.0


async def first_output(template: str) -> float:
    """Seconds from nothing to the first exec's output."""
    started = time.perf_counter()
    async with byre.UtilityVM(template=template) as vm:
        result = await vm.run(["echo", "first"], capture_output=True)
        taken = time.perf_counter() - started
        assert result.stdout == b"first\n"
        how = (await vm.info())["machine"]["template"]
        assert how.startswith("none") == (template == "off"), how
    return taken


async def run(runs: int) -> Report:
    await first_output("auto")  # which makes the template
    boots, clones = [], []
    for _ in range(runs):
        boots.append(await first_output("off"))
        clones += [await first_output("auto") for _ in range(3)]
    shares = await proportional_set_sizes()
    figures = {"boot_to_first_output_s": median(boots), "clone_to_first_output_s": median(clones)}
    figures |= {"slowest_clone_s": max(clones), "idle_clone_pss_mb": median(shares)}
    ratio = median(clones) / median(boots)
    return Report(name="clone", runs=len(clones), ratio=ratio, target=TARGET, figures=figures)


async def proportional_set_sizes() -> list[float]:
    """MB of memory of each of ALIVE clones that have done nothing; what they share is divided among them."""
    async with contextlib.AsyncExitStack() as stack:
        vms = [await stack.enter_async_context(byre.UtilityVM()) for _ in range(ALIVE)]
        await asyncio.sleep(IDLE)
        return [proportional_set_size(vm.machine_pid) for vm in vms]


def proportional_set_size(pid: int) -> float:
    """MB; proc(5): /proc/PID/smaps_rollup."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024 / 1e6


async def run_echo(runs: int) -> Report:
    await first_output("auto")
    ours: list[float] = []
    bare: dict[str, list[float]] = {name: [] for name in floor.MACHINES}
    with tempfile.TemporaryDirectory(prefix="byre-floor-") as directory:
        saved = {name: floor.Saved(byre_images.ensure(), name, Path(directory)) for name in bare}
        for each in saved.values():
            await each.save()
        for _ in range(runs * 3):  # in turn, so that a slow moment of the machine meets all of them
            for name, times in bare.items():
                times.append(await saved[name].clone_and_echo())
            ours.append(await first_output("auto"))
    medians = {name: median(times) for name, times in bare.items()}
    figures = {f"bare_clone_{name}_s": value for name, value in medians.items()}
    figures |= {"clone_to_first_output_s": median(ours), "slowest_s": max(ours)}
    ratio = median(ours) / min(medians.values())
    return Report(name="echo", runs=len(ours), ratio=ratio, target=TARGET_ECHO, figures=figures)


async def run_command(runs: int) -> Report:
    """`byre run --vm -- true` as the shell sees it, Python's own start included."""
    times = []
    command = (sys.executable, "-m", "byre", "run", "--vm", "--fresh", "--", "true")
    with tempfile.TemporaryDirectory(prefix="byre-bytecode-") as bytecode:
        # An installed package is compiled; the first run, which may make the template too, does that here.
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": bytecode, "PYTHONDONTWRITEBYTECODE": ""}
        for _ in range(runs + 1):
            started = time.perf_counter()
            process = await asyncio.create_subprocess_exec(*command, env=environment)
            assert await process.wait() == 0
            times.append(time.perf_counter() - started)
    figures = {"median_s": median(times[1:]), "fastest_s": min(times[1:]), "slowest_s": max(times[1:])}
    return Report(name="cli", runs=runs, target="<= 0.4 s", figures=figures)
