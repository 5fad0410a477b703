"""The initramfs: loads what the root file system needs, mounts it read-only and hands over to the agent.

It stays tiny, since every byte of it is unpacked at each boot, and it never waits without an end: what it cannot
do it says on the console and restarts the machine, which ends a VM that runs with `-no-reboot`.
Source of the format: Documentation/driver-api/early-userspace/buffer-format.rst of Linux ("newc").
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from typing import NamedTuple

from .modules import Module

#: How long the disk may take to appear after its driver was loaded: this many times 10 ms.  It is there at once
#: unless the host is badly overloaded.
DISK_TRIES = 500

INIT = f"""#!/bin/busybox sh
fail() {{ echo "byre: initramfs: $*" >/dev/console; sleep 0.1; reboot -f; }}
mount -t devtmpfs dev /dev || fail "no devtmpfs"
for m in $(cat /modules/order); do
    insmod /modules/$m || fail "cannot load the module $m"
done
i=0
while [ ! -b /dev/vda ]; do
    i=$((i + 1))
    [ $i -lt {DISK_TRIES} ] || fail "the root disk /dev/vda does not appear"
    usleep 10000
done
mount -t squashfs -o ro /dev/vda /root || fail "cannot mount the root disk"
mount -o move /dev /root/dev || fail "cannot move /dev"
exec switch_root /root /usr/bin/python3 -I -S -E /usr/lib/byre/init.py
fail "cannot start the agent"
"""

#: Every applet that INIT calls.
APPLETS = ("sh", "mount", "cat", "insmod", "usleep", "sleep", "switch_root", "reboot", "echo", "[")

CPIO_MAGIC = b"070701"
CPIO_END = "TRAILER!!!"


class Node(NamedTuple):
    """One entry of a cpio archive; `device` is (major, minor) of a device node."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def build(busybox: bytes, order: list[Module]) -> bytes:
    """The archive, uncompressed: unpacking a copy is quicker than anything that has to be inflated."""
    nodes = [
        *(Node(name, stat.S_IFDIR | 0o755) for name in ("bin", "dev", "modules", "root")),
        Node("bin/busybox", stat.S_IFREG | 0o755, busybox),
        *(Node(f"bin/{applet}", stat.S_IFLNK | 0o777, b"busybox") for applet in sorted(APPLETS)),
        Node("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
        Node("init", stat.S_IFREG | 0o755, INIT.encode()),
    ]
    names = []
    for number, module in enumerate(order):
        names.append(f"{number:02}-{module.path.rpartition('/')[2]}")
        nodes.append(Node(f"modules/{names[-1]}", stat.S_IFREG | 0o644, module.data))
    nodes.append(Node("modules/order", stat.S_IFREG | 0o644, "".join(f"{name}\n" for name in names).encode()))
    return cpio(nodes)


def cpio(nodes: Iterable[Node]) -> bytes:
    """A newc archive of `nodes`, in their order, owned by root, at the time 0; the same input, the same bytes."""
    out = bytearray()
    for inode, node in enumerate([*nodes, Node(CPIO_END, 0)], start=1):
        name = node.name.encode() + b"\0"
        links = 2 if stat.S_ISDIR(node.mode) else 1
        fields = (inode, node.mode, 0, 0, links, 0, len(node.data), 0, 0, *node.device, len(name), 0)
        out += CPIO_MAGIC + b"".join(b"%08X" % value for value in fields) + name
        out += bytes(-len(out) % 4) + node.data
        out += bytes(-len(out) % 4)
    return bytes(out)
