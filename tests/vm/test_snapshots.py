"""Snapshots of a VM at work: what ran runs on, there and in every clone, each with an identity of its own (B52)."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import pytest

import byre
from byre.errors import ContainerNotFound, NotSupported
from tests.conformance.test_process import SOON
from tests.namespaces import needs_user_namespaces

pytestmark = pytest.mark.vm

#: Takes random numbers without end, as fast as it can; nothing of it is the host's.
TAKE = "while :; do cat /proc/sys/kernel/random/uuid >>/tmp/ids; done"

#: An interpreter that has something in its memory, and answers whoever writes to its FIFO.
WARM = """
import json, os
state = {"warm": list(range(1000))}
os.mkfifo("/tmp/ask")
open("/tmp/ready", "w").close()
while True:
    with open("/tmp/ask") as ask:
        path = ask.read()
    with open(path, "w") as answer:
        json.dump([os.getpid(), sum(state["warm"])], answer)
"""
ASK = "mkfifo /tmp/answer; echo -n /tmp/answer >/tmp/ask; cat /tmp/answer; rm /tmp/answer"


async def output(host: Any, script: str) -> str:
    result = await host.run(["sh", "-c", script], capture_output=True, check=True, timeout=SOON * 4)
    text: str = result.stdout.decode()
    return text


async def begin(host: Any, script: str) -> None:
    await output(host, f"({script}) </dev/null >/dev/null 2>&1 &")


async def until(host: Any, condition: str) -> None:
    await output(host, f"until {condition}; do sleep 0.05; done")


@pytest.mark.behaviour("B52")
async def test_what_runs_when_it_is_saved_has_other_random_numbers_in_each_clone(fresh_vm: Any) -> None:
    async def ids(host: Any) -> list[str]:
        return (await output(host, "cat /tmp/ids")).split()

    await begin(fresh_vm, TAKE)
    await until(fresh_vm, "test -s /tmp/ids")
    async with await fresh_vm.snapshot() as snap, snap.clone("one") as one, snap.clone("two") as two:
        before = len(await ids(one))
        all_vms = (fresh_vm, one, two)
        for vm in all_vms:  # each runs on
            await until(vm, f"test $(wc -l </tmp/ids) -gt {before + 20}")
        found = [await ids(vm) for vm in all_vms]
        begins = 0
        while len({tuple(each[: begins + 1]) for each in found}) == 1:
            begins += 1
        assert begins > 0
        rest = [set(each[begins:]) for each in found]
        assert sum(map(len, rest)) == len(set.union(*rest)), "two of them took the same random numbers"
        names = {await output(vm, "hostname; cat /etc/machine-id") for vm in all_vms}
        assert len(names) == 3


async def test_containers_an_interpreter_and_files_are_there_and_go_on(fresh_vm: Any, busybox: str) -> None:
    counter = "i=0; while :; do i=$((i+1)); echo $i >/count; sleep 0.05; done"
    container = await fresh_vm.create_container("counter", image=busybox, args=["sh", "-c", counter])
    await container.start()
    await begin(fresh_vm, f"exec python3 -I -c '{WARM}'")
    await until(fresh_vm, "test -e /tmp/ready")
    answer = await output(fresh_vm, ASK)
    async with contextlib.AsyncExitStack() as stack:
        one = await stack.enter_async_context(await fresh_vm.snapshot())
        vms = [fresh_vm, await stack.enter_async_context(one.clone())]
        two = await stack.enter_async_context(await vms[1].snapshot())
        vms.append(await stack.enter_async_context(two.clone()))
        for vm in vms:
            assert await output(vm, ASK) == answer
            there = await stack.enter_async_context(await vm.open_container("counter"))
            assert (await there.state())["state"] == "running"
            count = int(await output(there, "cat /count"))
            await until(there, f"test $(cat /count) -gt {count}")
            async with await vm.create_container(image=busybox, args=["echo", "another"]) as another:
                init = await another.start_process(None)
                await another.start()
                assert await init.stdio.stdout.read() == b"another\n"
                await init.close()
        await there.terminate()
        await asyncio.wait_for(there.wait(), SOON * 4)
        await there.delete()
        with pytest.raises(ContainerNotFound):
            await vms[2].open_container("counter")
        assert await output(vms[1], "true") == ""
    await container.close()


@pytest.mark.behaviour("B60")
async def test_each_clone_has_a_scratch_disk_of_its_own_and_gives_it_back(fresh_vm: Any, busybox: str) -> None:
    async def scratch_disks(vm: Any) -> int:
        return int(await output(vm, "cat /sys/block/sd*/ro | grep -c 0; true"))

    sleep = ["sleep", "infinity"]
    async with contextlib.AsyncExitStack() as stack:
        container = await fresh_vm.create_container("c", image=busybox, args=sleep, scratch="disk")
        await container.start()
        await output(container, "head -c 3000000 /dev/urandom >/big; md5sum /big >/sum; sync; echo before >/note")
        snap = await stack.enter_async_context(await fresh_vm.snapshot())
        await output(container, "echo of the first >/note; rm /big")
        clones = [await stack.enter_async_context(snap.clone()) for _ in range(2)]
        again = await stack.enter_async_context(await clones[0].snapshot())
        clones.append(await stack.enter_async_context(again.clone()))
        for number, clone in enumerate(clones):
            there = await stack.enter_async_context(await clone.open_container("c"))
            assert await output(there, "cat /note") == "before\n"
            await output(clone, "echo 3 >/proc/sys/vm/drop_caches")  # what is read comes from the disk
            assert await output(there, "md5sum -c /sum") == "/big: OK\n"
            await output(there, f"echo {number} >/note; dd if=/dev/zero of=/big count=9 conv=notrunc; sync")
        assert [await output(await clone.open_container("c"), "cat /note") for clone in clones] == [
            "0\n",
            "1\n",
            "2\n",
        ]
        assert await output(container, "cat /note") == "of the first\n"
        for vm in (*clones, fresh_vm):
            assert await scratch_disks(vm) == 1
            there = await stack.enter_async_context(await vm.open_container("c"))
            await there.terminate()
            await there.delete()
            async with asyncio.timeout(SOON):
                while await scratch_disks(vm):
                    await asyncio.sleep(0.05)
        await container.close()


async def test_a_volume_is_refused_by_its_name(
    fresh_vm: Any, busybox: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    mounts = [byre.Volume("kept", "/data")]
    async with await fresh_vm.create_container("c", image=busybox, args=["true"], mounts=mounts):
        with pytest.raises(NotSupported, match="kept"):
            await fresh_vm.snapshot()
        assert await output(fresh_vm, "echo on") == "on\n"


@needs_user_namespaces
async def test_directories_of_this_host_are_refused_by_name_for_as_long_as_they_are_there(
    fresh_vm: Any, busybox: str, tmp_path: Path
) -> None:
    (ours := tmp_path / "ours").mkdir()
    (its := tmp_path / "its").mkdir()
    mounts = [byre.HostDirectory(its, "/its")]
    container = await fresh_vm.create_container("c", image=busybox, args=["true"], mounts=mounts)
    async with await fresh_vm.share(ours):
        with pytest.raises(NotSupported, match=f"{its}, {ours}"):
            await fresh_vm.snapshot()
    with pytest.raises(NotSupported, match=f": {its} "):
        await fresh_vm.snapshot()
    await container.delete()
    await container.close()
    async with await fresh_vm.snapshot() as snap, snap.clone() as clone:
        assert await output(clone, "echo on") == "on\n"


async def test_the_vms_own_calls_and_streams_go_on_and_a_clones_have_ended(fresh_vm: Any) -> None:
    script = "trap 'echo broken >/tmp/broken' PIPE; cat; echo the end; sleep infinity"
    process = await fresh_vm.create_process(command(script))
    stdin, stdout, _ = process.stdio
    stdin.write(b"before\n")
    assert await stdout.readline() == b"before\n"
    working = [asyncio.create_task(output(fresh_vm, f"echo {number}")) for number in range(8)]
    async with await fresh_vm.snapshot() as snap:
        assert await asyncio.gather(*working) == [f"{number}\n" for number in range(8)]
        stdin.write(b"after\n")
        assert await stdout.readline() == b"after\n"
        async with snap.clone() as clone:
            await until(clone, "test -e /tmp/broken")
            assert await output(clone, "echo on") == "on\n"
        await process.close_stdin()
        assert await stdout.readline() == b"the end\n"
    await process.kill_tree()
    await process.close()


def command(script: str) -> Any:
    return byre.ProcessParameters(args=["sh", "-c", script], stdin=True, stdout=True)
