"""A child dies with its owner, whatever thread spawned it, and leaves neither thread nor descriptor (B41, B43)."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path

import pytest

from byre.machines.spawn import OwnedProcess, in_thread, stoppable
from tests.namespaces import needs_user_namespaces

#: The child has a second after its owner's end (B42, B43); the rest is for a loaded host.
PATIENCE = 10.0


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    threads, descriptors = set(threading.enumerate()), set(os.listdir("/proc/self/fd"))
    yield
    assert set(threading.enumerate()) == threads
    assert set(os.listdir("/proc/self/fd")) == descriptors


def finish(process: OwnedProcess) -> int:
    code = process.exit.result(PATIENCE)
    process.join()
    return code


def test_output_sinks_and_exit_code() -> None:
    output, console = bytearray(), bytearray()
    reader, writer = os.pipe()
    process = OwnedProcess(
        ["sh", "-c", f"echo out; echo err >&2; echo console > /proc/self/fd/{writer}; exit 7"],
        output=output.extend,
        sinks={reader: console.extend},
        handed=[writer],
    )
    process.start()
    assert finish(process) == 7
    assert sorted(bytes(output).split()) == [b"err", b"out"]
    assert console == b"console\n"


def test_the_last_words_are_not_lost() -> None:
    output = bytearray()
    process = OwnedProcess(["sh", "-c", "head -c 60000 /dev/zero; kill -9 $$"], output=output.extend)
    process.start()
    assert finish(process) == -signal.SIGKILL
    assert len(output) == 60000


def test_a_sink_that_fails_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    def broken(data: bytes) -> None:
        raise ValueError("broken sink")

    process = OwnedProcess(["sh", "-c", "echo x; exit 3"], output=broken)
    process.start()
    assert finish(process) == 3
    assert "was not taken" in caplog.text


def test_killed_before_it_is_spawned_and_again_after_its_end() -> None:
    process = OwnedProcess(["sleep", "100"], output=lambda data: None)
    process.kill()
    process.start()
    assert finish(process) == -signal.SIGKILL
    process.kill()


def test_what_cannot_be_spawned_is_told_and_closes_what_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    reader, writer = os.pipe()
    process = OwnedProcess(["true"], output=lambda data: None, sinks={reader: lambda data: None}, handed=[writer])
    process.start()
    with pytest.raises(FileNotFoundError, match="setpriv"):
        finish(process)


def test_its_terminal_signals_are_the_owners() -> None:
    process = OwnedProcess(["sleep", "100"], output=lambda data: None)
    process.start()
    while process.pid is None:
        assert not process.exit.done()
    assert os.getsid(process.pid) == process.pid
    process.kill()
    finish(process)


def test_a_cancelled_thread_stops_at_its_next_check_and_is_waited_for() -> None:
    running, ended, undone = threading.Event(), threading.Event(), list[int]()

    def work(check: Callable[[], None]) -> int:
        try:
            running.set()
            while True:
                check()
        finally:
            ended.set()

    async def main() -> None:
        task = asyncio.create_task(stoppable(work, undone.append))
        await in_thread(running.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended.is_set() and undone == []

    run_without_threads(main)


def test_a_result_that_comes_after_the_cancellation_is_undone() -> None:
    running, go_on, undone = threading.Event(), threading.Event(), list[int]()

    def work(_: object) -> int:
        running.set()
        assert go_on.wait(PATIENCE)
        return 42

    async def main() -> None:
        assert await stoppable(lambda check: 1, undone.append) == 1
        task = asyncio.create_task(stoppable(work, undone.append))
        await in_thread(running.wait)
        for _ in range(2):  # the second one changes nothing
            task.cancel()
            await asyncio.sleep(0)
        assert not task.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert undone == [42]

    run_without_threads(main)


def test_in_thread_gives_results_errors_and_leaves_no_thread() -> None:
    async def main() -> None:
        assert await in_thread(lambda: 42) == 42
        with pytest.raises(KeyError):
            await in_thread(lambda: {}["x"])

    run_without_threads(main)


def run_without_threads(main: Callable[[], Coroutine[None, None, None]]) -> None:
    """Run it, and wait for the last moments of the threads that it started."""
    asyncio.run(main())
    for thread in threading.enumerate():
        if thread.name == "byre-probe":
            thread.join(PATIENCE)


kinds_of_apart = pytest.mark.parametrize(
    "apart", ["", *(pytest.param(kind, marks=needs_user_namespaces) for kind in ("MACHINE", "PROXY"))]
)

OWNER = """
import os, sys, threading
from byre.machines import namespaces
from byre.machines.spawn import OwnedProcess
command = ["sh", "-c", "echo $$; exec sleep 1000"]
apart = getattr(namespaces, sys.argv[1]) if sys.argv[1:] else None
process = OwnedProcess(command, output=lambda data: os.write(1, data), apart=apart)
starter = threading.Thread(target=process.start)
starter.start()
starter.join()
sys.stdin.read()
"""


@pytest.mark.behaviour("B43")
@kinds_of_apart
def test_it_survives_the_thread_that_asked_and_not_the_owner(apart: str) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, *filter(None, [apart])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with owner:
        assert owner.stdout is not None
        child = int(owner.stdout.readline())
        pidfd = os.pidfd_open(child)
        try:
            assert not select.select([pidfd], [], [], 0.3)[0]  # the thread that asked is gone, the child is not
            owner.kill()
            assert select.select([pidfd], [], [], PATIENCE)[0], "the child outlived its owner"
        finally:
            os.close(pidfd)


@pytest.mark.behaviour("B43")
@kinds_of_apart
def test_born_after_its_owners_death_it_does_not_run(tmp_path: Path, apart: str) -> None:
    """The race between fork and the parent-death signal: the owner's id is not the parent's any more."""
    from byre.machines import namespaces
    from byre.machines.spawn import owned

    mark = tmp_path / "ran"
    command = owned(["touch", str(mark)], apart=getattr(namespaces, apart) if apart else None)
    orphan = [word if word != str(os.getpid()) else "1" for word in command]
    assert subprocess.run(orphan).returncode != 0
    assert not mark.exists()
    assert subprocess.run(command).returncode == 0
    assert mark.exists()
