"""LocalHost: the agent as a child, from its start to the death of its owner."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import byre
from byre import ProcessParameters, errors, local

SOON = 30.0


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


async def gone(*pids: int) -> None:
    async with asyncio.timeout(SOON):
        while any(alive(pid) for pid in pids):
            await asyncio.sleep(0.02)


async def test_it_ends_with_all_that_it_started() -> None:
    async with byre.LocalHost() as host:
        assert (host.os, host.is_oci) == ("linux", False)
        process = await host.create_process(ProcessParameters(args=["sleep", "1000"]))
        agent, child = host.pid, process.pid
        assert agent is not None
        assert alive(agent)
        assert alive(child)
    assert not alive(agent)
    await gone(child)
    with pytest.raises(errors.ConnectionLost):
        await process.wait()
    await process.close()
    await host.close()
    with pytest.raises(errors.ConnectionLost):
        await host.run(["true"])


async def test_an_agent_that_hangs_is_killed_with_all_that_it_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "STOP_TIMEOUT", 0.2)
    async with byre.LocalHost() as host:
        process = await host.create_process(
            ProcessParameters(args=["sh", "-c", "sleep 1000 & echo $!; wait"], stdout=True)
        )
        assert host.pid is not None
        assert process.stdio.stdout is not None
        pids = [host.pid, process.pid, int(await process.stdio.stdout.readline())]
        os.kill(host.pid, signal.SIGSTOP)
    await gone(*pids)


@pytest.mark.behaviour("B42")
async def test_the_death_of_the_agent_ends_what_waits() -> None:
    async with byre.LocalHost() as host:
        running = asyncio.create_task(host.run(["sleep", "1000"]))
        await host.run(["true"])
        assert host.pid is not None
        os.kill(host.pid, signal.SIGKILL)
        with pytest.raises(errors.ConnectionLost):
            await asyncio.wait_for(running, SOON)


OWNER = """
    import asyncio, byre
    async def main():
        async with byre.LocalHost() as host:
            process = await host.create_process(byre.ProcessParameters(args=["sleep", "1000"]))
            print(host.pid, process.pid, flush=True)
            await asyncio.sleep(1000)
    asyncio.run(main())
"""


@pytest.mark.behaviour("B43")
async def test_it_dies_with_its_owner() -> None:
    owner = await asyncio.create_subprocess_exec(
        sys.executable, "-c", textwrap.dedent(OWNER), stdout=asyncio.subprocess.PIPE
    )
    assert owner.stdout is not None
    try:
        async with asyncio.timeout(SOON):
            agent, child = map(int, (await owner.stdout.readline()).split())
        assert alive(agent)
        assert alive(child)
    finally:
        owner.kill()
        await owner.wait()
    await gone(agent, child)
    await owner.stdout.read()


async def test_it_is_started_once_and_not_used_before() -> None:
    host = byre.LocalHost()
    with pytest.raises(errors.ConnectionLost, match="async with"):
        await host.run(["true"])
    async with host:
        with pytest.raises(errors.MachineFailed):
            await host.start()


@pytest.mark.behaviour("B41")
@pytest.mark.parametrize("turns", [1, 3, 6, 12])
async def test_cancelling_the_start_leaves_nothing(turns: int) -> None:
    host = byre.LocalHost()
    starting = asyncio.create_task(host.start())
    for _ in range(turns):
        await asyncio.sleep(0.005)
    starting.cancel()
    await asyncio.wait([starting], timeout=SOON)
    if not starting.cancelled():  # it was too quick
        await host.close()
    if host.pid is not None:
        await gone(host.pid)


async def test_its_own_environment_is_not_changed() -> None:
    async with byre.LocalHost() as host:
        shown = (await host.run(["env"], capture_output=True)).stdout.decode()
    assert os.environ.get("PYTHONPATH", "") == dict(
        line.split("=", 1) for line in shown.splitlines() if line.startswith("PYTHONPATH=")
    ).get("PYTHONPATH", "")


def test_importing_byre_is_cheap() -> None:
    code = "import sys, byre; print(sorted(m for m in sys.modules if m in ('asyncio', 'subprocess', 'msgpack')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    for name in byre.__all__:
        assert getattr(byre, name) is not None
    assert set(dir(byre)) == set(byre.__all__)
    with pytest.raises(AttributeError):
        byre.no_such_name  # noqa: B018
