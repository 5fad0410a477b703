"""`run` and `GuestProcess` over a guest that is played."""

from __future__ import annotations

import asyncio
import gc
import io
import os
import subprocess
import tempfile
import warnings
from collections.abc import AsyncIterator
from typing import Any

import pytest

from byre import run as run_module
from byre.errors import (
    CommandFailed,
    ConnectionLost,
    DeadlineExceeded,
    InvalidRequest,
    NotATerminal,
    ProcessRunning,
    ProgramNotFound,
)
from byre.parameters import ProcessParameters
from byre.run import DEVNULL, PIPE, STDOUT
from byre.testing import FakeProcess, MemoryHost

SOON = 10.0


async def cat(process: FakeProcess) -> int:
    assert process.stdin is not None
    while data := await process.stdin.read(65536):
        if process.stdout is not None:
            process.stdout.write(data)
            await process.stdout.drain()
    return 0


async def both(process: FakeProcess) -> int:
    if process.stdout is not None:
        process.stdout.write(b"out\r\n")
    if process.stderr is not None:
        process.stderr.write(b"err\n")
    return 3


async def hang(process: FakeProcess) -> int:
    if process.stdout is not None:
        process.stdout.write(b"so far")
    await asyncio.Event().wait()
    return 0


async def deaf(process: FakeProcess) -> int:
    """Does not read its input."""
    return 0


async def flood(process: FakeProcess) -> int:
    assert process.stdout is not None
    try:
        while True:
            process.stdout.write(bytes(65536))
            await process.stdout.drain()
    except BrokenPipeError:
        return 141


@pytest.fixture
async def host() -> AsyncIterator[MemoryHost]:
    async with MemoryHost({"cat": cat, "both": both, "hang": hang, "deaf": deaf, "flood": flood}) as host:
        yield host


async def test_output_is_captured(host: MemoryHost) -> None:
    result = await host.run(["both"], capture_output=True)
    assert isinstance(result, subprocess.CompletedProcess)
    assert (result.args, result.returncode, result.stdout, result.stderr) == (["both"], 3, b"out\r\n", b"err\n")
    assert (result.signal, result.oom) == (0, False)


async def test_input_goes_in_and_text_is_text(host: MemoryHost) -> None:
    result = await host.run(["cat"], input="fünf\r\n", text=True, stdout=PIPE)
    assert (result.stdout, result.stderr) == ("fünf\n", None)
    result = await host.run(["cat"], input=b"\xff", encoding="latin-1", stdout=PIPE)
    assert result.stdout == "ÿ"


async def test_what_is_not_asked_for_is_not_created(host: MemoryHost) -> None:
    await host.run(["both"], stdout=DEVNULL, stderr=DEVNULL)
    method, request = host.guest.requests[0]
    assert method == "process.create"
    assert (request["stdin"], request["stdout"], request["stderr"]) == (0, 0, 0)
    assert request["args"] == ["both"]


async def test_options_reach_the_guest(host: MemoryHost) -> None:
    with pytest.raises(ProgramNotFound):
        await host.run("echo $X", shell=True, cwd="/tmp", env={"X": "1"}, user="me", no_new_privileges=True)
    request = host.guest.requests[0][1]
    wanted = {"command_line": "echo $X", "args": [], "cwd": "/tmp", "env": {"X": "1"}, "user": "me"}
    assert {name: request[name] for name in wanted} == wanted
    assert request["no_new_privileges"] is True


async def test_stderr_can_go_where_stdout_goes(host: MemoryHost) -> None:
    result = await host.run(["both"], stdout=PIPE, stderr=STDOUT)
    assert sorted(result.stdout.split()) == [b"err", b"out"]
    assert result.stderr is None


async def test_output_goes_to_files_and_descriptors(host: MemoryHost) -> None:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        await host.run(["both"], stdout=out, stderr=err.fileno())
        out.seek(0)
        err.seek(0)
        assert (out.read(), err.read()) == (b"out\r\n", b"err\n")
    memory = io.BytesIO()
    await host.run(["both"], stdout=memory, stderr=DEVNULL)
    assert memory.getvalue() == b"out\r\n"


async def test_output_is_ours_where_nothing_is_said(host: MemoryHost, capfdbinary: Any) -> None:
    await host.run(["both"])
    assert capfdbinary.readouterr() == (b"out\r\n", b"err\n")


