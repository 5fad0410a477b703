"""byre.sync: the asyncio objects from ordinary threads."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import os
import pkgutil
import re
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import byre
from byre import ProcessParameters, errors, sync
from byre.container import GuestContainer, InitStreams
from byre.testing import FakeProcess, MemoryHost

SOON = 10.0


async def cat(process: FakeProcess) -> int:
    assert process.stdin is not None
    while data := await process.stdin.read(65536):
        if process.stdout is not None:
            process.stdout.write(data)
            await process.stdout.drain()
    return 7


async def hang(_: FakeProcess) -> int:
    await asyncio.Event().wait()
    return 0


class Host(sync.Facade):
    """A MemoryHost, as `sync.LocalHost` is a LocalHost."""

    def __init__(self) -> None:
        self._target = MemoryHost({"cat": cat, "hang": hang})


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


def classes() -> Iterator[type]:
    """Every class of byre's, but for those of programs."""
    for module in pkgutil.walk_packages(byre.__path__, "byre."):
        if not module.name.startswith(("byre.cli", "byre.__main__", "byre.shares.confine")):
            for value in vars(importlib.import_module(module.name)).values():
                if inspect.isclass(value) and value.__module__ == module.name:
                    yield value


def is_asynchronous(kind: type) -> bool:
    """Whether it is of little use without a loop."""
    members = inspect.getmembers(kind, inspect.iscoroutinefunction)
    return any(not name.startswith("_") or name in ("__anext__", "__aenter__") for name, _ in members)


def given_by(kind: type) -> Iterator[str]:
    """The names of the classes of what its public methods and properties give."""
    for name, value in inspect.getmembers(kind):
        member = value.fget if isinstance(value, property) else value
        if not name.startswith("_"):
            yield from re.findall(r"\w+", str(getattr(member, "__annotations__", {}).get("return", "")))


def test_whatever_can_be_had_has_a_facade() -> None:
    known: dict[str, list[type]] = {}
    for kind in classes():
        known.setdefault(kind.__name__, []).append(kind)
    del known["Bridge"]  # the protocol itself, which the objects are made of
    kinds, faced = {kind for kind, _ in sync._FACADES}, set[type]()
    while kinds - faced:
        kind = (kinds - faced).pop()
        faced.add(kind)
        for found in (found for name in given_by(kind) for found in known.get(name, ()) if is_asynchronous(found)):
            assert any(issubclass(found, each) for each, _ in sync._FACADES), f"{kind} gives {found}"
            kinds.add(found)
    assert {"UtilityVM", "GuestContainer", "EventReader", "Share", "Snapshot"} <= {kind.__name__ for kind in faced}


def test_run(host: Host) -> None:
    result = host.run(["cat"], input="text", text=True, capture_output=True)
    assert (result.returncode, result.stdout) == (7, "text")
    with pytest.raises(errors.ProgramNotFound):
        host.run(["nope"])
    with pytest.raises(errors.CommandFailed):
        host.run(["cat"], input=b"", check=True)


def test_streams_are_files(host: Host) -> None:
    with host.create_process(ProcessParameters(args=["cat"], stdin=True, stdout=True)) as process:
        assert isinstance(process, sync.Process)
        stdin, stdout, stderr = process.stdio
        assert process.stdio.stdout is stdout, "each has a buffer, so there is one"
        assert stderr is None
        assert stdin is not None
        assert stdout is not None
        stdin.write(b"one\ntwo\n")
        stdin.flush()
        assert stdout.readline() == b"one\n"
        stdin.write(b"three")
        stdin.close()
        assert stdout.read() == b"two\nthree"
        assert process.wait().code == 7
        assert process.exit_code() == 7


def test_attributes_and_identity(host: Host) -> None:
    assert host.os == "linux"
    assert host.is_oci is False
    process = host.create_process(ProcessParameters(args=["cat"], stdin=True))
    assert process.pid == 1
    assert sync._facade(process._target) is process
    assert "kill" in dir(process)
    assert "GuestProcess" in repr(process)
    with pytest.raises(AttributeError):
        process.no_such_thing  # noqa: B018
    process.close()


def test_many_threads_at_once(host: Host) -> None:
    results: list[Any] = []

    def work(number: int) -> None:
        results.append(host.run(["cat"], input=str(number), text=True, capture_output=True).stdout)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    assert sorted(results) == [str(n) for n in range(10)]


def test_a_wait_channel_is_an_event_for_threads(host: Host) -> None:
    async def make() -> GuestContainer:
        return GuestContainer(host._target.bridge, "c", InitStreams())

    container = sync._facade(sync._loop.run(make()))
    assert isinstance(container, sync.Container)
    channel = container.wait_channel
    assert isinstance(channel, threading.Event)
    assert not channel.is_set()
    assert channel.wait(0.01) is False
    waiting = threading.Thread(target=channel.wait)
    waiting.start()
    container.close()
    waiting.join(SOON)
    assert channel.is_set()
    assert channel.wait() is True
    assert isinstance(container.wait_error(), errors.ContainerClosed)


def test_an_interruption_cancels_the_call_and_waits_for_its_end(host: Host) -> None:
    assert threading.current_thread() is threading.main_thread()
    guest = host._target.guest

    def interrupt() -> None:
        while not guest.processes:
            sync._loop.run(host._target.bridge.ping(SOON))
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        host.run(["hang"])
    thread.join(SOON)
    sync._loop.run(host._target.bridge.ping(SOON))
    assert not guest.processes, "it was killed and released"


def test_the_loop_itself_cannot_wait_for_itself(host: Host) -> None:
    async def wrong() -> None:
        host.run(["cat"])

    with pytest.raises(RuntimeError, match="asyncio"):
        sync._loop.run(wrong())


def test_a_file_that_is_dropped_is_flushed_and_closed_without_waiting(host: Host) -> None:
    """The garbage collector runs in any thread: in the loop's own, and in one whose start the loop waits for."""
    with host.create_process(ProcessParameters(args=["cat"], stdin=True, stdout=True)) as process:
        files = [process._target.stdio.stdin]
        file = sync._BufferedWriter(files.pop())
        file.write(b"unflushed")
        files.append(file)
        del file

        async def drop() -> None:
            files.clear()

        sync._loop.run(drop())
        assert process.stdio.stdout.read() == b"unflushed"
        assert process.wait().code == 7
