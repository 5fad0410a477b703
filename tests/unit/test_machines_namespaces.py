"""A process in namespaces of its own: read from the kernel, and tried from inside."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from byre.machines import namespaces
from byre.machines.host import describe_host
from byre.machines.spawn import OwnedProcess, owned
from tests.namespaces import needs_user_namespaces

PATIENCE = 10.0

#: Tries to reach a TCP port and an abstract socket of this host, its owner's memory, and to gain a capability.
TRIES = """
import os, socket, subprocess, sys
for family, address in ((socket.AF_INET, ("127.0.0.1", int(sys.argv[1]))), (socket.AF_UNIX, "\\0" + sys.argv[2])):
    try:
        socket.socket(family).connect(address)
        print("reached")
    except OSError as error:
        print(error.strerror)
try:
    print(open(f"/proc/{os.getppid()}/mem"))
except OSError as error:
    print(error.strerror)
print(subprocess.call(["mount", "-t", "tmpfs", "none", "/"], stderr=subprocess.DEVNULL) == 0)
"""


@contextlib.contextmanager
def running(*argv: str) -> Iterator[tuple[int, Callable[[], bytes]]]:
    """Its process id, once it has written something; and what gives all that it has written when it has ended."""
    reader, writer = os.pipe()
    process = OwnedProcess(argv, output=lambda data: os.write(writer, data) and None, apart=namespaces.MACHINE)
    process.start()
    said = bytearray(os.read(reader, 4096))

    def end() -> bytes:
        process.exit.result(PATIENCE)
        os.set_blocking(reader, False)
        with contextlib.suppress(BlockingIOError):
            said.extend(os.read(reader, 65536))
        return bytes(said)

    try:
        assert process.pid is not None
        yield process.pid, end
    finally:
        process.kill()
        process.exit.result(PATIENCE)
        process.join()
        os.close(reader)
        os.close(writer)


def status(pid: int | str) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines)


@needs_user_namespaces
def test_it_has_namespaces_of_its_own_and_no_capability() -> None:
    with running("sh", "-c", "echo here; exec sleep 1000") as (pid, _):
        for kind in ("user", "net", "ipc", "uts"):
            assert os.readlink(f"/proc/{pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}"), kind
        found = status(pid)
        assert {found[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
        assert found["NoNewPrivs"] == "1"
        assert found["Uid"] == status("self")["Uid"]
        devices = Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]
        assert [line.split(":")[0].strip() for line in devices] == ["lo"]


@needs_user_namespaces
def test_its_owner_can_read_its_memory() -> None:
    """That is how a machine is saved."""
    with running("sh", "-c", "echo here; exec sleep 1000") as (pid, _):
        found = re.search(r"^([0-9a-f]+)-.*\[stack\]$", Path(f"/proc/{pid}/maps").read_text(), re.MULTILINE)
        assert found is not None
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory, open(f"/proc/{pid}/pagemap", "rb") as pages:
            assert len(os.pread(memory.fileno(), 16, int(found[1], 16))) == 16
            assert len(os.pread(pages.fileno(), 8, int(found[1], 16) // 4096 * 8)) == 8


@needs_user_namespaces
def test_it_reaches_no_socket_of_this_hosts_network_and_no_process() -> None:
    name = f"byre-test-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(f"\0{name}")
        abstract.listen()
        port = tcp.getsockname()[1]
        command = (sys.executable, "-c", TRIES, str(port), name)
        with running(*command) as (_, end):
            found = end().decode().splitlines()
        assert found == ["Network is unreachable", "Connection refused", "Permission denied", "False"]


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An unshare that may not."""
    program = tmp_path / "unshare"
    program.write_text("#!/bin/sh\necho 'unshare: unshare failed: Operation not permitted' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    namespaces._refusal.cache_clear()
    yield
    namespaces._refusal.cache_clear()


@pytest.mark.usefixtures("refused")
def test_a_host_that_refuses_is_told_of_with_what_to_change() -> None:
    assert namespaces.problem() == "unshare: unshare failed: Operation not permitted"
    fact = {fact.name: fact for fact in describe_host().facts}["namespaces"]
    assert fact.ok and "Operation not permitted" in fact.detail and "max_user_namespaces" in fact.hint


def test_without_the_program_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert namespaces.problem() == "unshare is not installed"


def test_only_who_is_to_be_apart_is() -> None:
    assert "unshare" not in owned(["true"])
