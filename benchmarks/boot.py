"""Cold boot to the first exec's output, against the floor of the same run."""

from __future__ import annotations

import time

import byre
import byre_images

from . import floor
from .report import Report, median

TARGET = "<= 1.5"


async def run(runs: int) -> Report:
    image = byre_images.ensure()
    floors: dict[str, list[float]] = {name: [] for name in floor.MACHINES}
    ours: list[float] = []
    for _ in range(runs):  # in turn, so that a slow moment of the machine meets all of them
        for name, times in floors.items():
            times.append(await floor.boot_and_echo(image, name))
        started = time.perf_counter()
        async with byre.UtilityVM(image=image, template="off") as vm:
            result = await vm.run(["echo", "first"], capture_output=True)
            ours.append(time.perf_counter() - started)
            assert result.stdout == b"first\n"
    medians = {name: median(times) for name, times in floors.items()}
    figures = {f"floor_{name}_s": value for name, value in medians.items()}
    figures |= {"boot_to_first_output_s": median(ours), "slowest_s": max(ours)}
    return Report(
        name="boot", runs=runs, ratio=median(ours) / min(medians.values()), target=TARGET, figures=figures
    )
