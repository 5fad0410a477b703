"""One round: a phase's work goes on, a strike comes, and both are judged."""

from __future__ import annotations

import asyncio
import random
import sys
import traceback
from collections import Counter

from byre.errors import ByreError

from . import leftovers
from .client import in_another_process
from .phases import Phase
from .places import Place
from .strikes import HARMS, NOTHING, Strike
from .world import DEADLINE, GRACE, Hung, World, repeated, whereabouts

#: Longest time before a strike, in seconds: the work of most phases, once or twice.
BEFORE = 1.0

#: Seconds that a phase's work, a VM's end, and a guest's return to what it was may take.
WORK = 200.0
END = 15.0
SETTLE = 15.0

#: Of what is left over in a guest.
SHOWN = 8

Found = list[tuple[str, str]]


async def one(phase: Phase, strike: Strike, place: Place, chance: random.Random, image: str) -> Found:
    """What was bad about it.  The place runs, and is the caller's to close."""
    world = World(place, image, chance, strike.deadline or DEADLINE, strike.follows == HARMS)
    ready = asyncio.Event()
    if strike.by_client:
        working = asyncio.create_task(in_another_process(phase, world, place.options, ready))
        await asyncio.wait({working, asyncio.ensure_future(ready.wait())}, return_when=asyncio.FIRST_COMPLETED)
    else:
        working = asyncio.create_task(repeated(phase, world))
    try:
        await asyncio.wait({working}, timeout=chance.uniform(0, BEFORE))
        found = await struck(strike, world)
        await asyncio.wait({working}, timeout=WORK)
        found += judge(working, strike)
        if not found and strike.survived:
            found += await settled(place, working.exception())
        return found
    finally:
        working.cancel()
        await asyncio.wait({working}, timeout=GRACE)


async def struck(strike: Strike, world: World) -> Found:
    """Have the strike done."""
    striking = asyncio.create_task(strike.does(world))
    await asyncio.wait({striking}, timeout=DEADLINE + GRACE)
    world.struck.set()
    if not striking.done():
        where = whereabouts(striking)
        striking.cancel()
        await asyncio.wait({striking})
        return [("hung", f"the strike itself: {where}")]
    if (error := striking.exception()) and strike.survived:
        return [("wrong", f"the strike itself: {error!r}")]
    return []


def judge(working: asyncio.Task[None], strike: Strike) -> Found:
    """What is bad about how the work ended."""
    if not working.done():
        return [("hung", f"the work itself: {whereabouts(working)}")]
    error = working.exception()
    if isinstance(error, Hung):
        return [("hung", str(error))]
    if error is None or (isinstance(error, (ByreError, TimeoutError)) and strike.follows != NOTHING):
        return []
    return [("wrong", "".join(traceback.format_exception(error)))]


async def settled(place: Place, error: BaseException | None) -> Found:
    """What a VM that lives on has more than it should, after some time; or that it does not live on."""
    now = asyncio.get_running_loop().time
    deadline = now() + SETTLE
    while True:
        try:
            found = await leftovers.guest(place.vm)
        except Exception as error:
            return [("lost", f"the VM: {error!r}\n{await console(place)}")]
        more = list((Counter(found) - place.usual).elements())
        if not more:
            return []
        if now() > deadline:
            made = [(each["id"], each["state"]) for each in await place.vm.containers()]
            what = (
                f"{', '.join(more[:SHOWN])} ({len(more)} in all); containers: {made}; the work ended with {error!r}"
            )
            return [("leftover", what)]
        await asyncio.sleep(0.3)


async def console(place: Place) -> str:
    try:
        return str(await place.vm.console(20))
    except ByreError as error:
        return repr(error)


async def looked_at() -> Found:
    """What users see next: `byre ps`, which removes what dead keepers have left."""
    ps = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "byre", "ps"), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        async with asyncio.timeout(DEADLINE):
            said, _ = await ps.communicate()
    except TimeoutError:
        ps.kill()
        await ps.wait()
        return [("hung", "byre ps")]
    return [("wrong", f"byre ps ended with {ps.returncode}: {said.decode()}")] if ps.returncode else []


async def closed(place: Place) -> Found:
    """End a place; an end that takes too long is bad."""
    closing = asyncio.create_task(place.close())
    await asyncio.wait({closing}, timeout=END)
    if not closing.done():
        return [("hung", f"the end: {whereabouts(closing)}")]
    error = closing.exception()
    return [("wrong", f"the end: {error!r}")] if error else []
