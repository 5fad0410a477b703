"""Saving a VM at work, and a clone of it, by what it has written; against QEMU's own way, a migration to a file.

Both ways save the same VM, which stands still for the whole of a migration, and for the last part of a snapshot
only; a clone is measured to its first exec's output.  `ratio`: a snapshot and a clone over a migration and a clone.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from pathlib import Path
from typing import Any

import byre
from byre.machines import guest_memory
from byre.machines.config import Saved
from byre.snapshots import Snapshot
from byre_proto.messages import QUIET

from .report import Report, median

#: MiB that the VM writes before it is saved, beside what its start has written.
WRITTEN = (0, 32, 96)

#: QEMU would otherwise write 1 GiB/s at most.
BANDWIDTH = 1 << 40

#: For a migration, in seconds.
LIMIT = 60.0


async def run(runs: int) -> Report:
    figures: dict[str, float] = {}
    for mib in WRITTEN:
        found = [await measure(mib) for _ in range(runs)]
        figures |= {f"{name}_{mib}": median([each[name] for each in found]) for name in found[0]}

    def grown(name: str) -> float:
        return figures[f"{name}_{WRITTEN[-1]}"] - figures[f"{name}_{WRITTEN[0]}"]

    figures["standing_still_ms_per_mib"] = 1000 * grown("standing_still_s") / grown("written_mib")
    ways = [
        sum(figures[f"{way}{step}_{WRITTEN[1]}"] for step in ("_s", "_clone_s"))
        for way in ("snapshot", "migration")
    ]
    return Report(name="snapshot", runs=runs, ratio=ways[0] / ways[1], target="< 1", figures=figures)


async def measure(mib: int) -> dict[str, float]:
    """Of one VM."""
    written: list[tuple[float, int]] = []

    def copy_written(*arguments: Any) -> int:
        began = time.perf_counter()
        written.append((began, plain(*arguments)))
        return written[-1][1]

    plain, guest_memory.copy_written = guest_memory.copy_written, copy_written
    try:
        async with byre.UtilityVM() as vm:
            await vm.run(["dd", "if=/dev/urandom", "of=/tmp/x", "bs=1M", f"count={mib}"], stderr=byre.DEVNULL)
            written.clear()  # of a template that was made
            began = time.perf_counter()
            snap = await vm.snapshot()
            ended = time.perf_counter()
            figures = {"written_mib": written[0][1] / 1024**2, "snapshot_s": ended - began}
            figures["standing_still_s"] = ended - written[0][0]
            async with snap:
                figures["snapshot_clone_s"] = await first_output(snap)
            return figures | await migration(vm)
    finally:
        guest_memory.copy_written = plain


async def first_output(snap: Snapshot) -> float:
    """Seconds from nothing to the first exec's output of a clone."""
    began = time.perf_counter()
    async with snap.clone() as clone:
        await clone.run(["echo", "first"], capture_output=True)
        return time.perf_counter() - began


async def migration(vm: byre.UtilityVM) -> dict[str, float]:
    """Seconds that QEMU takes to write all of the machine, standing still, to a file, and that a clone takes."""
    machine: Any = vm._owner.machine  # type: ignore[attr-defined]
    execute, ended = machine._qmp.execute, machine._migration._ended
    await vm.bridge.call("system.quiesce", freeze=True)
    with tempfile.TemporaryDirectory(prefix="byre-migration-", dir=Path.home()) as directory:
        memory, state = Path(directory, "memory"), Path(directory, "state")
        with state.open("wb") as file, memory.open("wb") as nothing:  # noqa: ASYNC230
            nothing.truncate(machine._config.memory_mib << 20)
            await execute("migrate-set-capabilities", {"capabilities": [{"capability": "events", "state": True}]})
            await execute("migrate-set-parameters", {"max-bandwidth": BANDWIDTH})
            machine._qmp.send_fd(file.fileno())
            await execute("getfd", {"fdname": "all"})
            ended.clear()
            began = time.perf_counter()
            await execute("stop")
            await execute("migrate", {"uri": "fd:all"})
            async with asyncio.timeout(LIMIT):
                await ended.wait()
            taken = time.perf_counter() - began
        saved = Saved(memory=memory, state=state, host_gone=QUIET)
        async with Snapshot(vm._origin, saved, contextlib.ExitStack()) as all_of_it:
            return {"migration_s": taken, "migration_clone_s": await first_output(all_of_it)}
