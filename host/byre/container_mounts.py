"""What a container gets of this host beside its image: shared directories, volumes, a disk for what it writes.

Rule: `creation` says when; here each mount becomes what OCI and the guest have for it.  What was attached or
shared is taken back by the caller's `undo`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .errors import ByreError, InvalidRequest
from .machines.spawn import in_thread
from .mounts import HostDirectory, Volume

if TYPE_CHECKING:
    from .container_disks import ContainerDisks
    from .creation import VM, ContainerOptions
    from .mounts import Mount
    from .shares.share import Share


#: The type of a volume's mount in a spec for the agent; its source is the disk's name there.
VOLUME = "volume"


async def shared(
    vm: VM, mounts: Sequence[Mount | Mapping[str, Any]], undo: contextlib.AsyncExitStack
) -> tuple[list[Mapping[str, Any]], list[str]]:
    """The mounts as OCI has them, in their order, and the shares that were made for them."""
    found: list[Mapping[str, Any]] = []
    shares: list[str] = []
    for mount in mounts:
        if isinstance(mount, HostDirectory):
            share = await vm.shares.share(str(mount.path), mount.read_only, "mmap")
            undo.push_async_callback(unshare, vm, share)
            shares.append(share.name)
            found.append(_bind(mount, share))
        else:
            found.append(_mount(mount))
    return found, shares


async def unshare(vm: VM, share: Share) -> None:
    """The error that led to it is the one to tell; a container that was made for a moment took it with it."""
    with contextlib.suppress(ByreError):
        await vm.bridge.finish(share.close())


def _bind(mount: HostDirectory, share: Share) -> dict[str, Any]:
    options = ["rbind", "nosuid", "nodev", "ro" if mount.read_only else "rw"]
    return {"destination": mount.target, "type": "bind", "source": share.path, "options": options}


def _mount(mount: Mount | Mapping[str, Any]) -> Mapping[str, Any]:
    """As OCI has it; the source of a volume's is its name, for the time being."""
    if isinstance(mount, Volume):
        options = ["nodev", "ro" if mount.read_only else "rw"]
        return {"destination": mount.target, "type": VOLUME, "source": mount.name, "options": options}
    if not isinstance(mount, Mapping):
        raise InvalidRequest(f"{mount!r} cannot be mounted")
    return mount


async def attach(disks: ContainerDisks, request: dict[str, Any], options: ContainerOptions) -> None:
    """Have what the container may write at hand, and name it in the request as the guest does."""
    from . import disk_files, volumes  # most containers have neither

    lease, container = request["lease"], request["container"]
    if options.scratch == "disk":
        size = options.scratch_bytes or disk_files.DEFAULT_BYTES
        request["scratch"] = await disks.hold(lease, container, None, size)
    for mount in request["spec"]["mounts"]:
        if mount.get("type") == VOLUME:
            path = await in_thread(functools.partial(volumes.ensure, mount["source"]))
            mount["source"] = await disks.hold(lease, container, path, 0)
