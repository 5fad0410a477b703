"""Mounts that come and go in a container that runs (B28).

    in the VM's mount namespace         a detached mount is made: a copy of what the host names, or a new tmpfs
    in the container's mount namespace  it is moved to its place, or taken away

Rule: what a container has is hostile.  Its paths are resolved with its root for their "/" (`rootfs.INSIDE`), and a
helper child that has entered its namespace keeps the VM's root directory, so that nothing else, no import either,
is looked up there (B65).  All of this may block (B47).  Source: open_tree(2), move_mount(2), proc_pid_mountinfo(5).
"""

from __future__ import annotations

import errno
import os
import posixpath
import stat

from byre_proto.errors import (
    ByreError,
    ContainerNotReady,
    InvalidRequest,
    MountInUse,
    PathExists,
    PathNotFound,
    ResourceExhausted,
)

from . import children, linux, rootfs, unpacking
from .places import Place

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .container import Container
    from .server import Call

    Done = Callable[["ByreError | None"], object]

#: For one of them to come or go, in seconds: milliseconds when all is well.
TIMEOUT = 60.0

#: In one container: far more than anybody needs, far fewer than the kernel's sysctl fs.mount-max.
MAX_MOUNTS = 256

#: No device of the VM, and no privilege, comes in by a mount.
ATTRIBUTES = linux.MOUNT_ATTR_NODEV | linux.MOUNT_ATTR_NOSUID


class Mounts:
    """Those of one container; it takes them with it when it ends."""

    def __init__(self, container: Container) -> None:
        self._container = container
        self._ids: dict[str, int] = {}  # by destination; 0 while one comes or goes
        self._wanted: dict[str, dict[str, Any]] = {}  # what they were made with

    def add(self, call: Call, arguments: dict[str, Any]) -> None:
        """`container.mount`."""
        container, destination = self._container, _checked(arguments["destination"])
        if destination in self._ids:
            raise PathExists(f"{destination} has a mount already", hint="remove it first", path=destination)
        if len(self._ids) >= MAX_MOUNTS:
            raise ResourceExhausted(f"container {container.id} has {MAX_MOUNTS} mounts already")
        source, layer = arguments["source"], arguments["layer"]
        if bool(source) + bool(layer) + (arguments["size_bytes"] > 0) != 1:
            raise InvalidRequest("exactly one of source, layer and size_bytes is needed", field="source")
        if layer:
            source = container.owner.disks.use([layer], self._user(destination))[0]

        def added(mount: int | None, error: ByreError | None) -> None:
            if error is not None or mount is None:
                self._forget(destination)
                call.fail(error or ByreError("the helper did not say which mount it made"))
                return
            self._ids[destination] = mount
            self._wanted[destination] = {k: arguments[k] for k in ("source", "layer", "size_bytes", "read_only")}
            if call.answered:  # too late: nobody knows of it
                self._remove(destination, lambda _error: None)
            call.reply({})

        read_only, size = arguments["read_only"], arguments["size_bytes"]
        self._ids[destination] = 0
        try:
            self._inside(lambda pid, pidfd: attach(pid, pidfd, destination, source, size, read_only), added)
        except BaseException:
            self._forget(destination)
            raise

    def remove(self, call: Call, arguments: dict[str, Any]) -> None:
        """`container.unmount`."""
        destination = _checked(arguments["destination"])
        if not self._ids.get(destination):
            raise PathNotFound(f"nothing is mounted at {destination} that could be removed", path=destination)
        wanted = self._wanted[destination]
        self._remove(destination, lambda error: call.reply(wanted) if error is None else call.fail(error))

    def _remove(self, destination: str, done: Done) -> None:
        mount, self._ids[destination] = self._ids[destination], 0

        def removed(_result: object, error: ByreError | None) -> None:
            if error is None:
                self._forget(destination)
            else:
                self._ids[destination] = mount
            done(error)

        try:
            self._inside(lambda pid, pidfd: detach(pid, pidfd, destination, mount), removed)
        except BaseException:
            self._ids[destination] = mount
            raise

    def ended(self) -> None:
        """The container is gone, and its namespace with it."""
        for destination in list(self._ids):
            self._forget(destination)

    def _forget(self, destination: str) -> None:
        self._container.owner.disks.release(self._user(destination))
        self._ids.pop(destination, None)
        self._wanted.pop(destination, None)

    def _user(self, destination: str) -> str:
        """What holds a layer; no container can be called this."""
        return f"{self._container.id}:{destination}"

    def _inside(self, function: Callable[[int, int], object], done: children.Done) -> None:
        """Call it in a helper child, with the container's first process and a pidfd of it."""
        init, container = self._container.init, self._container
        if init is None or init.exit is not None or container.state not in ("ready", "starting", "running"):
            raise container.not_ready("is not running")
        pid = init.pid
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError as error:
            raise container.not_ready("has just ended") from error
        try:
            loop, reaper = container.owner.loop, container.owner.reaper
            children.run(loop, reaper, lambda: _typed(function, pid, pidfd), TIMEOUT, done, keep=(pidfd,))
        finally:
            os.close(pidfd)


