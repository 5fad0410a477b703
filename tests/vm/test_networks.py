"""Ways out of a VM (`byre.networks`): to another host, and to nothing of this one."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from byre import errors
from byre.machines.namespaces import mounts_problem
from byre.networks import filter as passing
from byre.networks import slirp
from tests import world
from tests.conformance.test_process import SOON
from tests.world import World, needs_networks

pytestmark = [pytest.mark.vm, needs_networks]

MIB = 1024 * 1024

#: At once, by name.
REFUSED = (world.HERE, "10.0.2.2", "10.0.2.3", "169.254.169.254")

#: What comes of a name, where this machine has a name server: of others it has none to ask.
BY_NAME = "you\n" if world.name_server() else "gaierror"

#: What a program sees of its network; prints it.
TRIES = f"""
import errno, hashlib, json, socket
found = {{"interfaces": [name for _, name in socket.if_nameindex()], "resolv": open("/etc/resolv.conf").read()}}

def connect(host, port, line=b"you\\n"):
    with socket.create_connection((host, port), 20) as sock:
        sock.sendall(line)
        return sock.makefile("rb").read().decode()

def udp(host, port):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(20)
        sock.connect((host, port))
        sock.send(b"ping")
        return sock.recv(100).decode()

def tries(name, function):
    try:
        found[name] = function()
    except OSError as error:
        found[name] = errno.errorcode.get(error.errno) or type(error).__name__

tries("tcp", lambda: connect("{world.BEYOND}", {world.TCP}))
tries("udp", lambda: udp("{world.BEYOND}", {world.UDP}))
tries("name", lambda: connect("some.example", {world.TCP}))
for host in {(*REFUSED, "127.0.0.1", "0.0.0.0")}:
    tries(host, lambda: [connect(host, port) for port in ({world.LOOPBACK_PORT}, {world.ANY_PORT})])
    tries(f"udp {{host}}", lambda: udp(host, {world.ANY_PORT}))
print(json.dumps(found))
"""

#: From root of the VM: frames that no kernel would send, a SYN and a datagram to addresses that are this host's.
FRAMES = f"""
import socket, struct, time

