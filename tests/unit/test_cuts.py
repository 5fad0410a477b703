"""The agent on a socket, and a host whose way to it is cut: nothing is lost; and when it is over, it is over."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from byre import ProcessParameters, errors
from byre.process import GuestProcess
from byre.sockethost import SocketHost
from byre.stream_table import MAX_BACKLOG
from tests.cuts.__main__ import measure, peak_mib
from tests.cuts.agent import cut_host, listening_agent
from tests.cuts.proxy import PLACES, CuttingProxy

SOON = float(os.environ.get("BYRE_TEST_SOON", "20"))

#: A session is given up after this, in the tests that wait for it; seconds.
BRIEF = 0.5


async def start(host: SocketHost, *args: str, stdin: bool = False) -> GuestProcess:
    return await host.start_process(ProcessParameters(args=args, stdin=stdin, stdout=True))


async def rests(host: SocketHost) -> None:
    """Until the host has noticed that its channel was cut."""
    async with asyncio.timeout(SOON):
        while host.bridge._channel is not None:
            await asyncio.sleep(0.001)


async def gone(pid: int) -> None:
    async with asyncio.timeout(SOON):
        with contextlib.suppress(ProcessLookupError):
            while True:
                os.kill(pid, 0)
                await asyncio.sleep(0.005)


# -- nothing is lost ---------------------------------------------------------------------------------------


async def test_a_hundred_megabytes_and_processes_through_hundreds_of_cuts() -> None:
    """Among them cuts of every kind; the agent's memory does not grow with what passes."""
    found = await measure(100_000_000, 300, seed=5)
    assert found["wrong"] == 0
    assert found["processes"] > 0
    assert all(found[place] > 0 for place in PLACES), found
    assert found["agent_mib"] < 64


@pytest.mark.behaviour("B2", "B10")
async def test_what_happens_during_a_cut_is_told_after_it() -> None:
    """Calls are asked and answered, processes end, their output and exit codes come, each once."""
    async with cut_host() as (host, proxy, _):
        process = await start(host, "sh", "-c", "read x; echo $x; exit 7", stdin=True)
        proxy.barred = True
        proxy.cut()
        await rests(host)
        calls = [asyncio.create_task(host.bridge.call("process.list")) for _ in range(100)]
        ping = asyncio.create_task(host.bridge.ping(SOON))
        assert process.stdio.stdin is not None and process.stdio.stdout is not None
        process.stdio.stdin.write(b"word\n")
        done, _ = await asyncio.wait([*calls, ping], timeout=0.05)
        assert not done
        proxy.barred = False
        async with asyncio.timeout(SOON):
            for call in calls:
                assert len((await call)["processes"]) == 1
            await ping
            assert await process.stdio.stdout.read() == b"word\n"
            assert (await process.wait()).code == 7
        assert proxy.connections == 2
        await process.close()


@pytest.mark.behaviour("B3")
async def test_memory_is_bounded_while_the_way_is_broken() -> None:
    """Whoever writes stands still, on both sides."""
    async with cut_host() as (host, proxy, agent):
        endless = await start(host, "cat", "/dev/zero")
        sink = await start(host, "cat", stdin=True)
        assert endless.stdio.stdout is not None and sink.stdio.stdin is not None
        await endless.stdio.stdout.readexactly(10_000_000)
        before = peak_mib(agent.pid)
        proxy.barred = True
        proxy.cut()
        await rests(host)
        for _ in range(64):
            sink.stdio.stdin.write(bytes(100_000))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.01):
                    await sink.stdio.stdin.drain()
        assert host.bridge.session.data_backlog <= 2 * MAX_BACKLOG
        assert peak_mib(agent.pid) - before <= 16
        proxy.barred = False
        async with asyncio.timeout(SOON):
            await endless.stdio.stdout.readexactly(10_000_000)
            await endless.kill()
            await sink.kill()
        await endless.close()
        await sink.close()


async def test_a_call_keeps_its_own_deadline_while_the_way_is_broken() -> None:
    async with cut_host() as (host, proxy, _):
        proxy.barred = True
        proxy.cut()
        await rests(host)
        with pytest.raises(errors.DeadlineExceeded):
            await host.bridge.call("process.list", timeout=0.05)
        with pytest.raises(errors.DeadlineExceeded):
            await host.bridge.ping(0.05)
        proxy.barred = False
        assert (await asyncio.wait_for(host.bridge.call("process.list"), SOON))["processes"] == []


# -- it is over --------------------------------------------------------------------------------------------


