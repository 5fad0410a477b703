"""Starting QEMU when it does not start: a small program stands in for it and misbehaves.  Nothing is left (B41)."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import os
import sys
import threading
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from byre.errors import (
    AcceleratorUnavailable,
    ByreError,
    ConnectionLost,
    DeadlineExceeded,
    MachineFailed,
    ToolMissing,
    TransportUnavailable,
)
from byre.machines import accelerators, namespaces
from byre.machines import qmp as qmp_module
from byre.machines.command_line import QEMU
from byre.machines.config import MachineConfig
from byre.machines.qemu import QemuMachine
from byre.transports import vsock

#: Speaks QMP as far as it is told to; `os._exit`, not signals, ends it.
STAND_IN = """#!{python} -I
import json, os, re, socket, sys, time
fd = int(re.search(r"id=qmp,fd=(\\d+)", " ".join(sys.argv))[1])
qmp = socket.socket(fileno=fd)
def send(message): qmp.sendall(json.dumps(message).encode() + b"\\r\\n")
def receive():
    text = ""
    while True:
        data = qmp.recv(1)
        if not data: os._exit(0)
        text += data.decode()
        try: return json.loads(text)
        except ValueError: pass
def greet(major=9):
    send({{"QMP": {{"version": {{"qemu": {{"major": major, "minor": 0, "micro": 0}}}}, "capabilities": []}}}})
    receive()
    send({{"return": {{}}}})
def serve():
    while True:
        asked = receive()
        if asked["execute"] == "quit":
            send({{"event": "SHUTDOWN", "data": {{"reason": "host-qmp-quit"}}, "timestamp": {{}}}})
            send({{"return": {{}}, "id": asked["id"]}})
            os._exit(0)
        send({{"return": {{}}, "id": asked["id"]}})