def checksum(data):
    total = sum(struct.unpack(f">{{len(data) // 2}}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack(">H", ~total & 0xFFFF)

def packet(target, protocol, data):
    ends = socket.inet_aton("10.0.2.100") + socket.inet_aton(target)
    sum_of = checksum(ends + struct.pack(">HH", protocol, len(data)) + data)
    at = 16 if protocol == 6 else 6
    data = data[:at] + sum_of + data[at + 2:]
    header = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(data), 1, 0, 64, protocol, 0) + ends
    return header[:10] + checksum(header) + header[12:] + data

with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
    sock.bind(("eth0", 0))
    card = sock.getsockname()[4]
    for number in range(3):
        for target in ("127.0.0.1", "0.0.0.0", "127.1.2.3", "{world.HERE}", "10.0.2.2"):
            for port in ({world.LOOPBACK_PORT}, {world.ANY_PORT}):
                syn = struct.pack(">HHIIBBHHH", 2000 + number, port, 1000, 0, 0x50, 2, 65535, 0, 0)
                udp = struct.pack(">HHHH", 3000 + number, port, 12, 0) + b"ping"
                for protocol, data in ((6, syn), (17, udp)):
                    sock.send(bytes.fromhex("52550a000202") + card + b"\\x08\\0" + packet(target, protocol, data))
        time.sleep(0.3)
"""


@pytest.fixture(scope="module")
def beyond() -> Iterator[World]:
    with World() as made:
        yield made


@pytest.fixture
def here(beyond: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """slirp runs there, and so without a user namespace, from which nobody may enter it; its addresses are ours."""
    real = shutil.which("slirp4netns")
    assert real is not None
    beyond.program(tmp_path, "slirp4netns", real)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(passing, "is_ours", lambda address: address == world.HERE)
    monkeypatch.setattr(
        slirp,
        "namespaces",
        SimpleNamespace(problem=lambda: "the test enters another network", mounts_problem=mounts_problem),
    )
    return beyond


def slirps() -> list[int]:
    """Of this process, whatever thread began them."""
    lists = [path.read_text() for path in Path("/proc/self/task").glob("*/children")]
    pids = [int(word) for text in lists for word in text.split()]
    return [pid for pid in pids if "slirp4netns" in Path(f"/proc/{pid}/comm").read_text()]


async def until_no_slirp() -> None:
    async with asyncio.timeout(SOON):
        while slirps():
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def place(vm: Any, kind: str, image: str) -> AsyncIterator[Any]:
    """Where programs run: the VM, a container with a way out, a container of a pod with one."""
    async with contextlib.AsyncExitStack() as stack:
        if kind == "vm":
            await stack.enter_async_context(await vm.open_network())
            yield vm
            return
        where, more = vm, {"net": "user"}
        if kind == "pod":
            where, more = await stack.enter_async_context(await vm.create_pod(net="user")), {}
            await stack.enter_async_context(await where.create_container(image=image, args=["true"]))
        made = await where.create_container(image=image, args=["sleep", "infinity"], **more)
        container = await stack.enter_async_context(made)
        await container.start()
        yield container


async def output(where: Any, program: str) -> str:
    result = await where.run(["python3", "-c", program], capture_output=True, timeout=5 * SOON)
    assert result.returncode == 0, result.stderr
    return str(result.stdout.decode())


@pytest.mark.parametrize("kind", ["container", "pod", "vm"])
async def test_another_host_is_reached_and_this_one_is_not(vm: Any, here: World, debian: str, kind: str) -> None:
    before = here.visitors()
    async with place(vm, kind, debian) as where:
        found = json.loads(await output(where, TRIES))
        assert len(slirps()) == 1
    assert found.pop("interfaces") == ["lo", "eth0"]
    assert found.pop("resolv") == "nameserver 10.0.2.3\n"
    assert [found.pop(name) for name in ("tcp", "udp")] == ["you\n", "ping"]
    assert found.pop("name") == BY_NAME
    assert {found.pop(host) for host in ("127.0.0.1", "0.0.0.0")} == {"ECONNREFUSED"}, "its own loopback"
    assert {found.pop(f"udp {host}") for host in ("127.0.0.1", "0.0.0.0")} == {"ECONNREFUSED"}
    assert set(found) == {f"{kind}{host}" for kind in ("", "udp ") for host in REFUSED}
    assert set(found.values()) == {"EHOSTUNREACH"}
    assert here.visitors() == before
    await until_no_slirp()


@pytest.mark.parametrize("open_to_all", [False, True])
async def test_frames_that_no_kernel_sends_reach_nothing_of_this_host(
    vm: Any, here: World, monkeypatch: pytest.MonkeyPatch, open_to_all: bool
) -> None:
    """And they do without the filter, so that it is the filter that is tested."""
    if open_to_all:
        monkeypatch.setattr(passing.Filter, "passes", lambda _self, _frame: True)
    before = here.visitors()
    async with await vm.open_network():
        await output(vm, FRAMES)
        await asyncio.sleep(0.5)
    assert (here.visitors() > before) == open_to_all


async def test_much_comes_through_both_ways(vm: Any, here: World, debian: str) -> None:
    size = 8 * MIB
    program = f"""
import hashlib, socket
with socket.create_connection(("{world.BEYOND}", {world.TCP})) as sock:
    sock.sendall(b"GIVE {size}\\n")
    data = sock.makefile("rb").read()
print(hashlib.sha256(data).hexdigest())
with socket.create_connection(("{world.BEYOND}", {world.TCP})) as sock:
    sock.sendall(b"TAKE {size}\\n" + data)
    print(sock.makefile("rb").read().decode())
"""
    async with place(vm, "container", debian) as where:
        sums = (await output(where, program)).split()
    assert sums == [hashlib.sha256(hashlib.shake_128(b"byre").digest(size)).hexdigest()] * 2


async def test_it_goes_with_its_container_and_nothing_is_left(vm: Any, here: World, busybox: str) -> None:
    for _ in range(3):
        container = await vm.create_container("out", image=busybox, args=["sleep", "infinity"], net="user")
        await container.start()
        with pytest.raises(errors.ContainerExists):
            await vm.create_container("out", image=busybox, net="user")
        await container.delete()
    await until_no_slirp()
    async with asyncio.timeout(SOON):
        while (await vm.run(["find", "/run/byre/n", "-mindepth", "1"], capture_output=True)).stdout:
            await asyncio.sleep(0.05)


async def test_without_its_slirp_a_container_goes_on_without_a_card(vm: Any, here: World, busybox: str) -> None:
    async with place(vm, "container", busybox) as where:
        (pid,) = slirps()
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(SOON):
            while b"eth0" in (await where.run(["ip", "link"], capture_output=True)).stdout:
                await asyncio.sleep(0.05)
        assert (await where.run(["true"])).returncode == 0


async def test_a_vm_whose_slirp_has_died_can_have_another(vm: Any, here: World) -> None:
    async with await vm.open_network():
        (pid,) = slirps()
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(SOON):
            while True:
                with contextlib.suppress(errors.InvalidRequest):  # the first one is still there
                    async with await vm.open_network():
                        assert json.loads(await output(vm, TRIES))["tcp"] == "you\n"
                    break
    await until_no_slirp()


async def test_what_cannot_be_is_refused(vm: Any, here: World, busybox: str) -> None:
    with pytest.raises(errors.InvalidRequest, match="unknown net"):
        await vm.create_container(image=busybox, net="host")
    async with await vm.create_pod("p") as pod:
        with pytest.raises(errors.InvalidRequest, match="pod's"):
            await pod.create_container(image=busybox, net="user")
    async with await vm.open_network() as network:
        with pytest.raises(errors.InvalidRequest, match="already"):
            await vm.open_network()
        with pytest.raises(errors.NotSupported, match="network"):
            await vm.snapshot()
        await network.close()
        await network.close()
    for wrong in ({"address": "10.0.2.100"}, {"gateway": "x"}, {"nameserver": "::1"}, {"mtu": 1 << 20}):
        right = {"address": "10.0.2.100/24", "gateway": "10.0.2.2", "nameserver": "10.0.2.3", "mtu": 1500}
        with pytest.raises(errors.InvalidRequest):
            await vm.bridge.call("network.open", stdin=0, stdout=0, **{**right, **wrong})
    await until_no_slirp()


async def test_without_slirp_it_says_what_to_install(
    vm: Any, busybox: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_args, **_more: None)
    with pytest.raises(errors.ToolMissing) as caught:
        await vm.create_container(image=busybox, net="user")
    assert caught.value.hint == "apt install slirp4netns"


def test_by_the_commands(beyond: World, tmp_path: Path, debian: str) -> None:
    """`byre` itself runs there, as a user types it; slirp has a user namespace where this host permits one."""
    env = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    def byre(*arguments: str) -> str:
        command = beyond.command([sys.executable, "-m", "byre", *arguments])
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def reaches(*arguments: str) -> bool:
        found = json.loads(byre(*arguments, "python3", "-c", TRIES))
        return "eth0" in found["interfaces"] and found["tcp"] == "you\n" and found[world.HERE] == "EHOSTUNREACH"

    before = beyond.visitors()
    assert reaches("run", "--fresh", "--net", "user", debian)
    byre("up", "--net", "user", "web")
    try:
        assert reaches("exec", "--in", "web", "--vm")
        byre("pod", "create", "--in", "web", "--net", "user", "together")
        assert reaches("run", "--in", "web", "--pod", "together", debian)
        assert not reaches("run", "--in", "web", debian)
    finally:
        byre("down", "web")
    assert beyond.visitors() == before
