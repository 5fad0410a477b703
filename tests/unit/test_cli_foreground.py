"""A command in the foreground: streams, signals, deadline, exit status; only the guest is played."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any

import pytest

from byre.cli import foreground, passthrough
from byre.cli.status import OWN_ERROR, TIMED_OUT, report
from byre.errors import ByreError, ProgramNotExecutable, ProgramNotFound
from byre.parameters import ProcessParameters
from byre.testing import Command, FakeProcess, MemoryHost

TIMEOUT = 30.0


class Ends:
    """Our own stdin, stdout and stderr, as pipes whose other ends the test holds."""

    def __init__(self) -> None:
        self.stdin, self.to_stdin = os.pipe()
        self.from_stdout, self.stdout = os.pipe()
        self.from_stderr, self.stderr = os.pipe()

    def close(self, *names: str) -> None:
        """Close some of them, once: the number may be another file's afterwards."""
        for name in names:
            fd = getattr(self, name)
            if fd >= 0:
                os.close(fd)
                setattr(self, name, -1)

    def read(self, fd: int) -> bytes:
        """All that was written and is still in the pipe."""
        os.set_blocking(fd, False)
        with contextlib.suppress(BlockingIOError):
            return os.read(fd, 1 << 20)
        return b""


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ends]:
    made = Ends()
    ours = {0: made.stdin, 1: made.stdout, 2: made.stderr}
    real_output, real_input = passthrough.Output.__init__, passthrough.pump_input
    monkeypatch.setattr(
        passthrough.Output,
        "__init__",
        lambda self, reader, fd, close: real_output(self, reader, ours[fd], close),
    )
    monkeypatch.setattr(foreground, "pump_input", lambda fd, *rest: real_input(ours[fd], *rest))
    yield made
    made.close(*vars(made))


def asked(*, interactive: bool = False, tty: bool = False, timeout: float | None = None) -> argparse.Namespace:
    """What the command line said."""
    return argparse.Namespace(interactive=interactive, tty=tty, timeout=timeout)


def execute(
    command: Command,
    *,
    during: Callable[[FakeProcess], Awaitable[None]] | None = None,
    **options: Any,
) -> tuple[int, list[int]]:
    """The exit status of a command in the foreground, and the signals that it got."""
    got: list[int] = []

    async def body(signals: foreground.Signals) -> int:
        async with asyncio.timeout(TIMEOUT), MemoryHost({"it": command}) as host:
            parameters = ProcessParameters(args=["it"], stdin=True, stdout=True, stderr=True)
            process = await host.start_process(parameters)
            played = host.guest.processes[1]
            task = asyncio.create_task(during(played)) if during else None
            try:
                return await foreground.attach(process, signals, asked(**options), kill=process.kill_tree)
            finally:
                if task is not None:
                    await task
                while not played.signals.empty():
                    got.append(played.signals.get_nowait())
                await process.close()

    return foreground.run(body), got


async def exit_7(process: FakeProcess) -> int:
    assert process.stdout is not None and process.stderr is not None
    process.stdout.write(b"out\n")
    process.stderr.write(b"err\xff\n")
    return 7


async def forever(_: FakeProcess) -> int:
    await asyncio.Event().wait()
    return 0


async def cat(process: FakeProcess) -> int:
    assert process.stdin is not None and process.stdout is not None
    while data := await process.stdin.read(65536):
        process.stdout.write(data)
        await process.stdout.drain()
    return 0


def test_streams_and_status_are_passed_on(ends: Ends) -> None:
    assert execute(exit_7) == (7, [])
    assert ends.read(ends.from_stdout) == b"out\n"
    assert ends.read(ends.from_stderr) == b"err\xff\n"


def test_stdin_is_empty_without_i_and_passed_on_with_it(ends: Ends) -> None:
    os.write(ends.to_stdin, b"typed")
    ends.close("to_stdin")
    assert execute(cat) == (0, [])
    assert ends.read(ends.from_stdout) == b""
    assert execute(cat, interactive=True) == (0, [])
    assert ends.read(ends.from_stdout) == b"typed"


@pytest.mark.parametrize("number", foreground.FORWARDED)
def test_a_signal_is_passed_on(ends: Ends, number: signal.Signals) -> None:
    async def until_told(process: FakeProcess) -> int:
        os.kill(os.getpid(), number)
        return 100 + await process.signals.get()

    assert execute(until_told)[0] == 100 + number


def test_the_second_interrupt_kills_what_ignores_the_first(ends: Ends) -> None:
    async def interrupt(process: FakeProcess) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        assert await process.signals.get() == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)

    assert execute(forever, during=interrupt) == (137, [signal.SIGKILL])


