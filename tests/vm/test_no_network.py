"""Without a network card every way out is shut: tried from the VM, a container, and a container of a pod."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests import vehicles

pytestmark = pytest.mark.vm

#: Tries what a program that wants out may try; prints what came of it, by the name of the error.
TRIES = r"""
import errno, json, socket

TCP, UDP, RAW = socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW
HOST_CID = 2
found = {"interfaces": [name for _, name in socket.if_nameindex()]}

def tries(name, function):
    try:
        found[name] = repr(function())
    except OSError as error:
        found[name] = errno.errorcode.get(error.errno, type(error).__name__)

def connect(family, kind, address, protocol=0):
    with socket.socket(family, kind, protocol) as sock:
        sock.settimeout(3)
        sock.connect(address)
        sock.send(b"\x08" + bytes(63))

for name, family, address in (
    ("public", socket.AF_INET, "192.0.2.1"), ("gateway of slirp", socket.AF_INET, "10.0.2.2"),
    ("metadata", socket.AF_INET, "169.254.169.254"), ("broadcast", socket.AF_INET, "255.255.255.255"),
    ("multicast", socket.AF_INET, "224.0.0.1"), ("public 6", socket.AF_INET6, "2001:db8::1"),
    ("link-local 6", socket.AF_INET6, "fe80::1"), ("all nodes 6", socket.AF_INET6, "ff02::1"),
):
    if "cast" not in name and "nodes" not in name:
        tries(f"tcp {name}", lambda: connect(family, TCP, (address, 80)))
    tries(f"udp {name}", lambda: connect(family, UDP, (address, 53)))
    icmp = socket.IPPROTO_ICMP if family == socket.AF_INET else socket.IPPROTO_ICMPV6
    tries(f"raw {name}", lambda: connect(family, RAW, (address, 0), icmp))
tries("name", lambda: socket.getaddrinfo("example.org", 80))
tries("vsock", lambda: connect(socket.AF_VSOCK, TCP, (HOST_CID, 1)))

def packet(interface):
    with socket.socket(socket.AF_PACKET, RAW, socket.htons(3)) as sock:
        sock.bind((interface, 0))
        sock.send(bytes.fromhex("ffffffffffff") * 2 + bytes(50))

for interface in ("eth0", "enp0s1", "any"):
    tries(f"packet {interface}", lambda: packet(interface))

def new_link():  # RTM_NEWLINK of a dummy: header, ifinfomsg, IFLA_IFNAME, IFLA_LINKINFO
    body = bytes(16) + b"\x0c\0\x12\0\x08\0\x01\0dumm"
    with socket.socket(socket.AF_NETLINK, RAW, 0) as sock:
        sock.bind((0, 0))
        sock.send((16 + len(body)).to_bytes(4, "little") + b"\x10\0\x05\x06" + bytes(8) + body)
        code = -int.from_bytes(sock.recv(65536)[16:20], "little", signed=True)
        if code:
            raise OSError(code, "netlink")

tries("new link", new_link)
with open("/proc/net/unix") as file:
    found["abstract sockets"] = [line.split()[-1] for line in file if line.split()[-1].startswith("@")]
print(json.dumps(found))
"""

#: No route, or no such interface or family; EPERM and EACCES where the kernel does not even ask for one.
SHUT = {"ENETUNREACH", "ENODEV", "EADDRNOTAVAIL", "EINVAL", "EPERM", "EACCES", "EAFNOSUPPORT", "ENXIO", "gaierror"}


async def found_by(host: Any) -> dict[str, Any]:
    done = await host.run(["python3", "-c", TRIES], capture_output=True, timeout=100, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def judge(found: dict[str, Any], *, but: tuple[str, ...] = ()) -> None:
    assert found.pop("interfaces") == ["lo"]
    assert found.pop("abstract sockets") == []
    assert {name: how for name, how in found.items() if how not in SHUT and name not in but} == {}


async def test_from_the_vm(vm: Any) -> None:
    # Root of the VM makes what links it likes, and none leads anywhere.  Where the agent's channel is vsock, the
    # host's end of it is there, behind its secret.
    channel = ("vsock",) if vehicles.machine() == "kvm" else ()
    judge(await found_by(vm), but=("new link", *channel))


@pytest.mark.behaviour("B30")
@pytest.mark.parametrize("in_pod", [False, True], ids=["container", "pod"])
async def test_from_a_container(vm: Any, debian: str, in_pod: bool) -> None:
    async with await vm.create_pod("closed") as pod:
        maker = pod if in_pod else vm
        async with await maker.create_container(image=debian, args=["sleep", "infinity"]) as container:
            await container.start()
            found = await found_by(container)
            assert found["vsock"] in ("EPERM", "EACCES", "EINVAL", "EAFNOSUPPORT")
            judge(found)
