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
import os
import random
import sys
import tempfile
import time
import traceback
from collections import Counter

import byre
from byre.errors import ByreError
from tests.conftest import machine_options
from tests.images import busybox_layout

from . import leftovers
from .phases import PHASES, Phase
from .strikes import HARMS, NOTHING, STRIKES, Strike
from .world import DEADLINE, GRACE, Hung, World, emulators, whereabouts

#: Longest time before a strike, in seconds: the work of every phase, once or twice.
BEFORE = 1.5

#: Seconds that a phase's work, a VM's end, and a guest's return to what it was may take.
WORK = 200.0
END = 15.0
SETTLE = 15.0

#: Of what is left over in a guest.
SHOWN = 8

VERDICTS = ("hung", "lost", "wrong", "leftover")

#: What a VM of each phase has when nothing went wrong.
Usual = dict[str, list[str]]


async def main(rounds: int, seed: int, only: str) -> int:
    options = machine_options()
    image = f"oci:{busybox_layout()}"
    strikes = [strike for strike in STRIKES if only in strike.name]
    pairs = in_turn(list(PHASES), strikes, random.Random(seed))
    counts: Counter[tuple[str, str]] = Counter()
    bad: Counter[str] = Counter()
    unheard: list[str] = []  # errors that nobody took
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(str(context)))
    async with byre.UtilityVM(**options) as bystander:
        usual = {}
        for phase in PHASES:
            usual[phase.__name__] = await undisturbed(phase, image, options)
        for number in range(rounds):
            phase, strike = pairs[number % len(pairs)]
            counts[phase.__name__, strike.name] += 1
            host = leftovers.Host()
            found = await one(phase, strike, random.Random(f"{seed}/{number}"), image, options, usual)
            found += [("leftover", line) for line in sorted(await host.more())]
            try:
                async with asyncio.timeout(DEADLINE):
                    await bystander.run(["true"], check=True)
            except Exception as error:
                found.append(("lost", f"the bystander: {error!r}"))
            found += [("wrong", text) for text in unheard]
            unheard.clear()
            for verdict in {verdict for verdict, _ in found}:
                bad[verdict] += 1
            for verdict, text in found:
                print(
                    f"round {number} (seed {seed}): {phase.__name__}, {strike.name}: {verdict}: {text}", flush=True
                )
    table(counts)
    print(f"rounds={rounds} " + " ".join(f"{verdict}={bad[verdict]}" for verdict in VERDICTS))
    return 1 if bad.total() else 0


def in_turn(phases: list[Phase], strikes: list[Strike], chance: random.Random) -> list[tuple[Phase, Strike]]:
    """All pairs, and every strike and every phase as early as can be."""
    chance.shuffle(phases)
    chance.shuffle(strikes)
    lines = range(len(phases))
    return [(phases[(line + row) % len(phases)], strike) for line in lines for row, strike in enumerate(strikes)]


async def undisturbed(phase: Phase, image: str, options: dict[str, object]) -> list[str]:
    """The phase's work with no strike: it has to be right, and shows what it leaves in its VM."""
    async with byre.UtilityVM(**options) as vm:
        await phase(World(vm, image, random.Random(0), options, emulators()))
        return await leftovers.guest(vm)


async def one(
    phase: Phase, strike: Strike, chance: random.Random, image: str, options: dict[str, object], usual: Usual
) -> list[tuple[str, str]]:
    """One round; what was bad about it."""
    found: list[tuple[str, str]] = []
    machines = emulators()
    vm = byre.UtilityVM(**options)
    await vm.start()
    world = World(vm, image, chance, options, machines, strike.deadline or DEADLINE, strike.follows == HARMS)
    working = asyncio.create_task(work(phase, world))
    try:
        await asyncio.wait({working}, timeout=chance.uniform(0, BEFORE))
        striking = asyncio.create_task(strike.does(world))
        await asyncio.wait({striking}, timeout=DEADLINE + GRACE)
        world.struck.set()
        if not striking.done():
            striking.cancel()
            found.append(("hung", f"the strike itself: {whereabouts(striking)}"))
        await asyncio.wait({striking})
        if not striking.cancelled() and (error := striking.exception()) and strike.follows in (HARMS, NOTHING):
            found.append(("wrong", f"the strike itself: {error!r}"))
        await asyncio.wait({working}, timeout=WORK)
        found += judge(working, strike)
        if not found and strike.follows in (HARMS, NOTHING):
            found += await settled(vm, usual[phase.__name__], working.exception())
    finally:
        working.cancel()
        await asyncio.wait({working}, timeout=GRACE)
        closing = asyncio.create_task(vm.close())
        await asyncio.wait({closing}, timeout=END)
        if not closing.done():
            found.append(("hung", f"the VM's end: {whereabouts(closing)}"))
    return found


async def work(phase: Phase, world: World) -> None:
    """The phase's work again and again, the last time from begin to end after the strike, or until it fails."""
    after = False
    while not after:
        after = world.struck.is_set()
        await phase(world)


def judge(working: asyncio.Task[None], strike: Strike) -> list[tuple[str, str]]:
    """What is bad about how the work ended."""
    if not working.done():
        return [("hung", f"the work itself: {whereabouts(working)}")]
    error = working.exception()
    if isinstance(error, Hung):
        return [("hung", str(error))]
    if error is None or (isinstance(error, (ByreError, TimeoutError)) and strike.follows != NOTHING):
        return []
    return [("wrong", "".join(traceback.format_exception(error)))]


async def settled(vm: byre.UtilityVM, usual: list[str], error: BaseException | None) -> list[tuple[str, str]]:
    """What a VM that lives on has more than it should, after some time; or that it does not live on."""
    now = asyncio.get_running_loop().time
    deadline = now() + SETTLE
    while True:
        try:
            found = await leftovers.guest(vm)
        except Exception as error:
            return [("lost", f"the VM: {error!r}\n{vm.console_tail(20)}")]
        more = list((Counter(found) - Counter(usual)).elements())
        if not more:
            return []
        if now() > deadline:
            made = [(each["id"], each["state"]) for each in await vm.containers()]
            what = (
                f"{', '.join(more[:SHOWN])} ({len(more)} in all); containers: {made}; the work ended with {error!r}"
            )
            return [("leftover", what)]
        await asyncio.sleep(0.3)


def table(counts: Counter[tuple[str, str]]) -> None:
    """How often each strike met each phase."""
    names = [phase.__name__ for phase in PHASES]
    wide = max(len(strike.name) for strike in STRIKES)
    print(" " * wide, *(f"{name:>10}" for name in names))
    for strike in STRIKES:
        print(f"{strike.name:<{wide}}", *(f"{counts[name, strike.name]:>10}" for name in names))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="See tests/README.md.")
    parser.add_argument("--rounds", type=int, default=len(PHASES) * len(STRIKES))
    parser.add_argument("--only", default="", metavar="STRIKE", help="a part of a strike's name")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parsed()
    print(f"seed {arguments.seed}")
    with tempfile.TemporaryDirectory(prefix="byre-faults-") as folder:
        for variable in ("TMPDIR", "XDG_RUNTIME_DIR"):
            os.environ[variable] = os.path.join(folder, variable)
            os.mkdir(os.environ[variable], 0o700)
        tempfile.tempdir = None  # it is looked up once
        sys.exit(asyncio.run(main(arguments.rounds, arguments.seed, arguments.only)))
