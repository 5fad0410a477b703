"""What a VM tells of itself: events, statistics, logs, processes (B27, B29, B31)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from byre import Resources, events
from byre.journal import EventReader
from byre.metrics import ContainerCollector

from .test_container import make
from .test_process import SOON

pytestmark = pytest.mark.vm

MIB = 1024 * 1024


async def until(reader: EventReader, kind: type[events.Event], container: str) -> list[events.Event]:
    """The container's events up to the first of this kind."""
    found: list[events.Event] = []
    async with asyncio.timeout(SOON):
        async for event in reader:
            if isinstance(event, events.ContainerEvent) and event.container == container:
                found.append(event)
                if isinstance(event, kind):
                    break
    return found


async def test_a_containers_life_is_told_in_order_to_every_reader(vm: Any, busybox: str) -> None:
    readers = [vm.events(), vm.events()]
    async with await make(vm, busybox, "true", id="told") as container:
        await container.start()
        await container.wait()
    for reader in readers:
        told = await until(reader, events.ContainerDeleted, "told")
        assert [event.kind for event in told] == ["created", "started", "exited", "deleted"]
        assert isinstance(told[2], events.ContainerExited)
        assert (told[2].code, told[2].oom) == (0, False)
    numbers = [event.number for event in await until(vm.events(after=0), events.ContainerDeleted, "told")]
    assert numbers == sorted(numbers)


@pytest.mark.behaviour("B29")
async def test_out_of_memory_and_a_kill_are_told_apart(vm: Any, busybox: str) -> None:
    reader = vm.events()
    hungry = ("sh", "-c", "x=12345678; while :; do x=$x$x; done")
    limits = Resources(memory_bytes=16 * MIB)
    async with await make(vm, busybox, *hungry, id="hungry", resources=limits) as container:
        await container.start()
        assert (await container.wait()).oom
    told = await until(reader, events.ContainerExited, "hungry")
    assert [event.kind for event in told[-2:]] == ["oom", "exited"]
    assert told[-1].details() == {"container": "hungry", "code": 137, "signal": 9, "oom": True}
    async with await make(vm, busybox, id="killed", resources=limits) as container:
        await container.start()
        await container.terminate()
        assert not (await container.wait()).oom
    told = await until(reader, events.ContainerExited, "killed")
    assert [event.kind for event in told] == ["created", "started", "killed", "exited"]
    assert told[-1].details() == {"container": "killed", "code": 137, "signal": 9, "oom": False}


@pytest.mark.behaviour("B31")
async def test_a_fork_bomb_is_seen(vm: Any, busybox: str) -> None:
    reader = vm.events()
    bomb = ("sh", "-c", "for i in 1 2 3 4 5 6 7 8 9; do sleep 1000 & done; wait")
    async with await make(vm, busybox, *bomb, id="bomb", resources=Resources(pids=5)) as container:
        await container.start()
        told = await until(reader, events.ContainerPidsLimit, "bomb")
        assert told[-1].details()["refused"] >= 1
        assert (await container.stats()).refused_forks >= 1


@pytest.mark.behaviour("B27")
async def test_statistics_and_processes(vm: Any, busybox: str) -> None:
    limits = Resources(memory_bytes=64 * MIB, pids=9)
    async with await make(vm, busybox, "sh", "-c", "sleep 1000", id="seen", resources=limits) as container:
        assert (await container.stats()).pids == 0, "one just created has its numbers too"
        await container.start()
        before = await container.stats()
        assert (before.memory_limit, before.pids_limit) == (64 * MIB, 9)
        await container.run(["sh", "-c", "i=0; while [ $i -lt 3000 ]; do i=$((i+1)); done"], timeout=SOON)
        after = next(found for found in await vm.stats() if found.container == "seen")
        assert after.processors_since(before) > 0
        assert before.processors_since(after) == 0
        found = {each.arguments: each for each in await container.processes()}
        assert found["sleep 1000"].state == "S"
        assert found["sleep 1000"].uid == 0
        assert found["sleep 1000"].memory_bytes > 0


@pytest.mark.behaviour("B20")
async def test_a_log_is_followed_to_its_end_from_any_byte(vm: Any, busybox: str) -> None:
    script = "echo one; while [ ! -e /go ]; do sleep 0.05; done; echo two"
    async with await make(vm, busybox, "sh", "-c", script) as container:
        await container.start()
        pieces: list[bytes] = []
        seen = asyncio.Event()

        async def follow() -> None:
            async for piece in container.follow_log(1):
                pieces.append(piece.data)
                seen.set()

        following = asyncio.ensure_future(follow())
        await asyncio.wait_for(seen.wait(), SOON)
        await container.files.write("/go", b"")
        await asyncio.wait_for(following, SOON)
        assert b"".join(pieces) == b"ne\ntwo\n"
        assert (await container.read_log(4)).data == b"two\n"


@pytest.mark.behaviour("B20")
async def test_a_log_is_bounded_and_what_is_gone_is_counted(vm: Any, busybox: str) -> None:
    size = 1000 * 1000
    async with await make(vm, busybox, "head", "-c", str(size), "/dev/zero") as container:
        await container.start()
        await container.wait()
        piece = await container.read_log(10)
        assert piece.ended
        assert 0 < len(piece.data) < size
        assert 10 + piece.dropped + len(piece.data) == size


async def test_disks_and_pauses_are_told(vm: Any, busybox: str, tmp_path: Any) -> None:
    image = tmp_path / "disk"
    image.write_bytes(bytes(MIB))
    reader = vm.events()
    await vm.detach_disk(await vm.attach_disk(image))
    await vm.pause()
    await vm.resume()
    found: list[Any] = []
    async with asyncio.timeout(SOON):
        async for event in reader:
            if isinstance(event, (events.DiskEvent, events.HealthChanged)):
                found.append(event.details())
                if found[-1].get("state") == "ok":
                    break
    assert [each.get("action") or each.get("state") for each in found] == ["attached", "detached", "paused", "ok"]
    assert found[0]["path"] == str(image)


async def test_what_containers_write_to_is_told_when_it_comes_and_goes(vm: Any, busybox: str) -> None:
    reader = vm.events()
    async with await make(vm, busybox, id="writer", scratch="disk", scratch_bytes=64 * MIB) as container:
        await container.start()
    found: list[str] = []
    async with asyncio.timeout(SOON):
        async for event in reader:
            if isinstance(event, events.DiskEvent) and event.path == "scratch of writer":
                found.append(event.action)
                if event.action == "detached":
                    break
    assert found == ["attached", "detached"]


@pytest.mark.behaviour("B27")
async def test_prometheus_reads_what_containers_use(vm: Any, busybox: str) -> None:
    registry = CollectorRegistry()
    collector = ContainerCollector(vm)
    registry.register(collector)
    async with await make(vm, busybox, id="measured", resources=Resources(pids=12)) as container:
        await container.start()
        await collector.refresh()
        labels = {"vm": vm.name or vm.id, "container": "measured"}
        assert registry.get_sample_value("byre_container_pids", labels) == 1
        assert registry.get_sample_value("byre_container_pids_limit", labels) == 12
        assert registry.get_sample_value("byre_container_memory_limit", labels) is None
        assert (registry.get_sample_value("byre_container_cpu_seconds_total", labels) or 0) > 0
    await collector.refresh()
    assert registry.get_sample_value("byre_container_pids", labels) is None
