"""Keepers as processes: started, attached to, ended, killed; only the VM they keep is played."""

from __future__ import annotations

import asyncio
import json
import os
import random
import select
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from byre import detached, rundir
from byre.errors import (
    BootFailed,
    ByreError,
    ConnectionLost,
    HostFailed,
    InvalidRequest,
    MachineFailed,
    VMExists,
    VMNotFound,
)
from byre.parameters import ProcessParameters
from byre.process import start_process
from tests.faults.places import descendants

KEEPER = "tests.unit.played_keeper"
TIMEOUT = 60.0

#: Of keepers, and of who starts them.
KILLS = 12


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(TIMEOUT):
            await test()

    asyncio.run(bounded())


async def start(name: str = "a", **options: str) -> int:
    """A keeper; its pid."""
    await detached.start(name, options, keeper=KEEPER)
    return int(rundir.find(name).info()["pid"])


def wait_gone(pid: int) -> None:
    """Wait for the end of a process that is no child of ours."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([fd], [], [], TIMEOUT)[0], f"process {pid} did not end"
    finally:
        os.close(fd)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    wait_gone(pid)


def test_it_is_ready_when_start_returns_serves_its_methods_and_leaves_nothing(runtime: Path) -> None:
    async def test() -> None:
        pid = await start()
        assert os.getsid(pid) != os.getsid(0)
        assert stat.S_IMODE((runtime / "byre" / "a").stat().st_mode) == 0o700
        owner, bridge = await detached.attach("a")
        assert owner.keeper_pid == pid
        info = await owner.info()
        assert info["machine"]["pid"] == pid and info["tmp"] == str(runtime / "byre/a/tmp")
        assert await owner.console(7) == "7 lines"
        await owner.pause()
        assert (await owner.info())["paused"] == 1
        await owner.resume()
        place = await owner.attach_disk(Path("/some/disk"))
        assert (place.target, place.lun) == (3, 0)
        await owner.detach_disk(place)
        with pytest.raises(InvalidRequest, match="absolute"):
            await owner.attach_disk(Path("disk"))
        disks = owner.container_disks(bridge, "a")
        assert await disks.hold("lease", "web", Path("/some/data.disk"), 0) == "1"
        assert await disks.hold("lease", "web", None, 7) == "2"
        assert (await owner.info())["held"] == {"lease": ["/some/data.disk 0 for web", "None 7 for web"]}
        with pytest.raises(InvalidRequest, match="absolute"):
            await disks.hold("lease", "web", Path("data.disk"), 0)
        await disks.drop("lease")
        assert (await owner.info())["held"] == {}
        await bridge.close()
        assert rundir.is_up("a")
        await detached.end("a")
        wait_gone(pid)
        assert list((runtime / "byre").iterdir()) == []
        with pytest.raises(VMNotFound):
            await detached.attach("a")

    run(test)


@pytest.mark.behaviour("B43")
def test_clients_come_and_go_and_find_the_processes_as_they_left_them() -> None:
    async def test() -> None:
        await start()
        _, first = await detached.attach("a")
        process = await start_process(first, ProcessParameters(args=["forever"], stdout=True))
        await first.close()
        await process.close()
        _, second = await detached.attach("a")
        assert [entry["args"] for entry in (await second.call("process.list"))["processes"]] == [["forever"]]
        await second.close()
        await detached.end("a")

    run(test)


def test_a_name_is_taken_once_and_free_again_afterwards() -> None:
    async def test() -> None:
        await start()
        with pytest.raises(VMExists, match="'a' is up"):
            await start()
        await start("b")
        assert [name for name in rundir.names() if rundir.is_up(name)] == ["a", "b"]
        await detached.end("a")
        await start()
        for name in ("a", "b"):
            await detached.end(name)

    run(test)


def test_of_two_that_start_at_once_one_wins() -> None:
    async def test() -> None:
        results = await asyncio.gather(start(), start(), return_exceptions=True)
        assert sorted(isinstance(result, VMExists) for result in results) == [False, True], results
        await detached.end("a")

    run(test)


@pytest.mark.behaviour("B40")
def test_a_failed_boot_is_the_starters_error_with_its_evidence_and_leaves_nothing(runtime: Path) -> None:
    async def test() -> None:
        with pytest.raises(BootFailed, match="the guest panicked") as caught:
            await start(boot="fail")
        assert caught.value.hint == "look at the console"
        assert caught.value.data["console"] == "Kernel panic"
        with pytest.raises(ByreError, match="a defect"):
            await start(boot="crash")
        assert list((runtime / "byre").iterdir()) == []

    run(test)


def test_a_keeper_that_cannot_even_be_run_is_an_error_with_its_words() -> None:
    async def test() -> None:
        with pytest.raises(MachineFailed, match="No module named"):
            await detached.start("a", keeper="tests.unit.no_such_module")

    run(test)


@pytest.mark.behaviour("B41")
def test_a_starter_that_is_cancelled_ends_the_boot_and_its_keeper(runtime: Path) -> None:
    async def test() -> None:
        task = asyncio.create_task(start(boot="never"))
        while not (runtime / "byre/a/tmp/booting").exists():
            await asyncio.sleep(0.01)
        pid = rundir.find("a").info()["pid"]
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        wait_gone(pid)
        assert list((runtime / "byre").iterdir()) == []

    run(test)


@pytest.mark.behaviour("B42")
def test_a_killed_keeper_ends_its_clients_calls_and_its_name_is_taken_over() -> None:
    async def test() -> None:
        pid = await start()
        _, bridge = await detached.attach("a")
        process = await start_process(bridge, ProcessParameters(args=["forever"]))
        waiting = asyncio.create_task(process.wait())
        kill(pid)
        with pytest.raises(ConnectionLost):
            await waiting
        await process.close()
        await bridge.close()
        assert rundir.names() == ["a"] and not rundir.is_up("a")
        assert await start() != pid  # the stale directory is no obstacle
        await detached.end("a")

    run(test)


@pytest.mark.behaviour("B41")
def test_a_keeper_that_hangs_does_not_keep_its_starter(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detached, "CANCEL_LIMIT", 0.2)

    async def test() -> None:
        task = asyncio.create_task(start(boot="never"))
        while not (runtime / "byre/a/tmp/booting").exists():
            await asyncio.sleep(0.01)
        pid = rundir.find("a").info()["pid"]
        os.kill(pid, signal.SIGSTOP)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        wait_gone(pid)
        assert list((runtime / "byre").iterdir()) == []

    run(test)


def test_killed_at_any_moment_a_keeper_leaves_nothing_that_confuses(runtime: Path) -> None:
    life = (
        "import asyncio; from byre import detached; "
        f"asyncio.run(detached.start('a', keeper={KEEPER!r})); asyncio.run(detached.end('a'))"
    )
    chance = random.Random(1)
    for _ in range(KILLS):
        living = subprocess.Popen([sys.executable, "-c", life], start_new_session=True, stderr=subprocess.DEVNULL)
        time.sleep(chance.uniform(0, 1))  # no event: any moment of a life of about a second
        for pid in descendants():
            os.kill(pid, signal.SIGKILL)
        living.wait()
        for pid in descendants():  # some of them were just made
            kill(pid)
        for name in rundir.names():
            assert not rundir.is_up(name)
            assert rundir.sweep(name)

    async def test() -> None:
        await start()
        await detached.end("a")

    run(test)
    assert list((runtime / "byre").iterdir()) == []


def test_of_several_that_are_dead_each_is_found_dead_and_removed(runtime: Path) -> None:
    async def test() -> None:
        names = ("a", "b", "c")
        for pid in [await start(name) for name in names]:
            kill(pid)
        for name in names:
            with pytest.raises(VMNotFound, match=f"no VM named '{name}' is up"):
                await detached.attach(name)
        assert all(rundir.sweep(name) for name in names)
        assert list((runtime / "byre").iterdir()) == []

    run(test)


def test_a_run_directory_that_cannot_be_made_is_an_error_that_names_it(runtime: Path) -> None:
    async def test() -> None:
        (runtime / "byre").mkdir(mode=0o700)
        (runtime / "byre" / "a").write_text("no directory")
        with pytest.raises(HostFailed, match=r"run directory of 'a': File exists: .*/byre/a$"):
            await start()

    run(test)


def test_a_client_in_the_queue_of_a_keeper_that_ends_finds_no_vm() -> None:
    async def test() -> None:
        claim = rundir.claim("a")
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(os.fspath(claim.run.socket))
            listening.listen()
            attaching = asyncio.create_task(detached.attach("a"))
            await asyncio.sleep(0)
            listening.close()
            with pytest.raises(VMNotFound, match="as it was asked"):
                await attaching
        claim.release()

    run(test)


def test_a_vm_that_dies_is_told_to_clients_and_its_reason_is_kept_for_ps() -> None:
    async def test() -> None:
        pid = await start()
        owner, bridge = await detached.attach("a")
        ended = asyncio.create_task(owner.wait())
        with pytest.raises(ConnectionLost, match="killed"):
            await asyncio.gather(owner.console(666), bridge.call("system.info", timeout=None), owner.console(1))
            await bridge.wait_lost()
            raise bridge.lost or AssertionError
        assert await ended == "the virtual machine ended (killed)"
        await bridge.close()
        wait_gone(pid)
        assert rundir.find("a").info()["died"] == "the virtual machine ended (killed)"
        assert rundir.sweep("a") and rundir.names() == []

    run(test)


def test_a_keeper_told_to_end_by_a_signal_ends_in_order(runtime: Path) -> None:
    async def test() -> None:
        pid = await start()
        os.kill(pid, signal.SIGTERM)
        wait_gone(pid)
        assert list((runtime / "byre").iterdir()) == []

    run(test)


def test_a_keeper_that_hangs_is_killed_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detached, "END_MARGIN", 0.5)

    async def test() -> None:
        pid = await start()
        await detached.end("a", timeout=0.666)
        wait_gone(pid)
        assert rundir.names() == []

    run(test)


def test_names_that_are_no_names_are_refused() -> None:
    for name in ("", "..", "a/b", "-a", "a" * 49, "a b", "ä"):
        with pytest.raises(InvalidRequest):
            rundir.find(name)


def test_a_directory_that_others_can_use_is_refused(runtime: Path) -> None:
    (runtime / "byre").mkdir(mode=0o755)
    (runtime / "byre").chmod(0o755)
    with pytest.raises(ByreError, match="only you can use"):
        rundir.claim("a")
    (runtime / "byre").rmdir()
    (runtime / "elsewhere").mkdir(mode=0o700)
    (runtime / "byre").symlink_to(runtime / "elsewhere")
    with pytest.raises(ByreError, match="only you can use"):
        rundir.claim("a")


def test_a_claim_is_exclusive_sweeping_respects_it_and_a_half_written_info_is_no_error() -> None:
    claim = rundir.claim("a")
    (claim.run.path / "info").write_text('{"pid": 1')
    assert claim.run.info() == {}
    begin = time.monotonic()
    with pytest.raises(VMExists):
        rundir.claim("a")
    assert time.monotonic() - begin < 10 * rundir.LOCK_PATIENCE
    assert not rundir.sweep("a")
    claim.abandon("it died")
    assert json.loads((claim.run.path / "info").read_text()) == {"died": "it died"}
    again = rundir.claim("a")
    assert again.run.info() == {}
    again.release()
    again.release()
    assert rundir.names() == [] and not rundir.sweep("a")
