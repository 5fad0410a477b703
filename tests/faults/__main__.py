"""`python -m tests.faults --rounds N --seed S`: see the package.

Prints how often each strike met each phase and, last, `rounds=N hung=0 lost=0 wrong=0 leftover=0`; exits non-zero
when one of these is not 0.

    hung      a call went on for over 5 s past its deadline, or an ended VM could not be closed
    lost      a VM that should live on did not, or the bystander noticed
    wrong     a result was not the right one, or an error none of byre's
    leftover  something was left behind, on the host or in a VM that lives on
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from typing import Any

import byre
import byre_images
from byre import rundir
from tests.conftest import machine_options
from tests.images import busybox_layout

from . import leftovers
from .phases import IN_CONTAINERS, PHASES, Phase, containers
from .places import Kept, Local, Own, Place
from .round import Found, closed, looked_at, one
from .strikes import STRIKES, Strike
from .surroundings import small_disk, with_own_mounts
from .world import DEADLINE, World

VERDICTS = ("hung", "lost", "wrong", "leftover")

#: Rounds that a VM is used for when none of them harms it: what only grows slowly is seen, and a round is cheap.
USES = 50


class Rounds:
    """What the rounds have in common, and what they found."""

    def __init__(self, seed: int) -> None:
        self.options: dict[str, Any] = machine_options()
        self.image = f"oci:{busybox_layout()}"
        self.seed = seed
        self.counts: Counter[tuple[str, str]] = Counter()
        self.bad: Counter[str] = Counter()
        self._usual: Counter[str] = Counter()
        self._used: dict[type[Place], tuple[Place, int]] = {}  # those that live on, and how often they were used
        self._unheard: list[str] = []  # errors that nobody took

    async def run(self, pairs: list[tuple[Phase, Strike]], numbers: range) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: self._unheard.append(str(context)))
        async with byre.UtilityVM(**self.options) as bystander:
            self._usual = await self._undisturbed()
            rundir.base()  # so that it is nobody's leftover
            for number in numbers:
                phase, strike = pairs[number % len(pairs)]
                self.counts[phase.__name__, strike.name] += 1
                found = await self._one(phase, strike, random.Random(f"{self.seed}/{number}"))
                try:
                    async with asyncio.timeout(DEADLINE):
                        await bystander.run(["true"], check=True)
                except Exception as error:
                    found.append(("lost", f"the bystander: {error!r}"))
                found += [("wrong", text) for text in self._unheard]
                self._unheard.clear()
                self.bad.update({verdict for verdict, _ in found})
                where = f"round {number} (seed {self.seed}): {phase.__name__}, {strike.name}"
                for verdict, text in found:
                    print(f"{where}: {verdict}: {text}", flush=True)
            for kind in list(self._used):
                await self._retire(kind)

    async def _undisturbed(self) -> Counter[str]:
        """Every phase's work with no strike: it has to be right, and shows what it leaves in its VM."""
        place = Own(self.options)
        await place.start()
        try:
            for phase in PHASES:
                await phase(World(place, self.image, random.Random(0)))
            return Counter(await leftovers.guest(place.vm))
        finally:
            await place.close()

    async def _one(self, phase: Phase, strike: Strike, chance: random.Random) -> Found:
        """A round on a place of its own, or on one that was used before and lives on."""
        kind = strike.on
        place, uses = self._used.pop(kind, (None, 0)) if strike.survived else (None, 0)
        host = leftovers.Host()
        if place is None:
            place = kind(self.options)
            await place.start()
            if strike.survived:
                place.usual = self._usual
                await containers(World(place, self.image, chance))  # from now on it has its layers
                host = leftovers.Host()
        found = await one(phase, strike, place, chance, self.image)
        if not strike.survived:
            found += await closed(place)
        if issubclass(strike.on, Kept):
            found += await looked_at()
        found += [("leftover", line) for line in await host.more()]
        if strike.survived:
            self._used[kind] = place, uses + 1
            if found or uses + 1 == USES:
                found += await self._retire(kind)
        return found

    async def _retire(self, kind: type[Place]) -> Found:
        place, _ = self._used.pop(kind)
        return await closed(place)


def in_turn(phases: list[Phase], strikes: list[Strike], chance: random.Random) -> list[tuple[Phase, Strike]]:
    """All pairs that can be, and every strike and every phase as early as can be."""
    chance.shuffle(phases)
    chance.shuffle(strikes)
    pairs = []
    for line in range(len(phases)):
        for row, strike in enumerate(strikes):
            possible = [phase for phase in phases if can_be(phase, strike)]
            if line < len(possible):
                pairs.append((possible[(line + row) % len(possible)], strike))
    return pairs


def can_be(phase: Phase, strike: Strike) -> bool:
    """LocalHost has no containers."""
    return not (strike.on is Local and phase in IN_CONTAINERS)


def table(counts: Counter[tuple[str, str]]) -> None:
    """How often each strike met each phase."""
    wide = max(len(strike.name) for strike in STRIKES)
    print(" " * wide, *(f"{phase.__name__:>10}" for phase in PHASES))
    for strike in STRIKES:
        cells = (counts[phase.__name__, strike.name] if can_be(phase, strike) else "-" for phase in PHASES)
        print(f"{strike.name:<{wide}}", *(f"{cell:>10}" for cell in cells))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="See tests/README.md.")
    parser.add_argument("--rounds", type=int, help="(default: every strike in every phase once)")
    parser.add_argument(
        "--first", type=int, default=0, help="round to begin with: %(default)s, or one to be repeated"
    )
    parser.add_argument("--only", default="", metavar="STRIKE", help="a part of a strike's name")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    return parser.parse_args()


def main() -> int:
    arguments = parsed()
    print(f"seed {arguments.seed}")
    strikes = [strike for strike in STRIKES if arguments.only in strike.name]
    pairs = in_turn(list(PHASES), strikes, random.Random(arguments.seed))
    count = arguments.rounds or len(pairs)
    numbers = range(arguments.first, arguments.first + count)
    rounds = Rounds(arguments.seed)
    byre_images.ensure()  # it is not made on the small disk
    with small_disk():
        asyncio.run(rounds.run(pairs, numbers))
    table(rounds.counts)
    print(f"rounds={count} " + " ".join(f"{verdict}={rounds.bad[verdict]}" for verdict in VERDICTS))
    return 1 if rounds.bad.total() else 0


if __name__ == "__main__":
    with_own_mounts("tests.faults")
    sys.exit(main())
