"""The table of disks: one place for one file, counted; cancelled, failed and hung work leaves it right."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from byre.errors import InvalidRequest, MachineFailed, ResourceExhausted
from byre.machines import disks
from byre.machines.disks import MAX_DISKS, Disk, DiskTable


class Recorder:
    """A bus that notes what it is told; `gate` holds it up, `fail_*` makes it fail."""

    def __init__(self) -> None:
        self.plugged: dict[int, Disk] = {}
        self.log: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.entered = asyncio.Event()
        self.fail_plug = self.fail_unplug = False
        self.table = DiskTable(self.plug, self.unplug)

    async def plug(self, disk: Disk) -> None:
        self.log.append(f"plug {disk.path.name}")
        self.entered.set()
        await self.gate.wait()
        if self.fail_plug:
            raise MachineFailed("no")
        assert disk.target not in self.plugged
        self.plugged[disk.target] = disk

    async def unplug(self, disk: Disk) -> None:
        self.log.append(f"unplug {disk.path.name}")
        self.entered.set()
        await self.gate.wait()
        if self.fail_unplug:
            raise MachineFailed("stuck")
        self.plugged.pop(disk.target, None)


Test = Callable[[Recorder, list[Path]], Coroutine[Any, Any, None]]


def with_bus(test: Test) -> Callable[[Path], None]:
    def run(tmp_path: Path) -> None:
        async def main() -> None:
            await test(Recorder(), [file(tmp_path, name) for name in "abc"])

        asyncio.run(main())

    run.__name__ = test.__name__
    return run


def file(directory: Path, name: str) -> Path:
    path = directory / name
    path.write_bytes(b"x")
    return path


@pytest.mark.behaviour("B60")
@with_bus
async def test_attached_once_and_detached_by_the_second_removal(bus: Recorder, files: list[Path]) -> None:
    a = files[0]
    other_name = a.with_name("link")
    other_name.symlink_to(a)
    first, second = await bus.table.attach(a, read_only=True), await bus.table.attach(other_name, read_only=True)
    assert first is second
    await bus.table.detach(first)
    assert bus.plugged
    await bus.table.detach(second)
    assert not bus.plugged
    assert bus.log == ["plug a", "unplug a"]
    with pytest.raises(InvalidRequest):
        await bus.table.detach(first)


@pytest.mark.behaviour("B60")
@with_bus
async def test_added_twice_at_once_it_is_plugged_once(bus: Recorder, files: list[Path]) -> None:
    disks = await asyncio.gather(*(bus.table.attach(files[0], read_only=True) for _ in range(5)))
    assert len(set(map(id, disks))) == 1
    assert bus.log == ["plug a"]


@pytest.mark.behaviour("B60")
@with_bus
async def test_a_failed_plug_is_tidied_and_the_place_free(bus: Recorder, files: list[Path]) -> None:
    bus.fail_plug = True
    results = await asyncio.gather(
        *(bus.table.attach(files[0], read_only=True) for _ in range(2)), return_exceptions=True
    )
    assert all(isinstance(result, MachineFailed) for result in results)
    bus.fail_plug = False
    assert (await bus.table.attach(files[1], read_only=True)).target == 0
    assert not [entry for entry in bus.log if entry.endswith("c")]


@with_bus
async def test_a_cancelled_plug_is_tidied(bus: Recorder, files: list[Path]) -> None:
    bus.gate.clear()
    task = asyncio.create_task(bus.table.attach(files[0], read_only=True))
    await bus.entered.wait()
    bus.entered.clear()
    task.cancel()
    await bus.entered.wait()
    assert bus.log == ["plug a", "unplug a"]
    assert not task.done()  # it ends when the removal has
    bus.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await bus.table.attach(files[1], read_only=True)).target == 0


@with_bus
async def test_of_two_who_wait_one_may_be_cancelled(bus: Recorder, files: list[Path]) -> None:
    bus.gate.clear()
    first = asyncio.create_task(bus.table.attach(files[0], read_only=True))
    await bus.entered.wait()
    second = asyncio.create_task(bus.table.attach(files[0], read_only=True))
    await asyncio.sleep(0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    bus.gate.set()
    await bus.table.detach(await first)
    assert not bus.plugged


@with_bus
async def test_a_cancelled_removal_still_removes(bus: Recorder, files: list[Path]) -> None:
    disk = await bus.table.attach(files[0], read_only=True)
    bus.gate.clear()
    bus.entered.clear()
    task = asyncio.create_task(bus.table.detach(disk))
    await bus.entered.wait()
    task.cancel()
    bus.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not bus.plugged
    assert (await bus.table.attach(files[1], read_only=True)).target == disk.target


@pytest.mark.parametrize("how", ["plug", "unplug"])
def test_an_emulator_that_hangs_holds_a_cancellation_up_for_a_bounded_time(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disks, "LATE", 0.05)

    async def test(bus: Recorder, files: list[Path]) -> None:
        if how == "unplug":
            disk = await bus.table.attach(files[0], read_only=True)
            bus.entered.clear()
        bus.gate.clear()
        work = bus.table.attach(files[0], read_only=True) if how == "plug" else bus.table.detach(disk)
        task = asyncio.create_task(work)
        await bus.entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 10)
        bus.gate.set()
        again = await bus.table.attach(files[0], read_only=True)
        assert again.target == 1  # the first place is lost, whatever comes of it later

    with_bus(test)(tmp_path)


@with_bus
async def test_asked_for_again_during_its_removal_it_comes_back(bus: Recorder, files: list[Path]) -> None:
    disk = await bus.table.attach(files[0], read_only=True)
    bus.gate.clear()
    bus.entered.clear()
    removal = asyncio.create_task(bus.table.detach(disk))
    await bus.entered.wait()
    again = asyncio.create_task(bus.table.attach(files[0], read_only=True))
    await asyncio.sleep(0)
    bus.gate.set()
    await removal
    disk = await again
    assert bus.plugged == {disk.target: disk}
    await bus.table.detach(disk)
    assert not bus.plugged


@with_bus
async def test_a_place_that_could_not_be_cleared_is_never_given_again(bus: Recorder, files: list[Path]) -> None:
    disk = await bus.table.attach(files[0], read_only=True)
    bus.fail_unplug = True
    with pytest.raises(MachineFailed, match="stuck"):
        await bus.table.detach(disk)
    assert (await bus.table.attach(files[0], read_only=True)).target != disk.target


@with_bus
async def test_what_went_wrong_first_is_reported(bus: Recorder, files: list[Path]) -> None:
    bus.fail_plug = bus.fail_unplug = True
    with pytest.raises(MachineFailed, match="no"):
        await bus.table.attach(files[0], read_only=True)


@pytest.mark.behaviour("B62")
@with_bus
async def test_beyond_the_last_place(bus: Recorder, files: list[Path]) -> None:
    many = [file(files[0].parent, f"disk{number}") for number in range(MAX_DISKS + 1)]
    disks = await asyncio.gather(*(bus.table.attach(path, read_only=True) for path in many[:-1]))
    assert sorted(disk.target for disk in disks) == list(range(MAX_DISKS))
    with pytest.raises(ResourceExhausted):
        await bus.table.attach(many[-1], read_only=True)
    await bus.table.attach(many[0], read_only=True)  # which needs no place
    await bus.table.detach(disks[7])
    assert (await bus.table.attach(many[-1], read_only=True)).target == disks[7].target


@with_bus
async def test_what_is_no_disk_is_refused(bus: Recorder, files: list[Path]) -> None:
    fifo = files[0].with_name("fifo")
    os.mkfifo(fifo)  # QEMU would wait for a writer, and the whole machine with it
    for path in (fifo, fifo.parent):
        with pytest.raises(InvalidRequest):
            await bus.table.attach(path, read_only=True)
    with pytest.raises(MachineFailed, match="No such file"):
        await bus.table.attach(fifo.with_name("none"), read_only=True)
    await bus.table.attach(files[0], read_only=True)
    with pytest.raises(InvalidRequest, match="read-only"):
        await bus.table.attach(files[0], read_only=False)
    assert bus.log == ["plug a"]


@with_bus
async def test_an_open_file_keeps_its_lock_until_the_disk_is_gone(bus: Recorder, files: list[Path]) -> None:
    def locked() -> bool:
        with files[0].open() as other:
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    with files[0].open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        disk = await bus.table.attach(Path("a name"), read_only=False, file=file.fileno())
        assert await bus.table.attach(Path("another"), read_only=False, file=file.fileno()) is disk
        assert disk.file not in (None, file.fileno())
    await bus.table.detach(disk)
    assert locked() and bus.table.path_of(disk.serial) == "a name"
    await bus.table.detach(disk)
    assert not locked() and bus.table.path_of(disk.serial) == ""
    with files[0].open("r+b") as file:
        await bus.table.attach(files[0], read_only=False, file=file.fileno())
    bus.table.end()
    assert not locked()
