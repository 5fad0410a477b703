"""`python -m tests.soak --minutes N --seed S`: one VM that works all the time, among faults.

Workers do the work of the phases of `tests.faults` in one VM, side by side; every few seconds a strike that it
should live through hits it, or one that nothing lives through hits another VM, a keeper or an agent beside it.
Once a minute, and last, it prints

    operations  pieces of work that were done, each with the right result
    faults      strikes
    failed      pieces of work that ended with an error of byre's, during a strike that may have that follow
    lost        everything else: a wrong result, an error without a cause, a call that hung, a VM that died
    host, guest memory in MiB and descriptors, of this process and of the agent, and how much they grew

and exits with 1 when something was lost, or descriptors or memory (by more than GROWTH) grew.  Not part of CI.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from byre.errors import ByreError

from .conftest import machine_options
from .faults.phases import PHASES, Phase, boot, ending
from .faults.places import Own
from .faults.round import closed, one, struck
from .faults.strikes import HARMS, STRIKES, Strike
from .faults.surroundings import small_disk, with_own_mounts
from .faults.world import World
from .images import busybox_layout

#: Pieces of work at once, in one VM with one processor.
WORKERS = 3

#: Seconds between two strikes, at most.
BETWEEN = 4.0

#: Seconds after a strike in which what follows from it may still show itself.
AFTER = 10.0

#: Until everything has been used once, memory grows: how long that is, as a part of the whole.
WARM_UP = 0.2

#: MiB that a side may grow by after that: allocators' fragments.
GROWTH = 16


#: Those that need no other client.
SUITABLE = [strike for strike in STRIKES if not strike.by_client]


class Soak:
    """One VM, its workers and its strikes."""

    def __init__(self, seed: int) -> None:
        self.options: dict[str, Any] = machine_options()
        self.image = f"oci:{busybox_layout()}"
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self._may_fail_until = 0.0
        self._calm = asyncio.Event()  # nobody begins anything while the sides are measured
        self._calm.set()
        self._working = 0

    async def run(self, seconds: float) -> int:
        place = Own(self.options)
        await place.start()
        end = time.monotonic() + seconds
        tasks = [asyncio.create_task(self._work(place, number)) for number in range(WORKERS)]
        try:
            await self._strike_until(place, end - seconds * (1 - WARM_UP))
            first = last = await self._measured(place)
            while time.monotonic() < end:
                await self._strike_until(place, min(end, time.monotonic() + 60))
                last = await self._measured(place)
                self.show(first, last)
                if ended := [task for task in tasks if task.done()]:
                    self.lose(f"workers ended: {ended}")
                    break
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            for verdict, text in await closed(place):
                self.lose(f"{verdict}: {text}")
        grown = {what: last[what] - first[what] for what in first}
        too_much = [what for what, by in grown.items() if by > (GROWTH if "MiB" in what else 0)]
        print(f"grown: {', '.join(too_much) or 'nothing'}")
        return 1 if self.counts["lost"] or too_much else 0

    def show(self, first: dict[str, int], last: dict[str, int]) -> None:
        counts = " ".join(f"{name}={self.counts[name]}" for name in ("operations", "faults", "failed", "lost"))
        sides = ", ".join(f"{what} {now} ({now - first[what]:+})" for what, now in last.items())
        print(f"{counts}; {sides}", flush=True)

    def lose(self, what: str) -> None:
        self.counts["lost"] += 1
        print(f"lost: {what}", flush=True)

    # -- work ----------------------------------------------------------------------------------------------

    async def _work(self, place: Own, number: int) -> None:
        chance = random.Random(f"{self.random.random()}/{number}")
        phases = [phase for phase in PHASES if phase not in (boot, ending)]  # those are done beside
        world = World(place, self.image, chance, may_kill=True)  # once: it looks around, which takes descriptors
        world.struck.set()  # whoever takes something back need not wait for it
        while True:
            await self._calm.wait()
            self._working += 1
            try:
                await self._one_piece(chance.choice(phases), world)
            finally:
                self._working -= 1

    async def _one_piece(self, phase: Phase, world: World) -> None:
        begin = time.monotonic()
        try:
            await phase(world)
            self.counts["operations"] += 1
        except (Exception, asyncio.CancelledError) as error:
            if (task := asyncio.current_task()) and task.cancelling():
                raise  # the end of it all
            if isinstance(error, (ByreError, TimeoutError)) and begin < self._may_fail_until:
                self.counts["failed"] += 1
            else:
                self.lose(f"{phase.__name__}: {''.join(traceback.format_exception(error))}")
                await asyncio.sleep(1)  # a VM that has died fails at once

    # -- strikes -------------------------------------------------------------------------------------------

    async def _strike_until(self, place: Own, end: float) -> None:
        while time.monotonic() < end:
            await asyncio.sleep(self.random.uniform(0, BETWEEN))
            strike = self.random.choice(SUITABLE)
            self.counts["faults"] += 1
            if strike.follows == HARMS:
                self._may_fail_until = time.monotonic() + 3600
            found = await self._struck(strike, place)
            if strike.follows == HARMS:
                self._may_fail_until = time.monotonic() + AFTER
            for verdict, text in found:
                self.lose(f"{strike.name}: {verdict}: {text}")

    async def _struck(self, strike: Strike, place: Own) -> list[tuple[str, str]]:
        """The VM that is soaked, or one beside it."""
        if strike.on is Own and strike.survived:
            return await struck(strike, World(place, self.image, self.random))
        beside = strike.on(self.options)
        await beside.start()
        if strike.survived:
            world = World(beside, self.image, self.random)
            found = await struck(strike, world)
        else:
            found = await one(self.random.choice(PHASES[:5]), strike, beside, self.random, self.image)
        return found + await closed(beside)

    # -- growth --------------------------------------------------------------------------------------------

    async def _measured(self, place: Own) -> dict[str, int]:
        """Both sides, while nothing goes on."""
        self._calm.clear()
        try:
            while self._working:
                await asyncio.sleep(0.1)
            script = "grep VmRSS /proc/1/status; ls /proc/1/fd | wc -l"
            done = await place.vm.run(["sh", "-c", script], capture_output=True, text=True, timeout=60)
            words = done.stdout.split()
            own = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in line)
            return {
                "host MiB": int(own.split()[1]) // 1024,
                "host descriptors": len(os.listdir("/proc/self/fd")),
                "guest MiB": int(words[1]) // 1024,
                "guest descriptors": int(words[3]),
            }
        finally:
            self._calm.set()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="See tests/README.md.")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    with small_disk():
        return asyncio.run(Soak(arguments.seed).run(arguments.minutes * 60))


if __name__ == "__main__":
    with_own_mounts("tests.soak")
    sys.exit(main())
