"""What every machine promises, shown on the one made of memory and on QEMU.

Nothing here needs a guest that has booted: the machine's own life is the subject.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import os
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from byre.errors import (
    ConnectionLost,
    InvalidRequest,
    MachineFailed,
    NotSupported,
    ResourceExhausted,
)
from byre.machines.base import Machine
from byre.machines.config import MachineConfig, Saved
from byre.machines.disks import MAX_DISKS
from byre.machines.memory import MemoryMachine
from byre.machines.qemu import QemuMachine
from tests.conftest import machine_options

Make = Callable[..., Machine]
Scenario = Callable[[Machine], Awaitable[None]]

#: "Within a second" (B42), and room for a host that does other things as well.
SOON = float(os.environ.get("BYRE_TEST_SOON", "5"))


def memory_machine(saved: Saved | None = None) -> Machine:
    nothing = Path(os.devnull)
    config = MachineConfig(kernel=nothing, initramfs=nothing, root=nothing, saved=saved)
    return MemoryMachine(lambda far: far.close, config=config)


def qemu_machine(saved: Saved | None = None) -> Machine:
    import byre_images

    image = byre_images.ensure()
    config = MachineConfig(kernel=image.kernel, initramfs=image.initramfs, root=image.root, **machine_options())
    return QemuMachine(dataclasses.replace(config, saved=saved))


@pytest.fixture(params=[memory_machine, pytest.param(qemu_machine, marks=pytest.mark.vm)])
def make(request: pytest.FixtureRequest) -> Make:
    function: Make = request.param
    return function


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """B41: no thread, descriptor or process of a machine outlives it."""
    threads, descriptors = set(threading.enumerate()), set(os.listdir("/proc/self/fd"))
    yield
    gc.collect()
    assert set(threading.enumerate()) <= threads
    assert set(os.listdir("/proc/self/fd")) <= descriptors


def run(make: Make, scenario: Scenario, *, start: bool = True) -> None:
    async def main() -> None:
        machine = make()
        try:
            if start:
                await machine.start()
            await scenario(machine)
        finally:
            await machine.kill()

    asyncio.run(asyncio.wait_for(main(), 60))


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(bytes(4096))
    return paths


def test_any_number_of_waiters_hear_the_same_end(make: Make) -> None:
    async def scenario(machine: Machine) -> None:
        waiters = [asyncio.create_task(machine.wait()) for _ in range(5)]
        await asyncio.sleep(0)
        waiters[0].cancel()
        await machine.kill()
        results = await asyncio.gather(*waiters, return_exceptions=True)
        assert isinstance(results[0], asyncio.CancelledError)
        assert all(result is machine.exited for result in results[1:])
        assert await machine.wait() is machine.exited
        assert machine.exited is not None
        assert machine.exited.reason == "killed"

    run(make, scenario)


@pytest.mark.behaviour("B51")
def test_ended_twice_from_many_tasks_and_after_the_end(make: Make) -> None:
    async def scenario(machine: Machine) -> None:
        await asyncio.gather(machine.kill(), machine.shutdown(SOON), machine.kill(), machine.shutdown(SOON))
        first = machine.exited
        await machine.shutdown(SOON)
        await machine.kill()
        assert machine.exited is first is not None

    run(make, scenario)


@pytest.mark.behaviour("B51")
def test_ended_in_order(make: Make) -> None:
    async def scenario(machine: Machine) -> None:
        await machine.shutdown(60)
        assert machine.exited is not None
        assert machine.exited.reason == "host-quit"

    run(make, scenario)


@pytest.mark.behaviour("B51")
def test_ended_before_its_start(make: Make) -> None:
    async def scenario(machine: Machine) -> None:
        await machine.shutdown(SOON)
        assert machine.exited is not None
        assert machine.exited.reason == "never-started"
        with pytest.raises(MachineFailed):
            await machine.start()

    run(make, scenario, start=False)


def test_it_starts_once(make: Make) -> None:
    async def scenario(machine: Machine) -> None:
        with pytest.raises(MachineFailed):
            await machine.start()
        assert machine.exited is None

    run(make, scenario)


@pytest.mark.behaviour("B42")
def test_its_end_ends_what_waits_for_it(make: Make, files: list[Path]) -> None:
    async def scenario(machine: Machine) -> None:
        waiting = [asyncio.create_task(machine.wait_console(text)) for text in ("never", "ever")]
        await asyncio.sleep(0)
        await machine.kill()
        async with asyncio.timeout(SOON):
            results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(result) for result in results] == [ConnectionLost] * 2
        for call in (machine.connect(), machine.pause(), machine.attach_disk(files[0]), machine.wait_console("x")):
            with pytest.raises(ConnectionLost, match="ended"):
                await call

    run(make, scenario)


def test_cancelling_a_wait_is_not_the_machines_end(make: Make) -> None:
    async def scenario(machine: Machine) -> None:
        task = asyncio.create_task(machine.wait_console("never"))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert machine.exited is None

    run(make, scenario)


def test_paused_and_resumed_as_often_as_one_likes(make: Make) -> None:
    async def scenario(machine: Machine) -> None:
        for _ in range(2):
            await machine.pause()
            await machine.pause()
            await machine.resume()
            await machine.resume()

    run(make, scenario)


@pytest.mark.behaviour("B60")
def test_a_disk_is_attached_once_and_detached_by_the_second_removal(make: Make, files: list[Path]) -> None:
    async def scenario(machine: Machine) -> None:
        first, second = await asyncio.gather(machine.attach_disk(files[0]), machine.attach_disk(files[0]))
        other = await machine.attach_disk(files[1], read_only=False)
        assert first is second
        assert (first.target, first.lun) != (other.target, other.lun)
        assert first.serial != other.serial
        await machine.detach_disk(first)
        await machine.detach_disk(second)
        with pytest.raises(InvalidRequest):
            await machine.detach_disk(first)
        again = await machine.attach_disk(files[2])
        assert again.target == first.target

    run(make, scenario)


def test_what_cannot_be_attached_takes_no_place(make: Make, files: list[Path], tmp_path: Path) -> None:
    async def scenario(machine: Machine) -> None:
        for path in (tmp_path, tmp_path / "missing"):
            with pytest.raises((InvalidRequest, MachineFailed)):
                await machine.attach_disk(path)
        assert (await machine.attach_disk(files[0])).target == 0

    run(make, scenario)


def test_an_attachment_that_is_cancelled_leaves_nothing(make: Make, files: list[Path]) -> None:
    async def scenario(machine: Machine) -> None:
        for steps in range(8):
            task = asyncio.create_task(machine.attach_disk(files[0]))
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            result = (await asyncio.gather(task, return_exceptions=True))[0]
            if not isinstance(result, BaseException):
                await machine.detach_disk(result)
        disk = await machine.attach_disk(files[0])
        assert disk.target == 0
        await machine.detach_disk(disk)

    run(make, scenario)


@pytest.mark.behaviour("B62")
def test_the_disk_after_the_last_place(make: Make, tmp_path: Path) -> None:
    async def scenario(machine: Machine) -> None:
        paths = [tmp_path / f"disk{number}" for number in range(MAX_DISKS + 1)]
        for path in paths:
            path.write_bytes(bytes(512))
        disks = await asyncio.gather(*map(machine.attach_disk, paths[:-1]))
        assert len({disk.target for disk in disks}) == MAX_DISKS
        with pytest.raises(ResourceExhausted):
            await machine.attach_disk(paths[-1])
        await machine.detach_disk(disks[3])
        await machine.attach_disk(paths[-1])

    run(make, scenario)


def test_detaching_after_the_end_is_harmless(make: Make, files: list[Path]) -> None:
    async def scenario(machine: Machine) -> None:
        disk = await machine.attach_disk(files[0])
        await machine.kill()
        await machine.detach_disk(disk)

    run(make, scenario)


def test_a_saved_machine_goes_on_and_so_do_others_more_than_once(
    make: Make, files: list[Path], tmp_path: Path
) -> None:
    memory, state = tmp_path / "memory", tmp_path / "state"
    found: list[Saved] = []

    async def save(machine: Machine) -> None:
        assert (await machine.identity()) == (await make().identity())
        disk = await machine.attach_disk(files[0])
        found.append(await machine.save(memory, state))
        assert found[-1].disks == (disk,)
        await machine.resume()
        await machine.detach_disk(disk)

    async def goes_on(machine: Machine) -> None:
        if machine_options()["transport"] != "vsock":  # there the guest dials, once it has booted
            (await machine.connect()).close()
        (old,) = found[-1].disks
        assert (await machine.attach_disk(files[0])) == old
        new = await machine.attach_disk(files[1])
        assert (new.target, new.serial) != (old.target, old.serial)
        await machine.pause()
        await machine.resume()
        await machine.detach_disk(new)

    async def save_again(machine: Machine) -> None:
        assert machine.exited is None
        found.append(await machine.save(memory, state))

    run(make, save)
    before = memory.read_bytes()
    for _ in range(2):
        run(lambda: make(found[0]), goes_on)
    assert memory.read_bytes() == before
    memory, state = tmp_path / "memory2", tmp_path / "state2"
    run(lambda: make(found[0]), save_again)
    run(lambda: make(found[1]), goes_on)


def test_what_was_not_saved_does_not_start(make: Make, tmp_path: Path) -> None:
    memory, state = tmp_path / "memory", tmp_path / "state"
    memory.write_bytes(b"")
    state.write_bytes(b"no state" * 100)

    async def start(machine: Machine) -> None:
        with pytest.raises(MachineFailed):
            await machine.start()
        assert machine.exited is not None

    run(lambda: make(Saved(memory=memory, state=state)), start, start=False)
    run(lambda: make(Saved(memory=memory, state=tmp_path / "missing")), start, start=False)


def test_a_disk_that_the_guest_can_write_to_is_not_saved(make: Make, files: list[Path], tmp_path: Path) -> None:
    async def scenario(machine: Machine) -> None:
        disk = await machine.attach_disk(files[0], read_only=False)
        with pytest.raises(NotSupported, match=files[0].name):
            await machine.save(tmp_path / "memory", tmp_path / "state")
        await machine.detach_disk(disk)
        await machine.save(tmp_path / "memory", tmp_path / "state")

    run(make, scenario)


def test_what_a_hung_memory_machine_does_is_bounded(files: list[Path]) -> None:
    async def scenario(machine: Machine) -> None:
        assert isinstance(machine, MemoryMachine)
        machine.write_console("last words\n")
        machine.hang()
        task = asyncio.create_task(machine.pause())
        await asyncio.sleep(0)
        await machine.shutdown(0.05)
        with pytest.raises(ConnectionLost):
            await task
        assert machine.console_tail() == "last words"

    run(memory_machine, scenario)


def test_a_guest_that_cannot_be_played_is_told() -> None:
    def broken(far: socket.socket) -> Callable[[], object]:
        raise RuntimeError("no agent")

    async def main() -> None:
        machine = MemoryMachine(broken)
        with pytest.raises(RuntimeError):
            await machine.start()
        assert machine.exited is not None

    asyncio.run(main())