def panic():
    send({{"event": "SHUTDOWN", "data": {{"reason": "guest-reset"}}, "timestamp": {{}}}})
    os._exit(0)
{script}
"""

Scenario = Callable[[QemuMachine], Awaitable[None]]


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], QemuMachine]:
    """A machine whose QEMU runs this script."""

    def make(script: str, **config: str) -> QemuMachine:
        program = tmp_path / "bin" / QEMU
        program.parent.mkdir(exist_ok=True)
        program.write_text(STAND_IN.format(python=sys.executable, script=script))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
        file = tmp_path / "file"
        file.write_bytes(b"x")
        options = {"accelerator": "tcg", "machine": "pc", "transport": "virtio-serial", **config}
        return QemuMachine(MachineConfig(kernel=file, initramfs=file, root=file, **options))

    return make


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    threads, descriptors = set(threading.enumerate()), set(os.listdir("/proc/self/fd"))
    children = set(_children())
    yield
    gc.collect()
    assert set(threading.enumerate()) == threads
    assert set(os.listdir("/proc/self/fd")) == descriptors
    assert set(_children()) == children


def _children() -> list[str]:
    found = []
    for task in Path("/proc/self/task").iterdir():
        found += (task / "children").read_text().split()
    return found


def run(machine: QemuMachine, scenario: Scenario) -> None:
    async def main() -> None:
        try:
            await scenario(machine)
        finally:
            await machine.kill()

    asyncio.run(asyncio.wait_for(main(), 30))


Make = Callable[..., QemuMachine]


@pytest.mark.behaviour("B40")
@pytest.mark.parametrize(
    ("script", "error", "says"),
    [
        (
            "print('qemu: bad \\\\x1b luck', file=sys.stderr); os._exit(1)",
            MachineFailed,
            r"status 1.*bad \\x1b luck",
        ),
        ("os.kill(os.getpid(), 11)", MachineFailed, "SIGSEGV"),
        ("send({'QMP': 7}); time.sleep(100)", MachineFailed, "did not start"),
        ("greet(major=6); serve()", MachineFailed, "QEMU 6.0.0 is too old"),
    ],
    ids=["complains", "crashes", "talks nonsense", "too old"],
)
def test_a_qemu_that_does_not_start(stand_in: Make, script: str, error: type[ByreError], says: str) -> None:
    async def scenario(machine: QemuMachine) -> None:
        with pytest.raises(error, match=says):
            await machine.start()
        assert machine.exited is not None
        with pytest.raises(ConnectionLost):
            await machine.connect()

    run(stand_in(script), scenario)


def test_a_qemu_that_never_greets(stand_in: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp_module, "GREETING_TIMEOUT", 0.2)

    async def scenario(machine: QemuMachine) -> None:
        with pytest.raises(DeadlineExceeded):
            await machine.start()
        assert machine.exited is not None

    run(stand_in("time.sleep(100)"), scenario)


@types.coroutine
def cancelled_at(number: int, coroutine: Coroutine[Any, Any, None]) -> Generator[Any, Any, None]:
    """`coroutine`, whose task is cancelled when it suspends for the `number`-th time."""
    inner = coroutine.__await__()
    step, argument = cast("Callable[[Any], Any]", inner.send), None
    for count in itertools.count(1):
        try:
            waited = step(argument)
        except StopIteration:
            return
        if count == number:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
        try:
            argument = yield waited
            step = inner.send
        except BaseException as error:
            step, argument = inner.throw, error


@pytest.mark.behaviour("B41")
def test_a_start_cancelled_at_every_await(stand_in: Make) -> None:
    cancelled = 0

    async def scenario(machine: QemuMachine) -> None:
        nonlocal cancelled
        try:
            await asyncio.create_task(as_coroutine(cancelled_at(cancelled + 1, machine.start())))
        except asyncio.CancelledError:
            cancelled += 1
            assert machine.exited is not None

    async def as_coroutine(awaitable: Awaitable[None]) -> None:
        await awaitable

    before = -1
    while cancelled != before:
        before = cancelled
        run(stand_in("greet(); serve()"), scenario)
    assert cancelled >= 5  # the accelerator, the transport, QMP's connection, greeting and answer


@pytest.mark.behaviour("B41")
@pytest.mark.parametrize("when", ["spawned", "greeted"])
def test_a_start_cancelled_while_qemu_is_silent(stand_in: Make, when: str, tmp_path: Path) -> None:
    mark = tmp_path / "fifo"
    os.mkfifo(mark)
    script = {
        "spawned": f"open({str(mark)!r}, 'w').close(); time.sleep(100)",
        "greeted": "send({'QMP': {'version': {}, 'capabilities': []}}); receive();"
        f"open({str(mark)!r}, 'w').close(); time.sleep(100)",
    }[when]

    async def scenario(machine: QemuMachine) -> None:
        task = asyncio.create_task(machine.start())
        await asyncio.to_thread(mark.read_bytes)  # the stand-in has come this far
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert machine.exited is not None

    run(stand_in(script), scenario)


@pytest.mark.behaviour("B42")
def test_a_hung_qemu_is_killed_by_shutdown_and_every_call_ends(stand_in: Make) -> None:
    async def scenario(machine: QemuMachine) -> None:
        await machine.start()
        calls = [asyncio.create_task(call) for call in (machine.pause(), machine.wait_console("never"))]
        await machine.shutdown(0.2)
        assert machine.exited is not None
        assert machine.exited.reason == "killed"
        for result in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(result, ConnectionLost)

    run(stand_in("greet(); time.sleep(100)"), scenario)


def test_the_reason_of_the_end_is_qemus_own(stand_in: Make) -> None:
    async def scenario(machine: QemuMachine) -> None:
        with contextlib.suppress(MachineFailed):  # on a busy host it ends before its start is done
            await machine.start()
        how = await machine.wait()
        assert (how.reason, how.returncode) == ("guest-reset", 0)

    run(stand_in("greet(); panic()"), scenario)


def test_the_loops_end_is_the_machines_end(stand_in: Make) -> None:
    machine = stand_in("greet(); serve()")
    asyncio.run(machine.start())
    assert machine.exited is not None
    assert machine._process is not None
    machine._process.exit.result(10)
    machine._process.join()


def test_required_and_not_there(stand_in: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerators, "cpu_flags", lambda: frozenset({"fpu"}))
    monkeypatch.setattr(vsock, "DEVICE", Path("/nowhere/vhost-vsock"))

    async def scenario(machine: QemuMachine) -> None:
        with pytest.raises((AcceleratorUnavailable, TransportUnavailable)) as caught:
            await machine.start()
        assert "byre doctor" in caught.value.hint
        assert str(machine.exited) == "the virtual machine ended (never-started)"

    run(stand_in("", accelerator="kvm"), scenario)
    run(stand_in("", transport="vsock"), scenario)


def test_without_qemu_the_package_is_named(stand_in: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = stand_in("")
    monkeypatch.setenv("PATH", "/nowhere")

    async def scenario(machine: QemuMachine) -> None:
        with pytest.raises(ToolMissing) as caught:
            await machine.start()
        assert "qemu-system-x86" in caught.value.hint

    run(machine, scenario)


def test_a_machine_starts_once(stand_in: Make) -> None:
    async def scenario(machine: QemuMachine) -> None:
        await machine.start()
        with pytest.raises(MachineFailed, match="once"):
            await machine.start()
        assert machine.exited is None
        assert set(machine.explanation) == {"accelerator", "machine", "transport", "namespaces", "qemu"}

    run(stand_in("greet(); serve()"), scenario)


def test_where_namespaces_are_refused_it_runs_and_says_so(stand_in: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespaces, "problem", lambda: "it is Tuesday")

    async def scenario(machine: QemuMachine) -> None:
        await machine.start()
        assert machine.explanation["namespaces"].endswith("it is Tuesday")
        assert os.readlink(f"/proc/{machine.pid}/ns/net") == os.readlink("/proc/self/ns/net")

    run(stand_in("greet(); serve()"), scenario)


def test_killed_before_its_start_it_never_starts(stand_in: Make) -> None:
    async def scenario(machine: QemuMachine) -> None:
        await machine.kill()
        with pytest.raises(MachineFailed):
            await machine.start()

    run(stand_in("greet(); serve()"), scenario)
