"""What goes wrong with a VM and in it.

Rule: a strike says what it did in the guest by the guest's own means, so that it works the same for every phase.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal

from byre import ProcessParameters, Resources
from byre.errors import ByreError, DeadlineExceeded

from .world import World

#: Seconds for what a strike does in the guest.
IN_GUEST = 30.0

#: Of the container that is made to run out of it, in bytes.
CONTAINER_MEMORY = 16 * 1024 * 1024


async def kill_machine(world: World) -> None:
    _signal(world, signal.SIGKILL)


async def stop_machine(world: World) -> None:
    _signal(world, signal.SIGSTOP)


async def pause_machine(world: World) -> None:
    """The host is overloaded for a second: QEMU, its QMP and the guest are silent."""
    pid = world.newest_machine()
    if pid:
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(1)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


async def panic(world: World) -> None:
    await _in_guest(world, "echo c >/proc/sysrq-trigger")


async def cut_channel(world: World) -> None:
    """Somebody closes the connection to the agent under it."""
    channel = world.vm.bridge._channel
    if channel is not None:
        channel.transport.abort()


async def take_memory(world: World) -> None:
    """Two processes of the VM take all memory, until the kernel kills one (or another one)."""
    await _in_guest(world, "for i in 1 2; do dd if=/dev/zero of=/dev/null bs=400M count=2 2>&1 & done; wait; :")


async def take_containers_memory(world: World) -> None:
    """A process of a container takes all memory that the container may have."""
    limits = Resources(memory_bytes=CONTAINER_MEMORY)
    args = ["tail", "/dev/zero"]
    async with await world.vm.create_container(image=world.image, args=args, resources=limits) as container:
        await container.start()
        await asyncio.wait_for(container.wait(), IN_GUEST)


async def kill_runtime(world: World) -> None:
    """Whatever crun runs now is killed, for half a second."""
    await _in_guest(world, _signal_all("crun", "-9"))


async def kill_inits(world: World) -> None:
    """Whatever is a container's first process is killed, for half a second."""
    await _in_guest(world, _signal_all("sleep", "-9"))


async def stop_runtime(world: World) -> None:
    """Whatever crun runs now stands still, for half a second."""
    await _in_guest(world, _signal_all("crun", "-STOP") + _signal_once("crun", "-CONT"))


async def stop_inits(world: World) -> None:
    """Whatever is a container's first process stands still, for half a second."""
    await _in_guest(world, _signal_all("sleep", "-STOP") + _signal_once("sleep", "-CONT"))


async def fill_scratch(world: World) -> None:
    await _in_guest(world, "dd if=/dev/zero of=/tmp/full bs=1M 2>/dev/null; sleep 0.2; rm /tmp/full")


async def take_descriptors(world: World) -> None:
    """For half a second the agent may open nothing more."""
    await _in_guest(world, f"exec python3 -c '{_NO_DESCRIPTORS}'")


async def jump_in_time(world: World) -> None:
    """The guest's clock is a day ahead, then a year behind, then right again."""
    await _in_guest(
        world, "now=$(date +%s); for by in 86400 -31536000 0; do date -s @$((now + by)); sleep 0.2; done"
    )


async def never_read(world: World) -> None:
    """A command writes without end, and nobody reads it."""
    async with await world.vm.create_process(ProcessParameters(args=["cat", "/dev/zero"], stdout=True)) as process:
        await asyncio.sleep(0.5)
        await process.kill()
        await process.wait()


async def read_slowly(world: World) -> None:
    """A command writes without end, and somebody reads a little of it now and then."""
    async with await world.vm.create_process(ProcessParameters(args=["cat", "/dev/zero"], stdout=True)) as process:
        for _ in range(10):
            await process.stdio.stdout.read(100)
            await asyncio.sleep(0.05)
        await process.kill()
        await process.wait()


async def burn(world: World) -> None:
    """The guest's only processor has more than enough to do, until the deadline of who did that."""
    with contextlib.suppress(DeadlineExceeded):
        await world.vm.run("for i in 1 2 3 4; do while :; do :; done & done; wait", shell=True, timeout=0.5)


def _signal_once(name: str, number: str) -> str:
    return (
        "for p in /proc/[0-9]*; do { read comm <$p/comm; } 2>/dev/null && "
        f"[ $comm = {name} ] && kill {number} ${{p#/proc/}} 2>/dev/null; done; :\n"
    )


def _signal_all(name: str, number: str) -> str:
    """For half a second, as they come."""
    script = _signal_once(name, number)
    return f"end=$(($(date +%s%N) + 500000000))\nwhile [ $(date +%s%N) -lt $end ]; do\n{script}done\n"


_NO_DESCRIPTORS = (
    "import os, resource as r, time; old = r.prlimit(1, r.RLIMIT_NOFILE); "
    'last = max(map(int, os.listdir("/proc/1/fd"))); '
    "r.prlimit(1, r.RLIMIT_NOFILE, (last + 1, old[1])); time.sleep(0.5); r.prlimit(1, r.RLIMIT_NOFILE, old)"
)


def _signal(world: World, number: int) -> None:
    pid = world.newest_machine()
    if pid:  # else a phase that boots has not begun to
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


async def _in_guest(world: World, script: str) -> None:
    """Run a command; it may be the last that the VM hears."""
    with contextlib.suppress(ByreError):
        await world.vm.run(["sh", "-c", script], capture_output=True, timeout=IN_GUEST)
