"""What holds disks for containers: counted, given back once, whoever dies; machine and guest are played."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from byre import container_disks, errors, volumes
from byre.container_disks import KeeperDisks

from .test_vm_host import Storage, booted

MIB = 2**20


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr(volumes, "PATIENCE", 0.05)


@pytest.mark.behaviour("B60")
async def test_a_volume_is_there_once_until_its_last_lease_is_dropped() -> None:
    storage = Storage()
    async with booted(**storage.handlers()) as (vm, _):
        data = volumes.create("data", 64 * MIB).path
        names = [await vm.container_disks.hold(lease, "c", data, 0) for lease in ("a", "b")]
        scratch = await vm.container_disks.hold("a", "c", None, 64 * MIB)
        assert names == ["L0", "L0"] and scratch == "L1"
        assert [disk.read_only for disk in vm.machine.disks.values()] == [False, False]
        await vm.container_disks.drop("a")
        assert storage.mounted == {0} and list(vm.machine.disks) == [0]
        with pytest.raises(errors.VolumeInUse):
            volumes.take(data, "other")
        await asyncio.gather(vm.container_disks.drop("b"), vm.container_disks.drop("b"))
        assert not storage.mounted and not vm.machine.disks
        assert volumes.inspect("data").vm == ""


async def test_the_guests_word_that_a_container_is_gone_gives_its_disks_back() -> None:
    storage = Storage()
    async with booted(**storage.handlers()) as (vm, guest):
        await vm.container_disks.hold("a", "c", volumes.create("data", 64 * MIB).path, 0)
        guest.bridge.tell("container.deleted", {"container": "c", "lease": "another"})
        await vm.containers()
        assert storage.mounted == {0}
        guest.bridge.tell("container.deleted", {"container": "c", "lease": "a"})
        async with asyncio.timeout(10):
            while vm.machine.disks:
                await vm.containers()


@pytest.mark.behaviour("B60")
async def test_what_the_guest_cannot_mount_is_detached_and_unlocked() -> None:
    storage = Storage()
    storage.fail = "mount"
    async with booted(**storage.handlers()) as (vm, _):
        with pytest.raises(errors.StorageFailed):
            await vm.container_disks.hold("a", "c", volumes.create("data", 64 * MIB).path, 0)
        assert not vm.machine.disks
        volumes.remove("data")


@pytest.mark.behaviour("B61")
async def test_what_the_guest_still_uses_stays_and_is_tried_again() -> None:
    storage = Storage()
    busy = True

    def unmount(request: dict[str, Any]) -> dict[str, Any]:
        if busy:
            raise errors.DiskInUse("a layer of c")
        return storage.unmount(request)

    async with booted(**{**storage.handlers(), "disk__unmount": unmount}) as (vm, _):
        data = volumes.create("data", 64 * MIB).path
        await vm.container_disks.hold("a", "c", data, 0)
        await vm.container_disks.drop("a")
        with pytest.raises(errors.VolumeInUse):
            volumes.take(data, "other")
        busy = False
        await vm.container_disks.drop("a")
        assert not vm.machine.disks


@pytest.mark.parametrize("state", ["never made", "another's", "its own"])
async def test_a_lease_whose_maker_died_is_dropped(monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    monkeypatch.setattr(container_disks, "CLAIM_TIMEOUT", 0)
    asked = asyncio.Event()

    def answer(_: dict[str, Any]) -> dict[str, Any]:
        asked.set()
        if state == "never made":
            raise errors.ContainerNotFound("c")
        return {"state": {"lease": "a" if state == "its own" else "b"}}

    storage = Storage()
    async with booted(**{**storage.handlers(), "container__state": answer}) as (vm, _):
        await vm.container_disks.hold("a", "c", volumes.create("data", 64 * MIB).path, 0)
        async with asyncio.timeout(10):
            await asked.wait()
            while vm.machine.disks and state != "its own":
                await vm.containers()
        assert len(vm.machine.disks) == (state == "its own")


async def test_what_was_written_is_synced_before_the_vm_is_shut_down() -> None:
    synced: list[bool] = []

    def sync(_: dict[str, Any]) -> dict[str, Any]:
        synced.append(True)
        return {}

    for volume in (False, True):
        storage = Storage()
        async with booted(**{**storage.handlers(), "disk__sync": sync}) as (vm, _):
            if volume:
                await vm.container_disks.hold("a", "c", volumes.create("data", 64 * MIB).path, 0)
        assert len(synced) == volume
    volumes.remove("data")


async def test_a_client_that_gives_up_has_the_keeper_drop_it() -> None:
    """Its call had succeeded after all."""
    dropped = asyncio.Event()
    asked = asyncio.Event()

    async def hold(_: dict[str, Any]) -> dict[str, Any]:
        asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            return {"disk": "1"}  # noqa: B012 - what a cancellation came too late for

    def drop(request: dict[str, Any]) -> dict[str, Any]:
        assert request["lease"] == "a"
        dropped.set()
        return {}

    async with booted(vm__hold_disk=hold, vm__drop_disks=drop) as (vm, _):
        task = asyncio.create_task(KeeperDisks(vm.bridge).hold("a", "c", None, 64 * MIB))
        await asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(dropped.wait(), 10)
