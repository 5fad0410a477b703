"""The work of a phase in a process of its own, a client of a keeper.

Rule: the process says "ready" when it is attached, works until it reads that the strike is over, and once more;
what is wrong it says on stdout, and ends with 1.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import random
import signal
import sys
import traceback

from byre.errors import ByreError

from .phases import PHASES, SENT_DIGEST, Phase, expect
from .places import Attached, Kept
from .world import World, Wrong, repeated


async def in_another_process(phase: Phase, world: World, options: dict[str, object], ready: asyncio.Event) -> None:
    """What `repeated` does, in a client's process; when that was killed, all that it left is tidied by this one."""
    assert isinstance(world.place, Kept)
    arguments = [world.place.name, phase.__name__, world.image, str(world.random.random()), json.dumps(options)]
    client = world.client = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", __spec__.name, *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert client.stdin is not None and client.stdout is not None
    try:
        said = await client.stdout.readline()
        ready.set()
        await world.struck.wait()
        client.stdin.close()
        said += await client.stdout.read()
    except asyncio.CancelledError:
        client.kill()
        raise
    finally:
        await client.wait()
    if client.returncode == -signal.SIGKILL:
        await tidy(world)
    elif client.returncode:
        raise Wrong(said.decode())


async def tidy(world: World) -> None:
    """What a killed client has begun is there for others to find, and to end (B43); its files are whole."""
    vm = world.vm
    for entry in await world.call(vm.containers()):
        with contextlib.suppress(ByreError):  # going by itself
            container = await world.call(vm.open_container(entry["id"]))
            await world.call(container.delete())
            await container.close()
    for entry in (await world.call(vm.bridge.call("process.list")))["processes"]:
        with contextlib.suppress(ByreError):
            await world.call(vm.bridge.call("process.signal", process=entry["process"], signal=9, tree=True))
            await world.call(vm.bridge.call("process.release", process=entry["process"]))
    for file in await world.call(vm.files.list(world.place.folder)):
        if file.name.isdigit():  # of the phase `files`
            path = f"{world.place.folder}/{file.name}"
            expect(hashlib.sha256(await world.call(vm.files.read(path))).hexdigest(), SENT_DIGEST)
            await world.call(vm.files.remove(path))


async def main(name: str, phase: str, image: str, seed: str, options: str) -> None:
    place = Attached(json.loads(options), name)
    await place.start()
    world = World(place, image, random.Random(seed))
    asyncio.get_running_loop().add_reader(0, world.struck.set)
    print("ready", flush=True)
    try:
        await repeated(next(each for each in PHASES if each.__name__ == phase), world)
    finally:
        asyncio.get_running_loop().remove_reader(0)
        await place.close()


if __name__ == "__main__":
    try:
        asyncio.run(main(*sys.argv[1:]))
    except Exception:
        traceback.print_exc(file=sys.stdout)
        sys.exit(1)
