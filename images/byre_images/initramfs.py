"""The initramfs: `init.c`, the modules that the root disk needs, and nothing else; it is unpacked at every boot.

Source of the format: Documentation/driver-api/early-userspace/buffer-format.rst of Linux ("newc").
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from typing import NamedTuple

from .errors import BuildFailed
from .modules import Module

CPIO_MAGIC = b"070701"
CPIO_END = "TRAILER!!!"

#: What `init.c` reads of the list of modules (its MAX_ORDER, with the end of the string).
MAX_ORDER = 4095


class Node(NamedTuple):
    """One entry of a cpio archive; `device` is (major, minor) of a device node."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def build(init: bytes, order: list[Module]) -> bytes:
    """The archive of the compiled `init` and the modules that it loads, in that order.

    Uncompressed: copying half a megabyte is quicker than anything that has to be inflated.
    """
    nodes = [Node(name, stat.S_IFDIR | 0o755) for name in ("dev", "modules", "root")]
    nodes += [Node("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)), Node("init", stat.S_IFREG | 0o755, init)]
    names = [module.path.rpartition("/")[2] for module in order]
    for name, module in zip(names, order, strict=True):
        nodes.append(Node(f"modules/{name}", stat.S_IFREG | 0o644, module.data))
    listing = "".join(f"{name}\n" for name in names).encode()
    if len(listing) > MAX_ORDER:
        raise BuildFailed(f"the initramfs loads too many modules: {len(names)}")
    return cpio([*nodes, Node("modules/order", stat.S_IFREG | 0o644, listing)])


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
