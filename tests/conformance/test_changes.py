"""B28, B60 to B62: a container that runs gets and loses mounts, disks, ports and limits; or all stays as it was."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from byre import AddDisk, AddMount, AddPort, RemoveMount, RemovePort, Resources, UpdateResources, errors
from byre.oci.layout import open_image
from byre.oci.store import LayerStore

from .test_container import make, output

pytestmark = pytest.mark.vm


@pytest.fixture
def disk(busybox: str) -> str:
    """A squashfs image that no VM has."""
    with open_image(busybox) as found:
        layers, lease = LayerStore().lease(found, lambda _: None)
        with lease:
            return str(layers[0].path)


async def mounts(container: Any) -> list[str]:
    return (await output(container, "cut", "-d", " ", "-f", "2,4", "/proc/mounts")).splitlines()


@pytest.mark.behaviour("B28")
async def test_mounts_come_and_go(vm: Any, container: Any) -> None:
    await vm.files.mkdir("/run/shared", parents=True, exist_ok=True)
    await vm.files.write("/run/shared/file", b"of the VM\n")
    before = await mounts(container)
    plan = await container.modify(
        [
            AddMount(source="/run/shared", destination="/new/place"),
            AddMount(source="/run/shared/file", destination="/etc/one", read_only=True),
            AddMount(size_bytes=1 << 20, destination="/scratch"),
        ]
    )
    assert [step.how for step in plan] == ["live"] * 3
    assert await output(container, "sh", "-c", "echo back > /new/place/reply; cat /etc/one") == "of the VM\n"
    assert await vm.files.read("/run/shared/reply") == b"back\n"
    assert "Read-only" in await output(container, "sh", "-c", "echo x > /etc/one")
    full = await output(container, "sh", "-c", "head -c 2000000 /dev/zero > /scratch/x; wc -c < /scratch/x")
    assert str(1 << 20) in full.split()
    with pytest.raises(errors.PathExists):
        await container.modify(AddMount(size_bytes=1, destination="/new/../scratch/"))
    await container.modify([RemoveMount(destination=path) for path in ("/new/place", "/etc/one", "/scratch")])
    assert await mounts(container) == before
    assert await vm.files.read("/run/shared/file") == b"of the VM\n"
    with pytest.raises(errors.PathNotFound):
        await container.modify(RemoveMount(destination="/scratch"))


@pytest.mark.behaviour("B65")
async def test_a_mount_does_not_follow_a_link_out_of_the_container(vm: Any, container: Any) -> None:
    await vm.run(["mkdir", "-p", "/run/outside"], check=True)
    await output(container, "mkdir", "-p", "/run/outside")
    await output(container, "ln", "-s", "/../../../../../run/outside", "/link")
    await container.modify(AddMount(size_bytes=1 << 16, destination="/link/there"))
    assert any(line.startswith("/run/outside/there ") for line in await mounts(container)), "its own /run"
    assert (await vm.run(["ls", "-A", "/run/outside"], capture_output=True)).stdout == b""
    await output(container, "rm", "/link")
    await container.modify(RemoveMount(destination="/link/there"))
    assert not any("outside" in line for line in await mounts(container))


@pytest.mark.behaviour("B60", "B61")
async def test_a_disk_is_added_and_removed_and_one_in_use_stays(vm: Any, container: Any, disk: str) -> None:
    attached = await vm.attach_disk(disk)  # one more user of the same place
    await container.modify([AddDisk(path=disk, destination="/d"), AddDisk(path=disk, destination="/e")])
    assert "busybox" in await output(container, "ls", "/d/bin", "/e/bin")
    assert "Read-only" in await output(container, "touch", "/d/x")
    with pytest.raises(errors.DiskInUse, match=f"{container.id}:/d, {container.id}:/e"):
        await vm.bridge.call("disk.unmount", target=attached.target, lun=attached.lun)
    async with await container.create_process({"args": ["sleep", "1000"], "cwd": "/d"}):
        with pytest.raises(errors.MountInUse):
            await container.modify([RemoveMount(destination="/e"), RemoveMount(destination="/d")])
        assert "busybox" in await output(container, "ls", "/e/bin"), "the step before was taken back"
    await container.modify([RemoveMount(destination="/d"), RemoveMount(destination="/e")])
    await vm.detach_disk(attached)


@pytest.mark.behaviour("B28")
async def test_when_the_last_step_fails_nothing_has_changed(vm: Any, container: Any, disk: str) -> None:
    limits = [f"/sys/fs/cgroup/{name}" for name in ("memory.max", "cpu.max", "pids.max")]
    before = [await output(container, "cat", *limits), await mounts(container), await vm.published()]
    steps = [
        UpdateResources(resources=Resources(memory_bytes=32 << 20, cpus=0.25, pids=20)),
        AddMount(size_bytes=1 << 20, destination="/fresh"),
        AddDisk(path=disk, destination="/disk"),
        AddPort(host="127.0.0.1:0", guest="80"),
        AddMount(source="/no/such/thing", destination="/x"),
    ]
    with pytest.raises(errors.PathNotFound) as caught:
        await container.modify(steps)
    assert "/no/such/thing" in caught.value.data["failed"]
    assert caught.value.data["not_rolled_back"] == []
    after = [await output(container, "cat", *limits), await mounts(container), await vm.published()]
    assert after == before


@pytest.mark.behaviour("B28")
async def test_ports_come_and_go(vm: Any, container: Any) -> None:
    await container.modify(AddPort(host="127.0.0.1:0", guest="80"))
    (found,) = [port for port in await vm.published() if port.container == container.id]
    await container.modify(RemovePort(host=str(found.host)))
    assert [port for port in await vm.published() if port.container == container.id] == []


@pytest.mark.behaviour("B28")
async def test_a_plan_says_what_would_be_done_and_does_nothing(vm: Any, busybox: str) -> None:
    @dataclasses.dataclass
    class AddGPU:
        index: int = 0

    wanted: list[Any] = [
        UpdateResources(resources=Resources(pids=7)),
        AddMount(size_bytes=1, destination="/x"),
        AddGPU(),
    ]
    async with await make(vm, busybox) as container:
        plan = await container.modify(wanted, dry_run=True)
        assert [step.how for step in plan] == ["live", "restart", "unsupported"]
        with pytest.raises(errors.NotSupported) as caught:
            await container.modify(wanted)
        assert len(caught.value.data["plan"]) == 3
        await container.start()
        assert (await container.stats()).pids_limit != 7
        assert [step.how for step in await container.modify(wanted[:2], dry_run=True)] == ["live", "live"]
        assert not any(line.startswith("/x ") for line in await mounts(container))
        await container.terminate()
        await container.wait()
        assert {step.how for step in await container.modify(wanted, dry_run=True)} == {"unsupported"}


@pytest.mark.behaviour("B62")
async def test_the_disk_after_the_last_place_is_refused(fresh_vm: Any, tmp_path: Path) -> None:
    from byre.machines.disks import MAX_DISKS

    attached = []
    for number in range(MAX_DISKS):
        path = tmp_path / str(number)
        path.write_bytes(bytes(4096))
        attached.append(await fresh_vm.attach_disk(path))
    last = tmp_path / "last"
    last.write_bytes(bytes(4096))
    with pytest.raises(errors.ResourceExhausted):
        await fresh_vm.attach_disk(last)
    await fresh_vm.detach_disk(attached[7])
    assert (await fresh_vm.attach_disk(last)).target == attached[7].target
