"""Scratch disks and volumes, on every vehicle that is a machine: B22, B60 and B64 for what containers write."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from byre import Volume, errors, volumes
from tests.conftest import machine_options

from .test_container import make, output
from .test_process import SOON

pytestmark = pytest.mark.vm

MIB = 2**20

#: A program that has a volume in a container, has written to it, and waits to be killed.
OWNER = """
import asyncio, sys
import byre

async def main(image, options):
    async with byre.UtilityVM(**options) as vm:
        mounts = [byre.Volume("data", "/data")]
        async with await vm.create_container(image=image, args=["sleep", "infinity"], mounts=mounts) as container:
            await container.start()
            await container.run(["sh", "-c", "echo synced > /data/owner; sync"], check=True)
            print("ready", flush=True)
            await asyncio.Event().wait()

asyncio.run(main(sys.argv[1], eval(sys.argv[2])))
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    return tmp_path


def on_disk(vm: Any) -> int:
    """Bytes that the one scratch or volume of this VM takes on the host."""
    (held,) = vm.container_disks._held.values()
    return os.fstat(held.disk.file).st_blocks * 512


@contextlib.asynccontextmanager
async def running(vm: Any, image: str, **options: Any) -> Any:
    async with await make(vm, image, **options) as container:
        await container.start()
        yield container


@pytest.mark.behaviour("B64")
async def test_a_full_scratch_disk_is_an_error_and_what_is_freed_goes_back_to_the_host(
    vm: Any, busybox: str
) -> None:
    async with running(vm, busybox, scratch="disk", scratch_bytes=16 * MIB) as container:
        begun = on_disk(vm)
        assert begun < MIB
        filled = await output(container, "sh", "-c", "dd if=/dev/urandom of=/large bs=1M count=32; sync; df -m /")
        assert "No space left on device" in filled
        assert on_disk(vm) > 12 * MIB
        with pytest.raises(errors.NoSpace):
            await container.files.write("/another", bytes(MIB))
        assert await output(container, "sh", "-c", "rm /large; sync; echo small > /small; cat /small") == "small\n"
        assert on_disk(vm) < begun + MIB
    assert vm.container_disks._held == {}


async def test_a_scratch_disk_is_a_root_like_any_other(vm: Any, busybox: str) -> None:
    script = "rm /etc/passwd; mkdir /etc/new; mv /etc/group /etc/new; ls /etc /etc/new; stat -c %a /tmp /"
    shown = []
    for scratch in ("tmpfs", "disk"):
        async with running(vm, busybox, scratch=scratch) as container:
            shown.append(await output(container, "sh", "-c", script))
    assert shown[0] == shown[1]


async def test_a_new_volume_begins_with_what_the_image_has_there(vm: Any, busybox: str) -> None:
    script = "cd $0 && ls -lnd . && ls -lnR . && cat passwd"
    mounts = [Volume("etc", "/etc"), Volume("tmp", "/tmp/"), Volume("new", "/new/place")]
    async with running(vm, busybox) as container:
        image = await output(container, "sh", "-c", script, "/etc")
    async with running(vm, busybox, mounts=mounts) as container:
        plain = await output(container, "sh", "-c", "cat /etc/passwd; stat -c %a,%u /tmp /new/place; ls /new/place")
        assert plain.splitlines()[-2:] == ["1777,0", "755,0"]
        assert plain.splitlines()[:-2] == image.splitlines()[-len(plain.splitlines()[:-2]) :]
        await container.run(["sh", "-c", "rm /etc/passwd; echo mine > /etc/mine"], check=True)
    async with running(vm, busybox, mounts=mounts) as container:
        assert "mine" in await output(container, "ls", "/etc"), "as it was left"
        assert "passwd" not in (await output(container, "ls", "/etc")).split()


@pytest.mark.behaviour("B60")
async def test_a_volume_outlives_its_containers_and_its_vm(vm: Any, fresh_vm: Any, busybox: str) -> None:
    mounts = [Volume("data", "/data")]
    async with running(vm, busybox, mounts=mounts) as one:
        await one.run(["sh", "-c", "echo one > /data/one"], check=True)
        async with running(vm, busybox, mounts=[Volume("data", "/data", read_only=True)]) as two:
            assert await output(two, "cat", "/data/one") == "one\n", "containers of one VM share it"
            assert "Read-only" in await output(two, "touch", "/data/two")
        with pytest.raises(errors.VolumeInUse) as caught:
            await make(fresh_vm, busybox, "true", mounts=mounts)
        assert caught.value.data["vm"] == vm.id
        assert volumes.inspect("data").vm == vm.id
    async with running(fresh_vm, busybox, mounts=mounts) as container:
        assert await output(container, "cat", "/data/one") == "one\n", "its end has written all of it"
        await container.run(["sh", "-c", "echo synced > /data/three; sync"], check=True)
        os.kill(fresh_vm.machine_pid, signal.SIGKILL)
        await asyncio.wait_for(fresh_vm.wait(), SOON)
    async with running(vm, busybox, mounts=mounts) as container:
        assert await output(container, "sh", "-c", "cat /data/*") == "one\nsynced\n"


@pytest.mark.behaviour("B43")
async def test_a_killed_owner_leaves_a_usable_volume_and_no_lock(vm: Any, busybox: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    owner = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", OWNER, busybox, repr(machine_options())),
        stdout=asyncio.subprocess.PIPE,
        env=environment,
    )
    try:
        assert owner.stdout is not None
        assert await asyncio.wait_for(owner.stdout.readline(), SOON * 3) == b"ready\n"
        assert volumes.inspect("data").pid == owner.pid
    finally:
        owner.kill()
        await owner.communicate()
    async with running(vm, busybox, mounts=[Volume("data", "/data")]) as container:
        assert await output(container, "cat", "/data/owner") == "synced\n"


@pytest.mark.behaviour("B22")
async def test_a_container_that_could_not_be_made_holds_nothing(vm: Any, busybox: str) -> None:
    options: dict[str, Any] = {"scratch": "disk", "mounts": [Volume("data", "/data")]}
    async with await make(vm, busybox, "true", id="there"):
        for wrong, error in (
            ({"user": "nobody-knows"}, errors.UserNotFound),
            ({"id": "there"}, errors.ContainerExists),
        ):
            with pytest.raises(error):
                await make(vm, busybox, "true", **options, **wrong)
            assert vm.container_disks._held == {}
            assert volumes.inspect("data").vm == ""
    with pytest.raises(errors.InvalidRequest):
        await make(vm, busybox, "true", scratch="disk", scratch_bytes=1)


@pytest.mark.behaviour("B22")
async def test_whoever_deletes_the_container_its_disks_are_free(vm: Any, busybox: str) -> None:
    maker = await make(vm, busybox, "true", id="left", scratch="disk", mounts=[Volume("data", "/data")])
    await maker.close()
    assert volumes.inspect("data").vm == vm.id
    await (await vm.open_container("left")).delete()
    async with asyncio.timeout(SOON):
        while vm.container_disks._held:
            await vm.containers()  # a round trip, in which the guest's word comes
    volumes.remove("data")
