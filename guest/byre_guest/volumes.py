"""A volume as a container finds it: a directory on its disk, which begins with what the image has at its place.

    /l/N/data       what containers see; nothing else of the disk is theirs
    /l/N/new        while it is being filled for the first time

Rule: `data` is whole or not there, whatever is killed when: it gets its name when all is on the disk.  All of it
may block, and runs in helper children (`bundle`).
"""

from __future__ import annotations

import fcntl
import os
import stat

from byre_proto.errors import InvalidRequest, StorageFailed

from . import linux, rootfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: The type of such a mount in a spec; its source is the disk, as `disk.mount` named it.
TYPE = "volume"

#: Of a directory that the image does not have.
MODE = 0o755


def named(spec: dict[str, Any]) -> list[str]:
    """The disks of a spec's volumes.  Raises `InvalidRequest`."""
    sources = [mount.get("source") for mount in spec.get("mounts", []) if mount.get("type") == TYPE]
    names = [source for source in sources if isinstance(source, str)]
    if len(names) < len(sources):
        raise InvalidRequest("a volume of the spec names no disk", field="mounts")
    return names


def bind(root_fd: int, mount: dict[str, Any], disk: str) -> dict[str, Any]:
    """The mount of a spec as the runtime takes it; `disk` is where it is mounted.  Raises `StorageFailed`."""
    path = mount["destination"]
    try:
        _begin(root_fd, path, disk)
    except OSError as error:
        message = f"the volume for {path} could not be filled: {error.strerror}"
        raise StorageFailed(message, errno=error.errno) from error
    return {**mount, "type": "bind", "source": f"{disk}/data", "options": ["rbind", *(mount.get("options") or [])]}


def _begin(root_fd: int, path: str, disk: str) -> None:
    """Make `data`, unless it is there: with what the image has at `path`, its owner and its mode."""
    top = os.open(disk, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(top, fcntl.LOCK_EX)  # other containers of this VM may want it just now
        names = os.listdir(top)
        if "data" in names:
            return
        if "new" in names:
            from . import packing

            packing.remove_tree(top, "new")
        os.mkdir("new", MODE, dir_fd=top)
        new = os.open("new", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=top)
        try:
            found = rootfs.status(root_fd, path)
            if found is not None and stat.S_ISDIR(found.st_mode):
                _copy(root_fd, path, new)
                os.fchown(new, found.st_uid, found.st_gid)
                os.fchmod(new, stat.S_IMODE(found.st_mode))
        finally:
            os.close(new)
        linux.syncfs(top)
        os.rename("new", "data", src_dir_fd=top, dst_dir_fd=top)
        os.fsync(top)
    finally:
        os.close(top)


def _copy(root_fd: int, path: str, new: int) -> None:
    """What is in a directory of the image, owners, modes and attributes too; packed by a child, unpacked here."""
    from . import exchange, packing, places, unpacking  # not before they are needed

    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.close(reading)
            sink = exchange.Sink(writing)
            packing.Packer(sink).pack(places.Place(root_fd), path, follow=True)
            sink.finish("end")
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    try:
        unpacking.Unpacker(places.Place(new), ".", keep=False).unpack(exchange.Source(reading))
    finally:
        os.close(reading)  # a child that still writes ends by it
        os.waitpid(pid, 0)