async def test_input_comes_from_a_descriptor(host: MemoryHost) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"through a pipe")
    os.close(writing)
    try:
        assert (await host.run(["cat"], stdin=reading, stdout=PIPE)).stdout == b"through a pipe"
    finally:
        os.close(reading)


async def test_input_that_is_not_read_is_no_error(host: MemoryHost) -> None:
    result = await asyncio.wait_for(host.run(["deaf"], input=bytes(3_000_000)), SOON)
    assert result.returncode == 0


@pytest.mark.behaviour("B4")
async def test_a_reader_of_ours_that_goes_away_ends_the_command(host: MemoryHost) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        result = await asyncio.wait_for(host.run(["flood"], stdout=writing), SOON)
    finally:
        os.close(writing)
    assert result.returncode == 141


async def test_check(host: MemoryHost) -> None:
    with pytest.raises(CommandFailed, match="status 3") as caught:
        await host.run(["both"], check=True, capture_output=True)
    assert caught.value.data["stdout"] == b"out\r\n"
    assert caught.value.data["returncode"] == 3
    assert (await host.run(["deaf"], check=True)).returncode == 0


@pytest.mark.parametrize(
    "options",
    [
        {"args": "a string"},
        {"args": ["a"], "capture_output": True, "stdout": PIPE},
        {"args": ["a"], "input": b"", "stdin": DEVNULL},
        {"args": ["a"], "input": "text without text="},
        {"args": ["a"], "stdin": PIPE},
        {"args": ["a"], "stdout": STDOUT},
        {"args": []},
    ],
)
async def test_what_makes_no_sense_is_refused_before_anything_runs(host: MemoryHost, options: Any) -> None:
    with pytest.raises(InvalidRequest):
        await host.run(**options)
    assert not host.guest.requests


# -- deadlines and cancellation ----------------------------------------------------------------------------


@pytest.mark.behaviour("B15b")
async def test_a_timeout_kills_the_tree_and_tells_what_was(host: MemoryHost) -> None:
    with pytest.raises(DeadlineExceeded) as caught:
        await host.run(["hang"], timeout=0.1, capture_output=True, text=True)
    assert caught.value.data == {"ran": True, "stdout": "so far", "stderr": ""}
    kill = next(request for method, request in host.guest.requests if method == "process.signal")
    assert (kill["signal"], kill["tree"]) == (9, True)
    await host.bridge.ping(SOON)
    assert not host.guest.processes, "it was released"


@pytest.mark.behaviour("B15b")
async def test_a_timeout_before_it_ran_says_so(host: MemoryHost) -> None:
    async def never(_: Any) -> Any:
        await asyncio.Event().wait()

    host.guest.handlers["process.create"] = never
    with pytest.raises(DeadlineExceeded) as caught:
        await host.run(["cat"], timeout=0.05)
    assert caught.value.data["ran"] is False
    assert not host.bridge.session.streams


@pytest.mark.behaviour("B15b")
async def test_cancellation_kills_the_tree_and_says_whether_it_had_run(host: MemoryHost) -> None:
    task = asyncio.create_task(host.run(["hang"], stdout=PIPE))
    async with asyncio.timeout(SOON):
        while not host.guest.processes:
            await host.bridge.ping(SOON)
        await host.bridge.ping(SOON)  # the answer is here as well
    task.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await asyncio.wait_for(task, SOON)
    assert "had run, and was killed" in caught.value.__notes__[-1]
    await host.bridge.ping(SOON)
    assert not host.guest.processes
    assert not host.bridge.session.streams


@pytest.mark.behaviour("B42")
async def test_a_guest_that_dies_ends_a_run(host: MemoryHost) -> None:
    task = asyncio.create_task(host.run(["hang"], stdout=PIPE))
    await host.bridge.ping(SOON)
    await host.guest.close()
    with pytest.raises(ConnectionLost):
        await asyncio.wait_for(task, SOON)


# -- the end of the output ---------------------------------------------------------------------------------


