"""What goes wrong on this host: with clients, keepers, agents, QEMU's control channel, descriptors and the disk.

Rule: as in `strikes`; and whatever is taken from this process is given back before the round is judged.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .places import Kept
from .world import World, Wrong

#: Seconds for which something is taken away.
WHILE = 0.5

#: Seconds in which a stopped client's neighbour must get its answer.
SOON = 10.0


async def kill_keeper(world: World) -> None:
    _signal(_keeper(world), signal.SIGKILL)


async def stop_keeper(world: World) -> None:
    _signal(_keeper(world), signal.SIGSTOP)


async def kill_client(world: World) -> None:
    assert world.client is not None
    _signal(world.client.pid, signal.SIGKILL)


async def stop_client(world: World) -> None:
    """A client is stopped for a while; another one does not notice."""
    assert world.client is not None
    _signal(world.client.pid, signal.SIGSTOP)
    try:
        done = await world.vm.run(["echo", "beside"], capture_output=True, timeout=SOON)
        if done.stdout != b"beside\n":
            raise Wrong(f"{done!r} beside a client that was stopped")
        await asyncio.sleep(WHILE)
    finally:
        _signal(world.client.pid, signal.SIGCONT)


async def kill_agent(world: World) -> None:
    _signal(world.latest.vm.pid or 0, signal.SIGKILL)


async def stop_agent(world: World) -> None:
    _signal(world.latest.vm.pid or 0, signal.SIGSTOP)


async def silence_qmp(world: World) -> None:
    """What QEMU says over its control channel is no longer read."""
    owner = getattr(world.latest.vm, "_owner", None)
    if owner is not None:
        writer = owner.machine._qmp._client._writer
        if writer is not None:
            writer.transport.pause_reading()


async def take_own_descriptors(world: World) -> None:
    """This process may open nothing for a while."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, hard))
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        await asyncio.sleep(WHILE)
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def take_keepers_descriptors(world: World) -> None:
    """The keeper may open nothing for a while: no number is below its limit."""
    keeper = _keeper(world)
    with contextlib.suppress(ProcessLookupError):
        if keeper:
            soft, hard = resource.prlimit(keeper, resource.RLIMIT_NOFILE)
            resource.prlimit(keeper, resource.RLIMIT_NOFILE, (0, hard))
            await asyncio.sleep(WHILE)
            resource.prlimit(keeper, resource.RLIMIT_NOFILE, (soft, hard))


async def fill_disk(world: World) -> None:
    """The disk of the run directories and of temporary files is full for a while."""
    file = Path(tempfile.gettempdir(), "full")
    try:
        _fill(file)
        await asyncio.sleep(WHILE)
    finally:
        file.unlink()


def _fill(file: Path) -> None:
    with file.open("wb", buffering=0) as full, contextlib.suppress(OSError):
        while True:
            full.write(bytes(1 << 16))


async def forbid_writing(world: World) -> None:
    """The run directories and those of temporary files are read-only for a while."""
    with _read_only(tempfile.gettempdir()), _read_only(os.environ["XDG_RUNTIME_DIR"]):
        await asyncio.sleep(WHILE)


@contextlib.contextmanager
def _read_only(folder: str) -> Iterator[None]:
    """Mounted over itself: what is open already stays so."""
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def _keeper(world: World) -> int:
    """Of the VM that was begun last; 0: it has none yet."""
    assert isinstance(world.latest, Kept)
    return world.latest.keeper


def _signal(pid: int, number: int) -> None:
    if pid:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
