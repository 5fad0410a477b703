"""A VM of a pool, from asking for it to its first exec's output, against a clone that is made when it is wanted."""

from __future__ import annotations

import asyncio
import time

import byre

from .clone import first_output
from .report import Report, median

#: VMs used at the same moment, to see how fast the pool refills.
AT_ONCE = 20


async def run(runs: int) -> Report:
    await first_output("auto")  # which makes the template
    clones, acquired, outputs = [], [], []
    async with byre.Pool(size=2, max_cpus=AT_ONCE) as pool:
        for _ in range(runs * 3):  # in turn, so that a slow moment of the machine meets both
            clones.append(await first_output("auto"))
            await pool.wait_full()
            started = time.perf_counter()
            async with pool.acquire() as vm:
                acquired.append(time.perf_counter() - started)
                await vm.run(["echo", "first"], capture_output=True)
                outputs.append(time.perf_counter() - started)
        await pool.wait_full()
        started = time.perf_counter()
        await asyncio.gather(*(use(pool) for _ in range(AT_ONCE)))
        rate = AT_ONCE / (time.perf_counter() - started)
    figures = {"clone_to_first_output_s": median(clones), "acquire_s": median(acquired)}
    figures |= {"acquire_to_first_output_s": median(outputs), "slowest_s": max(outputs), "uses_per_s": rate}
    return Report(name="pool", runs=len(outputs), ratio=median(outputs) / median(clones), figures=figures)


async def use(pool: byre.Pool) -> None:
    async with pool.acquire() as vm:
        await vm.run(["true"])
