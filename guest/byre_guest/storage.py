"""Disks and layers as the kernel has them: drivers, device nodes, mounts, removal.

Rule: every function here may block, so it runs in helper children with deadlines (B47); `find_disk`, which only
reads sysfs, may be called anywhere.  The loop's side is `disks`.
"""

from __future__ import annotations

import errno
import os
from time import monotonic, sleep

from byre_proto.errors import DiskInUse, StorageFailed

from . import linux, modules

LAYERS = "/l"

#: The file system of disks that containers write, and what it needs besides: its checksums' algorithm.
WRITABLE = "ext4"
NEEDED = {WRITABLE: ("crc32c_generic", WRITABLE)}

#: Blocks that are freed go back to the host's file.  Inode tables are not cleared ahead, which would fill it: they
#: are holes of a new file, and so zeros.
WRITABLE_OPTIONS = "discard,noinit_itable"

SCSI_DEVICES = "/sys/bus/scsi/devices"

#: For a disk's last user to be gone: its namespaces may be on their way out.
IDLE_TIMEOUT = 5.0
#: For a disk that is shown to be one that can be opened.
OPEN_TIMEOUT = 5.0
#: Between two looks.
PAUSE = 0.01


def find_disk(target: int, lun: int) -> str:
    """The device node of the SCSI disk *:0:target:lun, "" while there is none."""
    directory = _scsi_device(target, lun)
    try:
        names = os.listdir(f"{directory}/block") if directory else []
    except FileNotFoundError:
        return ""
    return f"/dev/{names[0]}" if names and os.path.exists(f"/dev/{names[0]}") else ""


def _scsi_device(target: int, lun: int) -> str:
    try:
        names = os.listdir(SCSI_DEVICES)
    except FileNotFoundError:
        return ""
    for name in names:
        if name[0].isdigit() and name.split(":")[1:] == ["0", str(target), str(lun)]:
            return f"{SCSI_DEVICES}/{name}"
    return ""


def need(*names: str) -> None:
    """Have kernel modules loaded; in a helper child.  Raises `StorageFailed`."""
    missing = [name for name in names if not _live(name)]
    try:
        if missing:
            modules.load(*missing)
    except OSError as error:
        raise StorageFailed(f"a kernel module could not be loaded: {error}", errno=error.errno) from error


def _live(name: str) -> bool:
    """Whether a module is built in or has finished loading; one that is on its way is waited for by loading it."""
    try:
        with open(f"/sys/module/{name}/initstate", encoding="ascii") as file:
            return file.read() == "live\n"
    except FileNotFoundError:
        return os.path.isdir(f"/sys/module/{name}")


def mount_layers(wanted: list[tuple[str, str, str]]) -> list[str]:
    """Mount layers, each `(device, path, filesystem)`; for each what went wrong, "" where nothing did.

    All in one go: each helper child costs 20 ms under emulation, and images have many layers.
    """
    return [_mount_layer(*each) for each in wanted]


def _mount_layer(device: str, path: str, filesystem: str) -> str:
    """Read-only, but for what containers write.  Programs in it may be setuid: containers need that."""
    how, options = (0, WRITABLE_OPTIONS) if filesystem == WRITABLE else (linux.MS_RDONLY, "")
    try:
        need(*NEEDED.get(filesystem, (filesystem,)))
        os.makedirs(path, exist_ok=True)
        os.close(_open(device, os.O_RDONLY))
        linux.mount(device, path, filesystem, how | linux.MS_NODEV, options)
    except StorageFailed as error:
        return error.message
    except OSError as error:
        return f"{device} could not be mounted as {filesystem} on {path}: {error.strerror}"
    return ""


def sync(paths: list[str]) -> None:
    """What was written below each of these mounts is on its disk.  Raises `StorageFailed`."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            linux.syncfs(fd)
        except OSError as error:
            raise StorageFailed(f"{path} could not be written to its disk: {error.strerror}") from error
        finally:
            os.close(fd)


def _open(device: str, flags: int) -> int:
    """Open a disk; ENXIO is waited out: the kernel shows a disk in /dev a moment before it can be opened."""
    deadline = monotonic() + OPEN_TIMEOUT
    while True:
        try:
            return os.open(device, flags | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.ENXIO or monotonic() > deadline:
                raise
        sleep(PAUSE)


def remove_layer(path: str, filesystem: str, target: int, lun: int) -> None:
    """Unmount a layer and delete its SCSI device; in a helper child.  What is not there is no error."""
    device = find_disk(target, lun)
    try:
        if path and os.path.isdir(path):
            _unmount(path)
            os.rmdir(path)
        if device:
            _wait_until_idle(device, path, filesystem)
        directory = _scsi_device(target, lun)
        if directory:
            with open(f"{directory}/delete", "w") as file:
                file.write("1")
    except OSError as error:
        raise StorageFailed(f"the disk {target}:{lun} could not be removed: {error.strerror}") from error


def _unmount(path: str) -> None:
    try:
        linux.umount(path)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise DiskInUse(f"{path} is in use") from error
        if error.errno != errno.EINVAL:  # not a mount point
            raise


def _wait_until_idle(device: str, path: str, filesystem: str) -> None:
    """An exclusive open is refused while any mount, in any namespace, has the disk (open(2), O_EXCL)."""
    deadline = monotonic() + IDLE_TIMEOUT
    while True:
        try:
            os.close(_open(device, os.O_RDONLY | os.O_EXCL))
            return
        except OSError as error:
            if error.errno != errno.EBUSY or not path:
                raise
            if monotonic() > deadline:
                _mount_layer(device, path, filesystem)
                raise DiskInUse(f"a namespace still has {device} mounted") from error
        sleep(PAUSE)
