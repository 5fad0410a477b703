"""What goes wrong, and what may follow from it.

    ENDS     the VM that is struck ends, and all that waits for it with ConnectionLost
    HANGS    nothing answers any more until it is ended: calls end by their deadlines
    HARMS    calls may fail with an error of byre's, or a command by SIGKILL; the VM lives on
    NOTHING  every result is the right one, maybe later

Rule: a strike says what it did in the guest by the guest's own means, so that it works the same for every phase.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from byre import ProcessParameters
from byre.errors import ByreError, DeadlineExceeded

from .world import World

ENDS, HANGS, HARMS, NOTHING = "ends", "hangs", "harms", "nothing"

#: Seconds for what a strike does in the guest.
IN_GUEST = 30.0


@dataclass(frozen=True)
class Strike:
    """`deadline` is what calls have where the strike makes them use it up."""

    name: str
    does: Callable[[World], Awaitable[None]]
    follows: str
    deadline: float | None = None


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
    channel.transport.abort()


async def take_memory(world: World) -> None:
    """A process of the VM takes all memory, until the kernel kills it (or another one)."""
    await _in_guest(world, "exec tail /dev/zero")


async def kill_runtime(world: World) -> None:
    """Whatever crun runs now is killed, for half a second."""
    await _in_guest(world, _KILL.replace("NAME", "crun"))


async def kill_inits(world: World) -> None:
    """Whatever is a container's first process is killed, for half a second."""
    await _in_guest(world, _KILL.replace("NAME", "sleep"))


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


async def burn(world: World) -> None:
    """The guest's only processor has more than enough to do, until the deadline of who did that."""
    with contextlib.suppress(DeadlineExceeded):
        await world.vm.run("for i in 1 2 3 4; do while :; do :; done & done; wait", shell=True, timeout=0.5)


STRIKES = (
    Strike("machine killed", kill_machine, ENDS),
    Strike("guest panics", panic, ENDS),
    Strike("channel cut", cut_channel, ENDS),
    Strike("machine stopped", stop_machine, HANGS, deadline=4.0),
    Strike("out of memory", take_memory, HARMS),
    Strike("runtime killed", kill_runtime, HARMS),
    Strike("inits killed", kill_inits, HARMS),
    Strike("scratch full", fill_scratch, HARMS),
    Strike("agent without descriptors", take_descriptors, HARMS),
    Strike("machine paused", pause_machine, NOTHING),
    Strike("time jumps", jump_in_time, NOTHING),
    Strike("output never read", never_read, NOTHING),
    Strike("processor taken", burn, NOTHING),
)

_KILL = """
end=$(($(date +%s%N) + 500000000))
while [ $(date +%s%N) -lt $end ]; do
    for p in /proc/[0-9]*; do read name <$p/comm && [ $name = NAME ] && kill -9 ${p#/proc/}; done 2>/dev/null
done; :
"""

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
