"""Snapshots of machines of memory: the VM goes on whatever happens, and nothing stays behind."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from byre import errors, templates
from byre.machines.memory import MemoryMachine
from tests.unit.test_clone import SOON, ClonedVM, Machines


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    assert os.listdir(templates.Store().root) == []


def booted(machines: Machines) -> ClonedVM:
    return ClonedVM(machines, template="off")


async def works(vm: Any) -> bool:
    return bool((await vm.run(["echo"], capture_output=True)).stdout == b"echo\n")


async def test_the_vm_goes_on_and_its_clones_from_there() -> None:
    machines = Machines()
    async with booted(machines) as vm, await vm.snapshot() as snap:
        assert await works(vm)
        assert machines.made[0].running
        async with snap.clone() as one, snap.clone("two") as two:
            assert await works(one)
            assert await works(two)
            async with await two.snapshot() as again, again.clone() as three:
                assert await works(three)
    told = machines.configured
    assert [request["hostname"] for request in told] == ["byre", "", "byre", "two", "", "byre"]
    for field in ("entropy", "machine_id"):
        assert len({request[field] for request in told if request["hostname"]}) == 4
    assert all(request["realtime_ns"] for request in told)


async def test_disks_are_where_they_were(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(4096))
    machines = Machines()
    async with booted(machines) as vm:
        place = await vm.attach_disk(disk)
        async with await vm.snapshot() as snap, snap.clone() as clone:
            assert [found.path for found in machines.made[-1].disks.values()] == [disk]
            assert await clone.attach_disk(disk) == place


async def test_a_closed_snapshot_has_no_more_clones_and_those_that_run_go_on() -> None:
    async with booted(Machines()) as vm:
        snap = await vm.snapshot()
        async with snap.clone() as clone:
            await snap.close()
            assert await works(clone)
        with pytest.raises(errors.InvalidRequest, match="closed"):
            await snap.clone().start()


async def test_a_paused_vm_is_not_saved() -> None:
    async with booted(Machines()) as vm:
        await vm.pause()
        with pytest.raises(errors.InvalidRequest, match="paused"):
            await vm.snapshot()
        await vm.resume()
        await (await vm.snapshot()).close()


async def test_without_room_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "MIN_FREE", 1 << 62)
    async with booted(Machines()) as vm:
        with pytest.raises(errors.ResourceExhausted, match="MiB are free"):
            await vm.snapshot()


@pytest.mark.parametrize("fails", ["system.quiesce", "save"])
async def test_what_goes_wrong_leaves_a_vm_that_works(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*_: Any) -> dict[str, Any]:
        raise errors.NotSupported("not today")

    machines = Machines()
    if fails == "save":
        monkeypatch.setattr(MemoryMachine, "_save", refuse)
    else:
        machines.answers[fails] = refuse
    async with booted(machines) as vm:
        with pytest.raises(errors.NotSupported, match="not today"):
            await vm.snapshot()
        assert await works(vm)
        assert "hostname" in machines.configured[-1], "the guest's processes were not let go on"
        assert len(machines.configured) == 2


async def test_two_at_once_come_one_after_the_other() -> None:
    machines = Machines()
    async with booted(machines) as vm:
        for snap in await asyncio.gather(vm.snapshot(), vm.snapshot()):
            await snap.close()
        assert len(machines.configured) == 3
        assert await works(vm)


@pytest.mark.behaviour("B41")
@pytest.mark.parametrize("turns", range(0, 40, 4))
async def test_cancelled_at_any_point_the_vm_goes_on_and_nothing_is_left(turns: int) -> None:
    machines = Machines()
    async with booted(machines) as vm:
        descriptors = len(os.listdir("/proc/self/fd"))
        saving = asyncio.create_task(vm.snapshot())
        for _ in range(turns):
            await asyncio.sleep(0)
        if saving.cancel():
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(saving, SOON)
        else:
            await saving.result().close()
        assert machines.made[0].running
        assert await asyncio.wait_for(works(vm), SOON)
        assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.behaviour("B41")
async def test_a_clone_that_does_not_start_leaves_nothing() -> None:
    async def refuse(_: Any) -> dict[str, Any]:
        raise errors.ByreError("the entropy of the VM could not be set")

    machines = Machines()
    async with booted(machines) as vm, await vm.snapshot() as snap:
        machines.answers["system.configure"] = refuse
        with pytest.raises(errors.ByreError, match="entropy"):
            await snap.clone().start()
        assert machines.made[-1].exited is not None
        assert await works(vm)
