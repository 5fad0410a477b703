"""The agent over serial lines: a VM's 16550 as fast as it goes, and a tty at 115,200 baud, good and bad.

The tty's line is a played one (`tests.bad_line`), which counts what is on it: `efficiency` is what a process wrote
or read over all bytes that its direction of the line carried meanwhile.  The bytes are random; zeros and text need
no escapes and are a seventh quicker.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from typing import Any

import byre
from byre import ProcessParameters
from tests.bad_line import BadLine, line_host

from .report import Report, median, percentile

TARGET = ">= 1: 32 KiB/s over a 16550, the slower direction"
GOAL = 32 * 1024

VM_SIZE = 256 * 1024
LINE_SIZE = 32 * 1024
BAUD = 115_200

#: Of the bytes on the bad line every ten thousandth is damaged: one frame of twenty.
RATE = 1e-4

PINGS = 20


async def out(host: Any, size: int) -> float:
    """Bytes a second that a process writes."""
    start = time.perf_counter()
    done = await host.run(["head", "-c", str(size), "/dev/urandom"], capture_output=True, check=True)
    assert len(done.stdout) == size
    return size / (time.perf_counter() - start)


async def into(host: Any, data: bytes) -> float:
    """Bytes a second that a process reads."""
    start = time.perf_counter()
    done = await host.run(["sha256sum"], input=data, capture_output=True, check=True)
    assert done.stdout.split()[0].decode() == hashlib.sha256(data).hexdigest()
    return len(data) / (time.perf_counter() - start)


async def pings(host: Any) -> list[float]:
    return [await host.bridge.ping(30) for _ in range(PINGS)]


async def loaded_pings(host: Any) -> list[float]:
    """While a process writes as fast as it can."""
    config = ProcessParameters(args=["cat", "/dev/urandom"], stdout=True)
    async with await host.create_process(config) as process:
        await process.stdio.stdout.read(1)

        async def drain() -> None:
            while await process.stdio.stdout.read(1 << 20):
                pass

        draining = asyncio.ensure_future(drain())
        times = await pings(host)
        await process.close_stdout()  # what is under way would take half a minute
        await draining
        await process.kill()
    return times


async def measure(name: str, host: Any, size: int, runs: int, line: BadLine | None = None) -> dict[str, float]:
    data = os.urandom(size)
    figures = {}
    for way, work in ((1, lambda: out(host, size)), (0, lambda: into(host, data))):
        before = line.carried[way] if line else 0
        rates = [await work() for _ in range(runs)]
        figures[f"{name}_{'in' if way == 0 else 'out'}_bytes_s"] = median(rates)
        if line:
            figures[f"{name}_{'in' if way == 0 else 'out'}_efficiency"] = size * runs / (line.carried[way] - before)
    for kind, times in (("idle", await pings(host)), ("loaded", await loaded_pings(host))):
        for percent in (50, 95):
            figures[f"{name}_ping_{kind}_p{percent}_ms"] = percentile(times, percent) * 1e3
    return figures


async def run(runs: int) -> Report:
    async with byre.UtilityVM(transport="serial") as vm:
        await vm.run(["true"])
        figures = await measure("vm", vm, VM_SIZE, runs)
    for name, rate in (("baud", 0.0), ("bad", RATE)):
        async with line_host(rate, baud=BAUD) as (host, line):
            figures |= await measure(name, host, LINE_SIZE, runs, line)
    ratio = min(figures["vm_out_bytes_s"], figures["vm_in_bytes_s"]) / GOAL
    return Report(name="serial", runs=runs, ratio=ratio, target=TARGET, figures=figures)
