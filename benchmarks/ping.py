"""A control round trip, idle and while a stream runs at full load.  The ratio is p95 under load over 10 ms."""

from __future__ import annotations

import asyncio
from typing import Any

import byre
from byre import ProcessParameters

from .report import Report, percentile

TARGET = "p95 under load <= 10 ms"
LIMIT_S = 0.010


async def pings(vm: Any, count: int) -> list[float]:
    """Seconds of each round trip, one at a time, spread so that none meets the other."""
    times = []
    for _ in range(count):
        times.append(await vm.bridge.ping(10))
        await asyncio.sleep(0.002)
    return times


async def run(runs: int) -> Report:
    figures = {}
    async with byre.UtilityVM() as vm:
        await pings(vm, 20)
        idle = await pings(vm, runs * 40)
        async with await vm.create_process(ProcessParameters(args=["cat", "/dev/zero"], stdout=True)) as process:

            async def drain() -> None:
                while await process.stdio.stdout.read(1 << 20):
                    pass

            draining = asyncio.ensure_future(drain())
            await pings(vm, 20)
            loaded = await pings(vm, runs * 40)
            await process.kill()
            await draining
    for name, times in (("idle", idle), ("loaded", loaded)):
        for percent in (50, 95):
            figures[f"{name}_p{percent}_ms"] = percentile(times, percent) * 1e3
    ratio = percentile(loaded, 95) / LIMIT_S
    return Report(name="ping", runs=len(loaded), ratio=ratio, target=TARGET, figures=figures)
