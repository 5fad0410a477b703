"""What goes on in a VM when it is struck: each phase is one piece of work, repeated, whose every result is known.

Rule: a phase raises `Wrong` for a result that is not the right one, and lets byre's own errors through.  It leaves
nothing behind in a VM that lives on, whatever happened to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import signal
from collections.abc import Awaitable, Callable
from typing import Any

from byre import ProcessParameters
from byre.errors import ByreError, ConnectionLost

from .world import World, Wrong

Phase = Callable[[World], Awaitable[None]]

#: What `seq 1 LINES` writes.
LINES = 40_000
NUMBERS = hashlib.sha256(b"".join(b"%d\n" % number for number in range(1, LINES + 1))).hexdigest()

#: Sent to the VM: some windows' worth.
SENT = random.Random(1).randbytes(1024 * 1024)
SENT_DIGEST = hashlib.sha256(SENT).hexdigest()


async def boot(world: World) -> None:
    """A second VM begins and ends."""
    async with world.another() as place:
        command = place.vm.run(["echo", "up"], capture_output=True, timeout=world.deadline)
        expect((await world.call(command)).stdout, b"up\n")


async def status(world: World) -> None:
    """A command ends with a status."""
    code = world.random.randrange(100)
    done = await world.call(world.vm.run(["sh", "-c", f"exit {code}"], timeout=world.deadline))
    expect_status(world, done, code)


async def output(world: World) -> None:
    """A command writes more than a window holds."""
    command = ["seq", "1", str(LINES)]
    done = await world.call(world.vm.run(command, capture_output=True, timeout=world.deadline))
    if expect_status(world, done, 0):
        expect(hashlib.sha256(done.stdout).hexdigest(), NUMBERS)


async def input(world: World) -> None:
    """A command reads more than a window holds."""
    command = world.vm.run(["sha256sum"], input=SENT, capture_output=True, timeout=world.deadline)
    done = await world.call(command)
    if expect_status(world, done, 0):
        expect(done.stdout.split()[0].decode(), SENT_DIGEST)


async def signalled(world: World) -> None:
    """A process is started, waited for, and killed."""
    async with world.using(world.vm.create_process(ProcessParameters(args=["sleep", "1000"]))) as process:
        waiting = asyncio.create_task(process.wait())
        try:
            await world.call(process.signal(signal.SIGTERM))
            ended = await world.call(waiting)
        finally:
            waiting.cancel()
            with contextlib.suppress(ByreError):
                await world.call(process.kill())
    if not (ended.signal == signal.SIGKILL and world.may_kill):
        expect(ended.code, 128 + signal.SIGTERM)


async def files(world: World) -> None:
    """A file is written, read and removed."""
    path = f"{world.place.folder}/{world.random.randrange(10**9)}"
    try:
        await world.call(world.vm.files.write(path, SENT))
        expect(hashlib.sha256(await world.call(world.vm.files.read(path))).hexdigest(), SENT_DIGEST)
    finally:
        await world.call(world.again(lambda: world.vm.files.remove(path, missing_ok=True)))


async def containers(world: World) -> None:
    """A container is made, runs, and is removed."""
    async with world.container("sh", "-c", "exit 7") as container:
        await world.call(container.start())
        expect_status(world, await world.call(container.wait()), 7)


async def execs(world: World) -> None:
    """Commands run in a container whose init does nothing."""
    async with world.container("sleep", "1000") as container:
        await world.call(container.start())
        for code in (3, 4):
            command = container.run(["sh", "-c", f"exit {code}"], timeout=world.deadline)
            expect_status(world, await world.call(command), code)


async def ending(world: World) -> None:
    """A second VM is shut down with a process in it."""
    async with world.another() as place:
        process = await world.call(place.vm.create_process(ProcessParameters(args=["sleep", "1000"])))
        waiting = asyncio.create_task(process.wait())
        await asyncio.sleep(0)
        try:
            await world.call(place.shutdown(), 2)
            expect((await world.call(waiting)).code, 128 + signal.SIGTERM)
        except ConnectionLost:
            pass  # the VM was gone first
        finally:
            waiting.cancel()
            await world.call(process.close())


PHASES: tuple[Phase, ...] = (boot, status, output, input, signalled, files, containers, execs, ending)

#: Those that need a VM.
IN_CONTAINERS = (containers, execs)


def expect(found: object, wanted: object) -> None:
    if found != wanted:
        raise Wrong(f"{str(found)[:200]} in place of {str(wanted)[:200]}")


def expect_status(world: World, done: Any, code: int) -> bool:
    """Whether a command ended as it should; one that the strike may have killed may say that it was killed."""
    found = getattr(done, "returncode", getattr(done, "code", None))
    if found == 128 + signal.SIGKILL and done.signal == signal.SIGKILL and world.may_kill:
        return False
    expect(found, code)
    return True
