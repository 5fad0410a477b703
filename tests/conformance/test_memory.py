"""Memory while nobody reads, on both sides, and growth over many processes (B3, B16)."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from byre import ProcessParameters
from byre.streams import BridgeReader
from byre_proto.limits import INITIAL_WINDOW

from .test_process import SOON, read_all, read_until, shell

MIB = 1024 * 1024

#: What one side may grow by: an agent's pipes and windows, an asyncio reader's buffers; not a flood.
ROOM = 64 * MIB


def resident(pid: int) -> int:
    """Resident memory of a process of this machine, in bytes."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


async def agent(vm: Any) -> dict[str, int]:
    """What the agent of a VM holds: bytes of memory, descriptors, zombies."""
    script = "cat /proc/1/statm; ls /proc/1/fd | wc -l; grep -l 'State:.Z' /proc/[0-9]*/status 2>/dev/null | wc -l"
    lines = (await vm.run(["sh", "-c", script], capture_output=True)).stdout.split(b"\n")
    return {"memory": int(lines[0].split()[1]) * 4096, "fds": int(lines[1]), "zombies": int(lines[2])}


@pytest.mark.vm
@pytest.mark.behaviour("B3")
async def test_memory_is_bounded_while_one_side_writes_without_end(vm: Any) -> None:
    before = resident(os.getpid()), await agent(vm)
    async with (
        await vm.create_process(ProcessParameters(args=["cat", "/dev/zero"], stdout=True)) as out,
        await vm.create_process(ProcessParameters(args=["sleep", "1000"], stdin=True)) as into,
    ):
        writer, unread = into.stdio.stdin, out.stdio.stdout
        assert writer is not None
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3):
                while True:
                    writer.write(bytes(65536))
                    await writer.drain()
        assert isinstance(unread, BridgeReader)
        assert unread.received <= INITIAL_WINDOW
        assert resident(os.getpid()) - before[0] < ROOM
        assert (await agent(vm))["memory"] - before[1]["memory"] < ROOM
        assert await out.signal(0), "it waits"


@pytest.mark.vm
@pytest.mark.behaviour("B3")
@pytest.mark.not_on("serial")  # 24 MiB take minutes there; the test above shows the same
async def test_a_thousand_unread_streams_beside_one_that_is_read(vm: Any) -> None:
    """500 processes of two streams each; every one fills what it is guaranteed, and none takes more."""
    before = resident(os.getpid()), await agent(vm)
    unread = []
    script = "head -c 65536 /dev/zero >&2 & exec head -c 65536 /dev/zero"  # more than pipe and window hold
    try:
        for _ in range(50):
            batch = (shell(vm, script, stdout=True, stderr=True) for _ in range(10))
            unread += await asyncio.gather(*batch)
        async with await shell(vm, f"head -c {8 * MIB} /dev/zero", stdout=True) as process:
            assert len(await read_all(process)) == 8 * MIB
        assert resident(os.getpid()) - before[0] < ROOM + 1000 * 2 * 65536
        assert (await agent(vm))["memory"] - before[1]["memory"] < ROOM
    finally:
        for process in unread:
            await process.kill()
            await process.close()


@pytest.mark.behaviour("B16")
async def test_many_processes_at_once_and_in_turn(host: Any) -> None:
    for _ in range(100):
        assert (await host.run(["true"])).returncode == 0
    results = await asyncio.gather(*(host.run(["echo", "x"], capture_output=True) for _ in range(50)))
    assert {bytes(result.stdout) for result in results} == {b"x\n"}


@pytest.mark.vm
@pytest.mark.behaviour("B16")
@pytest.mark.not_on("serial")  # minutes there; the test above shows the same
@pytest.mark.timeout(300)
async def test_a_thousand_in_turn_and_two_hundred_at_once_leave_nothing(vm: Any) -> None:
    for _ in range(20):
        await vm.run(["true"])
    before = await agent(vm)
    for _ in range(1000):
        assert (await vm.run(["true"])).returncode == 0
    results = await asyncio.gather(*(vm.run(["echo", "x"], capture_output=True) for _ in range(200)))
    assert {result.stdout for result in results} == {b"x\n"}
    after = await agent(vm)
    assert after["zombies"] == before["zombies"] == 0
    assert after["fds"] <= before["fds"], "the first count may meet a pipe that is just being closed"
    assert after["memory"] - before["memory"] < 8 * MIB


@pytest.mark.vehicle("local")
@pytest.mark.behaviour("B16")
async def test_the_agent_as_a_program_leaves_nothing() -> None:
    import byre

    async with byre.LocalHost() as local:
        async with await shell(local, "echo $PPID; read x", stdin=True, stdout=True) as process:
            agent_pid = int(await read_until(process, b"\n"))
        for _ in range(20):
            await local.run(["true"])
        fds, memory = len(os.listdir(f"/proc/{agent_pid}/fd")), resident(agent_pid)
        for _ in range(1000):
            assert (await local.run(["true"])).returncode == 0
        await asyncio.wait_for(
            asyncio.gather(*(local.run(["echo", "x"], capture_output=True) for _ in range(200))), SOON * 3
        )
        assert len(os.listdir(f"/proc/{agent_pid}/fd")) == fds
        assert resident(agent_pid) - memory < 8 * MIB
        children = Path(f"/proc/{agent_pid}/task/{agent_pid}/children").read_text().split()
        assert not children, "nothing runs and nothing is a zombie"
