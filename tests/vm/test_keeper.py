"""Detached VMs with a real machine: the keeper's death is the VM's, a client's death is nobody's."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import byre
from byre import ProcessParameters, detached, errors, rundir
from byre.machines.config import MIN_MEMORY_MIB
from byre.mounts import HostDirectory
from tests.conformance.test_process import SOON
from tests.conftest import machine_options
from tests.namespaces import needs_user_namespaces

pytestmark = pytest.mark.vm


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    return tmp_path


@pytest.fixture
async def detached_vm() -> AsyncIterator[Any]:
    vm = byre.UtilityVM(name="kept", detached=True, **machine_options())
    async with vm:
        yield vm
    if rundir.is_up("kept"):
        await detached.end("kept")


def wait_gone(pid: int) -> None:
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([fd], [], [], SOON)[0], f"process {pid} did not end"
    finally:
        os.close(fd)


async def machine_pid(vm: Any) -> int:
    return int((await vm.info())["machine"]["machine"]["pid"])


@pytest.mark.behaviour("B43")
async def test_clients_come_and_go_and_find_containers_and_processes_as_they_left_them(
    detached_vm: Any, busybox: str
) -> None:
    container = await detached_vm.create_container(
        "web", image=busybox, args=["sh", "-c", "sleep 1; sleep infinity"]
    )
    await container.start()
    process = await detached_vm.create_process(ProcessParameters(args=["sleep", "1234"]))
    pid = process.pid
    await container.close()
    await process.close()
    await detached_vm.close()
    async with await byre.UtilityVM.attach("kept") as again:
        assert [(c["id"], c["state"]) for c in await again.containers()] == [("web", "running")]
        listed = (await again.bridge.call("process.list"))["processes"]
        assert pid in [p["pid"] for p in listed] or (await again.run(["kill", "-0", str(pid)])).returncode == 0
        found = await again.open_container("web")
        assert (await found.run(["echo", "hi"], capture_output=True, timeout=SOON)).stdout == b"hi\n"
        await found.terminate()
        assert (await asyncio.wait_for(found.wait(), SOON)).code == 137
        await found.delete()
        await found.close()


@pytest.mark.behaviour("B43")
async def test_two_clients_work_side_by_side(detached_vm: Any, busybox: str) -> None:
    async with await byre.UtilityVM.attach("kept") as other:
        mine = await detached_vm.create_container("one", image=busybox, args=["cat"])
        yours = await other.create_container("two", image=busybox, args=["cat"])
        async with mine, yours:
            inits = [await c.create_process(None) for c in (mine, yours)]
            for c in (mine, yours):
                await c.start()
            for number, init in enumerate(inits):
                init.stdio.stdin.write(b"%d" % number)
                await init.close_stdin()
            outputs = await asyncio.gather(*(init.stdio.stdout.read() for init in inits))
            assert outputs == [b"0", b"1"]
            assert [(await asyncio.wait_for(c.wait(), SOON)).code for c in (mine, yours)] == [0, 0]


@pytest.mark.behaviour("B42", "B43")
async def test_the_keepers_death_ends_the_vm_and_its_clients_calls(detached_vm: Any, runtime: Path) -> None:
    keeper = int(rundir.find("kept").info()["pid"])
    machine = await machine_pid(detached_vm)
    async with await detached_vm.create_process(ProcessParameters(args=["sleep", "1000"])) as process:
        waiting = asyncio.create_task(process.wait())
        os.kill(keeper, signal.SIGKILL)
        with pytest.raises(errors.ConnectionLost):
            await asyncio.wait_for(waiting, 5)
    wait_gone(machine)
    with pytest.raises(errors.VMNotFound):
        await byre.UtilityVM.attach("kept")
    assert rundir.sweep("kept")
    assert list((runtime / "byre").iterdir()) == []


@pytest.mark.behaviour("B42")
async def test_the_machines_death_is_told_with_its_reason_and_ends_the_keeper(detached_vm: Any) -> None:
    keeper = int(rundir.find("kept").info()["pid"])
    machine = await machine_pid(detached_vm)
    async with await detached_vm.create_process(ProcessParameters(args=["sleep", "1000"])) as process:
        os.kill(machine, signal.SIGKILL)
        with pytest.raises(errors.ConnectionLost, match="SIGKILL"):
            await asyncio.wait_for(process.wait(), 5)
    wait_gone(keeper)
    assert "SIGKILL" in rundir.find("kept").info()["died"]
    assert rundir.sweep("kept")


@pytest.mark.behaviour("B51")
async def test_shutdown_from_a_client_ends_all_and_repeats_harmlessly(detached_vm: Any, runtime: Path) -> None:
    keeper, machine = int(rundir.find("kept").info()["pid"]), await machine_pid(detached_vm)
    async with await byre.UtilityVM.attach("kept") as other:
        await asyncio.gather(detached_vm.shutdown(), other.shutdown())
        await detached_vm.shutdown()
    wait_gone(keeper)
    wait_gone(machine)
    assert list((runtime / "byre").iterdir()) == []


@pytest.mark.behaviour("B40")
async def test_a_boot_that_fails_tells_the_starter_why_and_leaves_nothing(runtime: Path) -> None:
    vm = byre.UtilityVM(
        name="kept", detached=True, kernel_arguments=("rdinit=/nowhere", "init=/nowhere"), **machine_options()
    )
    with pytest.raises(errors.BootFailed) as caught:
        await vm.start()
    assert "console" in caught.value.data and "panic" in str(caught.value.data["console"])
    with pytest.raises(errors.InvalidRequest, match="too little"):
        await byre.UtilityVM(name="kept", detached=True, memory_mib=MIN_MEMORY_MIB - 1).start()
    assert list((runtime / "byre").iterdir()) == []


@pytest.mark.behaviour("B41")
async def test_a_cancelled_boot_leaves_nothing(runtime: Path) -> None:
    task = asyncio.create_task(byre.UtilityVM(name="kept", detached=True, **machine_options()).start())
    while not (keeper := rundir.find("kept").info().get("pid")):
        assert not task.done()
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    wait_gone(keeper)
    assert list((runtime / "byre").iterdir()) == []


@pytest.mark.behaviour("B3")
async def test_a_client_that_does_not_read_costs_the_keeper_no_memory(detached_vm: Any) -> None:
    keeper = int(rundir.find("kept").info()["pid"])

    def resident() -> int:
        return int(Path(f"/proc/{keeper}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    unread = [
        await detached_vm.create_process(ProcessParameters(args=["cat", "/dev/zero"], stdout=True))
        for _ in range(10)
    ]
    result = await detached_vm.run(["head", "-c", "4000000", "/dev/zero"], capture_output=True, timeout=SOON)
    assert len(result.stdout) == 4000000
    assert resident() - before < 32 * 1024 * 1024
    for process in unread:
        await process.kill()
        await process.close()


@needs_user_namespaces
async def test_a_shared_directory_is_the_keepers_and_goes_with_its_container(
    detached_vm: Any, busybox: str, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    container = await detached_vm.create_container(
        "c1", image=busybox, args=["sleep", "infinity"], mounts=[HostDirectory(shared, "/it")]
    )
    await container.start()
    await container.close()
    await detached_vm.close()
    async with await byre.UtilityVM.attach("kept") as later:
        container = await later.open_container("c1")
        await container.run(["sh", "-c", "echo written > /it/file"], check=True)
        assert (shared / "file").read_text() == "written\n"
        await container.delete()
        done = await later.run(["ls", "/run/byre/s"], capture_output=True)
        assert done.stdout == b""
        async with await later.share(shared, read_only=True) as share:
            done = await later.run(["cat", f"{share.path}/file"], capture_output=True)
            assert done.stdout == b"written\n"