def _checked(destination: str) -> str:
    if not destination.startswith("/") or "\0" in destination:
        raise InvalidRequest(f"{destination[:200]!r} is not an absolute path", field="destination")
    path = posixpath.normpath(destination.lstrip("/"))
    if path in (".", "..") or path.startswith("../"):
        raise InvalidRequest("a container's root directory itself cannot be mounted over", field="destination")
    return f"/{path}"


# -- in the helper child -----------------------------------------------------------------------------------


def attach(pid: int, pidfd: int, destination: str, source: str, size: int, read_only: bool) -> int:
    """Mount `source`, or a tmpfs of `size` bytes, at `destination` in the container; the mount's id."""
    mount = _detached(source, size, read_only)
    place = Place(rootfs.open_root_of(pid, pidfd))
    target = _target(place, destination, stat.S_ISDIR(os.fstat(mount).st_mode))
    _enter(pidfd)
    linux.move_mount(mount, target)
    return _mount_id(mount)


def _detached(source: str, size: int, read_only: bool) -> int:
    attributes = ATTRIBUTES | (linux.MOUNT_ATTR_RDONLY if read_only else 0)
    if size:
        return linux.detached_mount("tmpfs", {"size": str(size), "mode": "1777"}, attributes)
    mount = linux.open_tree(source)
    linux.mount_setattr(mount, attributes)
    return mount


def _target(place: Place, destination: str, directory: bool) -> int:
    """The place of a mount, made where it is missing: an empty directory, or an empty file for a file."""
    try:
        return place.find(destination, os.O_DIRECTORY if directory else 0)
    except FileNotFoundError:
        pass
    unpacking.make_directories(place, destination if directory else posixpath.dirname(destination))
    if not directory:
        parent, name = place.parent(destination)
        os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=parent))
    return place.find(destination, os.O_DIRECTORY if directory else 0)


def detach(pid: int, pidfd: int, destination: str, mount: int) -> None:
    """Unmount the mount with this id, wherever it is by now; one that the container itself removed is gone."""
    path = _mount_point(pid, mount)
    if not path:
        return
    place = Place(rootfs.open_root_of(pid, pidfd))
    top = place.find(path)
    over = _mount_id(top) != mount
    os.close(top)
    if over:
        raise MountInUse(f"something else is mounted over {destination}", path=destination)
    parent, name = place.parent(path)
    _enter(pidfd)
    os.fchdir(parent)
    linux.umount(name)


def _enter(pidfd: int) -> None:
    """The container's mount namespace, with the VM's root directory."""
    root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    linux.setns(pidfd, linux.CLONE_NEWNS)
    os.fchdir(root)
    os.chroot(".")


def _mount_id(fd: int) -> int:
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as file:
        for line in file:
            if line.startswith("mnt_id:"):
                return int(line.partition(":")[2])
    raise OSError(errno.ENOSYS, "the kernel does not tell a mount's id")


def _mount_point(pid: int, mount: int) -> str:
    """Where the mount is, seen from the root of the process; "" where it is not."""
    with open(f"/proc/{pid}/mountinfo", "rb") as file:
        for line in file:
            number, _parent, _device, _root, point, _ = line.split(b" ", 5)
            if int(number) == mount:
                return os.fsdecode(_unescaped(point))
    return ""


def _unescaped(text: bytes) -> bytes:
    """Space, tab, newline and backslash stand in mountinfo as three octal digits."""
    first, *rest = text.split(b"\\")
    return first + b"".join(bytes([int(part[:3], 8)]) + part[3:] for part in rest)


def _typed(function: Callable[[int, int], object], pid: int, pidfd: int) -> object:
    try:
        return function(pid, pidfd)
    except ProcessLookupError as error:
        raise ContainerNotReady("the container has ended meanwhile") from error
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise MountInUse("a process in the container has something of the mount open") from error
        from .files import typed

        raise typed(error, str(error.filename or "the mount")) from error
