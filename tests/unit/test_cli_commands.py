"""The command as a process of its own, against a keeper whose VM is played."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from byre import detached, rundir

KEEPER = "tests.unit.played_keeper"
TIMEOUT = 60.0


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    return tmp_path


@pytest.fixture
def keeper(runtime: Path) -> Iterator[int]:
    """A VM named "default" is up; gives the keeper's pid."""
    asyncio.run(detached.start("default", {}, keeper=KEEPER))
    yield int(rundir.find("default").info()["pid"])
    if rundir.is_up("default"):
        asyncio.run(detached.end("default"))


def byre(*args: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    streams: dict[str, object] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    command = [sys.executable, "-m", "byre", *args]
    return subprocess.run(command, timeout=TIMEOUT, **{**streams, **options})  # type: ignore[call-overload, no-any-return]


def imported(*args: str) -> set[str]:
    """The modules that a command has imported at its end."""
    program = (
        "import sys; from byre.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "sys.stderr.write('\\n'.join(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program, *args], capture_output=True, timeout=TIMEOUT, text=True)
    return set(done.stderr.split("\n"))


def test_what_a_command_does_not_need_is_not_imported(keeper: int) -> None:
    for line in (["--version"], ["run", "--help"], ["nonsense"]):
        found = imported(*line)
        assert "byre.cli.parser" in found
        assert not found & {"asyncio", "typing", "byre.bridge", "byre_images", "msgpack"} - {"typing"}, line
    found = imported("exec", "--vm", "echo")
    assert "byre.vm" in found
    assert not found & {"qemu", "qemu.qmp", "byre_images", "byre.oci.store", "byre.keeper", "importlib.metadata"}


def test_a_command_in_a_vm_that_is_up(keeper: int) -> None:
    done = byre("exec", "--vm", "--", "echo", "a  b", "--c")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"a  b --c", b"")


def test_run_uses_the_default_vm_while_it_is_up_and_says_so_when_asked(keeper: int) -> None:
    done = byre("run", "--verbose", "--vm", "echo", "x")
    assert (done.returncode, done.stdout) == (0, b"x")
    assert done.stderr == b"byre: in the VM 'default', which is up\n"


def test_not_found_is_127_and_a_vm_that_is_not_up_125(keeper: int) -> None:
    done = byre("exec", "--vm", "nosuch")
    assert (done.returncode, done.stdout) == (127, b"")
    assert b"byre: error: nosuch: no such command\n" in done.stderr
    done = byre("exec", "--in", "other", "--vm", "echo")
    assert done.returncode == 125
    assert done.stderr == b"byre: error: no VM named 'other' is up\nhint: up are: default\n"


def test_it_without_a_terminal_is_refused(keeper: int) -> None:
    done = byre("exec", "-it", "--vm", "echo")
    assert done.returncode == 125 and b"stdin is not a terminal" in done.stderr


def test_a_stdout_that_is_closed_or_full_is_no_traceback(keeper: int) -> None:
    with open("/dev/full", "wb") as full:
        done = byre("exec", "--vm", "echo", "x", stdout=full)
    assert done.returncode == 125 and b"No space left on device" in done.stderr and b"Traceback" not in done.stderr
    shell = f"{sys.executable} -m byre exec --vm echo x >&-; echo $? >&2"
    done = subprocess.run(["sh", "-c", shell], capture_output=True, timeout=TIMEOUT)
    assert done.stderr == b"0\n"
    shell = f"{sys.executable} -m byre ps 2>&- >&-; {sys.executable} -m byre down nosuch 2>&-; true"
    assert subprocess.run(["sh", "-c", shell], capture_output=True, timeout=TIMEOUT).stdout == b""


def test_ps_shows_vms_and_processes_and_buries_the_dead(keeper: int) -> None:
    running = subprocess.Popen([sys.executable, "-m", "byre", "exec", "--vm", "forever"])
    try:
        while b"forever" not in (done := byre("ps")).stdout:
            assert running.poll() is None
        vm = done.stdout.splitlines()[1].split()
        assert vm[:3] == [b"default", b"up", str(keeper).encode()]
    finally:
        running.kill()
        running.wait()
    while b"forever" in byre("ps").stdout:
        pass  # killed with the client that had started it
    os.kill(keeper, signal.SIGKILL)
    while rundir.is_up("default"):
        pass
    assert b"dead, removed: its keeper was killed" in byre("ps").stdout
    assert b"dead" not in byre("ps").stdout


def test_ps_shows_what_a_guest_says_escaped_and_a_lie_as_an_error(keeper: int) -> None:
    bad = "\x1b[2J\r\n%s{0}"
    entry = {"process": 1, "pid": bad, "container": bad, "args": [bad, bad], "exit": None}
    entry |= {"id": bad, "state": bad, "created_ns": 0}
    for name, lists in (("escapes", [entry]), ("nonsense", [{"process": {}}]), ("nothing", [5])):
        asyncio.run(detached.start(name, {"lists": lists}, keeper=KEEPER))
    try:
        done = byre("ps")
    finally:
        for name in ("escapes", "nonsense", "nothing"):
            asyncio.run(detached.end(name))
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\\x1b[2J" in done.stdout and not set(b"\x1b\r") & set(done.stdout)
    states = {line.split()[0]: line.split()[1] for line in done.stdout.splitlines()[1:5]}
    assert states == {b"default": b"up", b"escapes": b"up", b"nonsense": b"error:", b"nothing": b"error:"}


COMMANDS = ("exec --vm echo", "shell", "stop c", "rm c", "logs c", "cp c:/x .", "port c")


def test_every_command_notices_that_the_keeper_was_killed_and_ps_cleans_up(keeper: int, runtime: Path) -> None:
    waiting = subprocess.Popen([sys.executable, "-m", "byre", "exec", "--vm", "forever"], stderr=subprocess.PIPE)
    while b"forever" not in byre("ps").stdout:
        assert waiting.poll() is None
    os.kill(keeper, signal.SIGKILL)
    _, said = waiting.communicate(timeout=TIMEOUT)
    assert waiting.returncode == 125 and b"byre: error: " in said
    for command in COMMANDS:
        done = byre(*command.split())
        assert done.returncode == 125, command
        assert b"no VM named 'default' is up" in done.stderr, command
    assert b"default  dead, removed: its keeper was killed" in byre("ps").stdout
    assert list((runtime / "byre").iterdir()) == []
    assert byre("down").returncode == 125


def test_a_signal_ends_a_command_that_obeys_it(keeper: int) -> None:
    running = subprocess.Popen([sys.executable, "-m", "byre", "exec", "--vm", "forever"])
    while b"forever" not in byre("ps").stdout:
        assert running.poll() is None
    for _ in range(2):  # the played one ignores the first
        running.send_signal(signal.SIGTERM)
        if running.poll() is not None:
            break
        byre("ps")  # a round trip through keeper and guest, so that two signals are two
    assert running.wait(TIMEOUT) == 137


def test_down_ends_it_and_a_second_time_is_an_error(keeper: int) -> None:
    done = byre("down")
    assert (done.returncode, done.stdout) == (0, b"default\n")
    done = byre("down")
    assert done.returncode == 125
    assert done.stderr == b"byre: error: no VM named 'default' is up\nhint: start one: byre up\n"


def test_a_reader_that_has_enough_of_our_own_output_ends_it_quietly(keeper: int) -> None:
    shell = f"{sys.executable} -m byre run --help | true"
    done = subprocess.run(["sh", "-c", shell], capture_output=True, timeout=TIMEOUT)
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr


def test_the_version_is_told() -> None:
    done = byre("--version")
    assert done.returncode == 0 and done.stdout.startswith(b"byre ")
