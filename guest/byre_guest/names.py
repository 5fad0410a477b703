"""What a container reads of names: /etc/hosts, /etc/hostname, /etc/resolv.conf, as container users expect them.

    write(directory, names, server)  make the three
    add(directory, name)             one more name of this machine, in a pod's hosts
    mounts(directory, spec)          the mounts that put them in their places

Rule: they lie on a file system with a size, because the container may write to them; what the container's spec
itself mounts at these places is left as it is.  Source: hosts(5), resolv.conf(5); podman-run(1).
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

FILES = ("hosts", "hostname", "resolv.conf")

LOOPBACK = "127.0.0.1"

#: As Debian's and podman's.
_HOSTS = f"{LOOPBACK}\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"

#: hosts is read up to this: a container may have written to it.
MAX_HOSTS = 64 * 1024


def write(directory: str, names: list[str], nameserver: str) -> None:
    """Make them; of `names` the first is the host name; "" is nobody to ask for others.  Raises OSError."""
    os.makedirs(directory, 0o755, exist_ok=True)
    own = " ".join(dict.fromkeys(names))
    texts = (
        f"{_HOSTS}{LOOPBACK}\t{own}\n",
        f"{names[0]}\n",
        resolv_conf(nameserver),
    )
    for name, text in zip(FILES, texts):
        with open(f"{directory}/{name}", "x", encoding="utf-8") as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(text)


def resolv_conf(nameserver: str) -> str:
    """The text of /etc/resolv.conf."""
    return f"nameserver {nameserver}\n" if nameserver else ""


def add(directory: str, name: str) -> None:
    """Give the machine one more name, unless it has it.  Raises OSError."""
    line = f"{LOOPBACK}\t{name}\n".encode()
    with open(f"{directory}/hosts", "r+b", buffering=0) as file:
        if line not in (file.read(MAX_HOSTS) or b"").splitlines(keepends=True):
            os.lseek(file.fileno(), 0, os.SEEK_END)
            file.write(line)


def mounts(directory: str, spec: dict[str, Any]) -> list[dict[str, Any]]:
    """OCI mounts of the three, less those places that the spec has a mount for."""
    taken = {mount["destination"].rstrip("/") for mount in spec.get("mounts", [])}
    access = "ro" if spec.get("root", {}).get("readonly") else "rw"
    return [
        {
            "destination": f"/etc/{name}",
            "type": "bind",
            "source": f"{directory}/{name}",
            "options": ["bind", "private", "nosuid", "nodev", "noexec", access],
        }
        for name in FILES
        if f"/etc/{name}" not in taken
    ]