def leaves_stdout_open(host: MemoryHost, written: int, late: bytes, after: float) -> None:
    """`daemon`: its exit is told, a background child holds stdout and writes `late` some seconds later."""

    async def daemon(process: FakeProcess) -> int:
        assert process.stdout is not None
        process.stdout.write(b"early")
        counts = {"stdout": written, "stderr": -1}
        host.bridge_of_guest.tell("process.exit", {"process": process.id, "code": 0, "signal": 0, **counts})  # type: ignore[attr-defined]
        await asyncio.sleep(after)
        process.stdout.write(late)
        await asyncio.Event().wait()
        return 0

    host.bridge_of_guest = host.guest.bridge  # type: ignore[attr-defined]
    host.guest.commands["daemon"] = daemon


@pytest.mark.behaviour("B5")
async def test_a_background_child_is_not_waited_for(host: MemoryHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "DRAIN_GRACE", 0.05)
    leaves_stdout_open(host, -1, b"late", 100)
    result = await asyncio.wait_for(host.run(["daemon"], stdout=PIPE), SOON)
    assert result.stdout == b"early"


@pytest.mark.behaviour("B2")
async def test_what_was_written_before_the_exit_is_waited_for(
    host: MemoryHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "DRAIN_GRACE", 0.02)
    leaves_stdout_open(host, len(b"earlylate"), b"late", 0.2)
    result = await asyncio.wait_for(host.run(["daemon"], stdout=PIPE), SOON)
    assert result.stdout == b"earlylate"


async def test_a_background_child_that_writes_on_is_cut_off(
    host: MemoryHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "DRAIN_GRACE", 0.05)
    monkeypatch.setattr(run_module, "DRAIN_LIMIT", 0.2)

    async def chatty(process: FakeProcess) -> int:
        assert process.stdout is not None
        host.guest.bridge.tell("process.exit", {"process": process.id, "code": 0, "signal": 0})
        while True:
            process.stdout.write(b"tick")
            await asyncio.sleep(0.01)

    host.guest.commands["chatty"] = chatty
    assert (await asyncio.wait_for(host.run(["chatty"], stdout=PIPE), SOON)).stdout.startswith(b"tick")


# -- the process object ------------------------------------------------------------------------------------


@pytest.mark.behaviour("B9", "B10")
async def test_a_running_process_has_no_exit_code_and_a_lost_one_none_either(host: MemoryHost) -> None:
    process = await host.create_process(ProcessParameters(args=["hang"]))
    with pytest.raises(ProcessRunning):
        process.exit_code()
    waiting = asyncio.create_task(process.wait())
    await host.guest.close()
    with pytest.raises(ConnectionLost):
        await asyncio.wait_for(waiting, SOON)
    with pytest.raises(ConnectionLost):
        process.exit_code()
    await process.close()


@pytest.mark.behaviour("B11")
async def test_only_a_terminal_can_be_resized(host: MemoryHost) -> None:
    async with await host.create_process(ProcessParameters(args=["hang"])) as process:
        with pytest.raises(NotATerminal):
            await process.resize_console(80, 25)
    async with await host.create_process(ProcessParameters(args=["hang"], terminal=True)) as process:
        await process.resize_console(80, 25)
        with pytest.raises(InvalidRequest):
            await process.resize_console(-1, 25)


async def test_closing_a_running_process_releases_it_when_it_ends(host: MemoryHost) -> None:
    process = await host.create_process(ProcessParameters(args=["cat"], stdin=True))
    await process.close()
    assert (await asyncio.wait_for(process.wait(), SOON)).code == 0
    await host.bridge.ping(SOON)
    assert not host.guest.processes


async def test_a_process_that_is_forgotten_warns(host: MemoryHost) -> None:
    process = await host.create_process(ProcessParameters(args=["deaf"]))
    await process.wait()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del process
        gc.collect()
    assert [str(w.message) for w in caught if issubclass(w.category, ResourceWarning)]


async def test_a_vm_itself_has_no_init_and_takes_no_oci_process(host: MemoryHost) -> None:
    for config in (None, {"args": ["true"]}):
        with pytest.raises(InvalidRequest):
            await host.create_process(config)


@pytest.mark.behaviour("B14")
async def test_a_create_that_fails_leaves_no_stream(host: MemoryHost) -> None:
    with pytest.raises(ProgramNotFound, match="nope"):
        await host.create_process(ProcessParameters(args=["nope"], stdin=True, stdout=True, stderr=True))
    assert not host.bridge.session.streams
    assert not host.bridge.streams.readers
    assert not host.bridge.streams.writers
