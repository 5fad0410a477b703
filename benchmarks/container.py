"""Create to first output of a container, step by step: what users feel most."""

from __future__ import annotations

import time

import byre

from .images import busybox
from .report import Report, median


async def run(runs: int) -> Report:
    steps: dict[str, list[float]] = {}

    def note(step: str, since: float) -> float:
        now = time.perf_counter()
        steps.setdefault(step, []).append((now - since) * 1e3)
        return now

    with busybox() as image:
        async with byre.UtilityVM() as vm:
            for number in range(runs + 1):
                begin = mark = time.perf_counter()
                container = await vm.create_container(image=image, args=["echo", "first"])
                mark = note("first_create_ms" if number == 0 else "create_ms", mark)
                init = await container.create_process(None)
                mark = note("init_ms", mark)
                await container.start()
                mark = note("start_ms", mark)
                assert init.stdio.stdout is not None
                assert await init.stdio.stdout.readline() == b"first\n"
                note("output_ms", mark)
                note("first_total_ms" if number == 0 else "total_ms", begin)
                mark = time.perf_counter()
                async with container:
                    await container.wait()
                note("delete_ms", mark)
                await init.close()
    return Report(name="container", runs=runs, figures={name: median(times) for name, times in steps.items()})