def test_the_third_leaves_even_what_cannot_be_killed(ends: Ends) -> None:
    async def body(signals: foreground.Signals) -> int:
        async with asyncio.timeout(TIMEOUT), MemoryHost({"it": forever}) as host:
            process = await host.start_process(ProcessParameters(args=["it"]))
            killed = asyncio.Event()

            async def kill() -> None:
                killed.set()

            async def interrupt() -> None:
                os.kill(os.getpid(), signal.SIGTERM)
                await host.guest.processes[1].signals.get()
                os.kill(os.getpid(), signal.SIGTERM)
                await killed.wait()
                os.kill(os.getpid(), signal.SIGTERM)

            task = asyncio.create_task(interrupt())
            try:
                return await foreground.attach(process, signals, asked(), kill=kill)
            finally:
                await task
                await process.close()

    assert foreground.run(body) == 128 + signal.SIGTERM


def test_a_signal_before_the_command_is_there_ends_the_preparation() -> None:
    tidied = []

    async def body(_: foreground.Signals) -> int:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.Event().wait()
        finally:
            tidied.append(True)
        return 0

    assert foreground.run(body) == 130
    assert tidied


@pytest.mark.behaviour("B15b")
def test_after_the_timeout_it_is_killed_and_the_status_says_so(
    ends: Ends, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute(forever, timeout=0.05) == (TIMED_OUT, [signal.SIGKILL])
    assert "killed after 0.05 s" in capsys.readouterr().err


@pytest.mark.behaviour("B4")
def test_when_our_reader_is_gone_the_command_gets_a_broken_pipe(ends: Ends) -> None:
    async def yes(process: FakeProcess) -> int:
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            while True:
                process.stdout.write(b"y\n" * 100)
                await process.stdout.drain()
        return 141

    ends.close("from_stdout")
    assert execute(yes) == (141, [])


def test_a_full_disk_is_our_error_not_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(passthrough, "_write_all", full)
    with pytest.raises(passthrough.OutputFailed, match="No space left"):
        execute(exit_7)


@pytest.mark.behaviour("B2")
def test_what_was_written_before_the_exit_comes_out_whole_however_slow_the_reader(ends: Ends) -> None:
    size = 3 * 1024 * 1024

    async def write(process: FakeProcess) -> int:
        assert process.stdout is not None
        process.stdout.write(bytes(size))
        await process.stdout.drain()
        return 0

    got = bytearray()

    def read() -> None:
        while len(got) < size:
            got.extend(os.read(ends.from_stdout, 4096))

    reader = threading.Thread(target=read)
    reader.start()
    assert execute(write) == (0, [])
    reader.join(TIMEOUT)
    assert len(got) == size


@pytest.mark.behaviour("B5")
def test_a_child_that_still_holds_the_stream_is_not_waited_for_without_end(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreground, "DRAIN_GRACE", 0.05)

    async def body(signals: foreground.Signals) -> int:
        async with asyncio.timeout(TIMEOUT), MemoryHost({"it": forever}) as host:
            process = await host.start_process(ProcessParameters(args=["it"], stdout=True))
            host.guest.bridge.tell("process.exit", {"process": 1, "code": 3, "signal": 0})
            try:
                return await foreground.attach(process, signals, asked(), kill=process.kill_tree)
            finally:
                await process.kill_tree()
                await process.close()

    assert foreground.run(body) == 3


def test_a_vm_that_is_lost_ends_it_with_our_error(ends: Ends) -> None:
    async def body(signals: foreground.Signals) -> int:
        async with asyncio.timeout(TIMEOUT), MemoryHost({"it": forever}) as host:
            process = await host.start_process(ProcessParameters(args=["it"], stdout=True))
            attached: Coroutine[Any, Any, int] = foreground.attach(
                process, signals, asked(), kill=process.kill_tree
            )
            task = asyncio.create_task(attached)
            await asyncio.sleep(0)
            await host.guest.close()
            try:
                return await task
            finally:
                await process.close()

    with pytest.raises(ByreError) as caught:
        foreground.run(body)
    assert caught.value.code == "connection-lost"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ProgramNotFound("x: not there"), 127),
        (ProgramNotExecutable("x: not executable"), 126),
        (ByreError("anything"), OWN_ERROR),
        (RuntimeError("a defect"), OWN_ERROR),
        (OSError(2, "gone"), OWN_ERROR),
    ],
)
def test_errors_have_their_status_and_are_told_on_stderr(
    error: Exception, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(error) == status
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("byre: error: ") and "Traceback" not in err


def test_what_an_error_shows_is_escaped_with_its_hint_and_console(capsys: pytest.CaptureFixture[str]) -> None:
    report(ByreError("bad \x1b[31mred", hint="try \x07", console="line 1\nKernel \x1b]0;panic"))
    err = capsys.readouterr().err
    assert "\x1b" not in err and "\x07" not in err
    assert "byre: error: bad \\x1b[31mred\n" in err and "hint: try \\x07\n" in err and "Kernel \\x1b]0;panic" in err


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise ByreError("deep inside")
    except ByreError as error:
        report(error, debug=True)
    assert "Traceback" in capsys.readouterr().err