@pytest.mark.behaviour("B9", "B42")
async def test_a_session_that_is_not_carried_on_in_time_is_given_up_by_both_sides(tmp_path: Path) -> None:
    """Every call and stream ends with connection-lost; the processes go on, without a host."""
    async with cut_host(resume_seconds=BRIEF) as (host, proxy, _):
        reader = await start(host, "cat", stdin=True)
        sleeper = await start(host, "sleep", "1000")
        assert reader.stdio.stdin is not None and reader.stdio.stdout is not None
        waiting = [
            asyncio.create_task(reader.wait()),
            asyncio.create_task(reader.stdio.stdout.read()),
            asyncio.create_task(host.bridge.call("process.wait", timeout=None, process=sleeper.id)),
        ]
        proxy.barred = True
        proxy.cut()
        for task in waiting:
            with pytest.raises(errors.ConnectionLost, match="no other one came within"):
                await asyncio.wait_for(task, SOON)
        with pytest.raises(errors.ConnectionLost):
            await host.run(["true"])
        with pytest.raises(errors.ConnectionLost):
            await sleeper.wait()
        await gone(reader.pid)
        os.kill(sleeper.pid, 0)
        async with SocketHost(proxy._target) as another:
            listed = (await another.bridge.call("process.list"))["processes"]
            assert {entry["pid"] for entry in listed if entry["exit"] is None} == {sleeper.pid}
        for process in (reader, sleeper):
            await process.close()


@pytest.mark.behaviour("B42")
async def test_the_agents_death_is_no_cut(tmp_path: Path) -> None:
    path = f"{tmp_path}/agent"
    async with listening_agent(path) as agent, SocketHost(path) as host:
        process = await start(host, "sleep", "1000")
        agent.kill()
        begin = time.monotonic()
        with pytest.raises(errors.ConnectionLost, match="no agent listens"):
            await process.wait()
        assert time.monotonic() - begin < 1.0
        os.kill(process.pid, signal.SIGKILL)
        await process.close()
        await agent.wait()
        os.unlink(path)


async def test_an_agent_that_began_anew_has_another_session(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        async with listening_agent(f"{tmp_path}/agent") as agent:
            proxy = stack.enter_context(CuttingProxy(f"{tmp_path}/way", f"{tmp_path}/agent"))
            host = SocketHost(proxy.path)
            await host.start()
            process = await start(host, "sleep", "1000")
            proxy.barred = True
            agent.terminate()
            await agent.wait()
        async with listening_agent(f"{tmp_path}/agent"):
            proxy.barred = False
            with pytest.raises(errors.ConnectionLost, match="session"):
                await asyncio.wait_for(process.wait(), SOON)
            await process.close()
            await host.close()


async def test_another_host_takes_the_place_of_one_that_was_cut(tmp_path: Path) -> None:
    """Its processes go on; what it had under way is over when it comes back."""
    async with cut_host() as (host, proxy, _):
        process = await start(host, "sleep", "1000")
        proxy.barred = True
        proxy.cut()
        await rests(host)
        async with SocketHost(proxy._target) as another:
            assert len((await another.bridge.call("process.list"))["processes"]) == 1
        proxy.barred = False
        with pytest.raises(errors.ConnectionLost, match="session"):
            await asyncio.wait_for(process.wait(), SOON)
        await process.close()


@pytest.mark.parametrize("turns", [0, 1, 5])
async def test_closing_while_the_way_is_broken_ends_at_once(turns: int) -> None:
    async with cut_host() as (host, proxy, _):
        process = await start(host, "sleep", "1000")
        proxy.barred = True
        proxy.cut()
        await rests(host)
        for _ in range(turns):
            await asyncio.sleep(0.002)
        begin = time.monotonic()
        await host.close()
        assert time.monotonic() - begin < 1.0
        with pytest.raises(errors.ConnectionLost, match="closed"):
            await process.wait()
        await process.close()
        assert not [task for task in asyncio.all_tasks() if "redial" in repr(task)]


async def test_an_end_in_order_is_no_cut(tmp_path: Path) -> None:
    """Even while the agent writes: it lets go of what the host had started at once."""
    path = f"{tmp_path}/agent"
    async with listening_agent(path):
        host = SocketHost(path)
        await host.start()
        process = await start(host, "cat", "/dev/zero")
        assert process.stdio.stdout is not None
        await process.stdio.stdout.readexactly(10_000_000)
        reading = asyncio.create_task(process.stdio.stdout.read())
        await host.close()
        with pytest.raises(errors.ConnectionLost):
            await reading
        await gone(process.pid)  # by SIGPIPE, long before the session would be given up
        await process.close()


async def test_the_agents_socket_is_its_users_alone_and_goes_with_it(tmp_path: Path) -> None:
    path = tmp_path / "agent"
    async with listening_agent(str(path)):
        assert path.stat().st_mode & 0o777 == 0o600
        second = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "byre_guest", "--listen", str(path)), stderr=asyncio.subprocess.PIPE
        )
        _, said = await asyncio.wait_for(second.communicate(), SOON)
        assert second.returncode == 1 and b"in use" in said
    assert not path.exists()
    with pytest.raises(errors.ConnectionLost, match="no agent listens"):
        await SocketHost(path).start()
