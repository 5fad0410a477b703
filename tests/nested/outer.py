"""The outer machine: a utility VM under the emulator, and in it a privileged container that is a Debian host.

The container sees the VM's own /dev and /sys, the disk of `userland.make_disk`, and nothing of this host.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import byre

from . import userland

#: What it has: QEMU, pytest and a whole guest live in it.
MEMORY_MIB = 4096
#: With two, which QEMU 7.2 emulates in a thread each, the machines inside end in a triple fault every few minutes
#: (seen four times in half an hour, and not once in twelve minutes with one); nor are two faster.
CPUS = 1
#: The container's writable layer holds the tests' temporary files only.
SCRATCH = 512 << 20

#: Where the container has the disk; the source tree is also at the path that it has here.
DISK = "/srv"
RESULTS = "/run/results"

_SOURCE_ROOTS = ("host", "guest", "bridge_proto", "images")
ENVIRONMENT = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "PYTHONPATH": ":".join(
        [*(f"{userland.ROOT}/{name}" for name in _SOURCE_ROOTS), f"{DISK}/{userland.LIBRARIES}"]
    ),
    "PYTHONDONTWRITEBYTECODE": "1",
    "XDG_CACHE_HOME": f"{DISK}/{userland.CACHE}",
    "BYRE_TEST_VEHICLES": "kvm",
    "BYRE_TEST_SOON": "60",
    "BYRE_TEST_RESULTS": RESULTS,
}

#: The disk, once it is there, with a layer on top: caches are written to.
_MOUNT = """
set -e
modprobe -a virtio_scsi sd_mod squashfs overlay
cd /run && mkdir -p nested/disk nested/new nested/all
until disk=$(ls /sys/bus/scsi/devices/0:0:{target}:{lun}/block 2>/dev/null) && [ -b /dev/$disk ]; do sleep 0.1; done
mount -t squashfs -o ro /dev/$disk nested/disk
mount -t tmpfs tmpfs nested/new
mkdir nested/new/upper nested/new/work
mount -t overlay overlay -o lowerdir=nested/disk,upperdir=nested/new/upper,workdir=nested/new/work nested/all
mount -t debugfs debugfs /sys/kernel/debug
"""
_MOUNT_SECONDS = 120


def _bind(source: str, destination: str) -> dict[str, Any]:
    return {"source": source, "destination": destination, "type": "bind", "options": ["rbind", "rw"]}


@asynccontextmanager
async def outer_host(image: Path, disk: Path) -> AsyncIterator[tuple[Any, Any]]:
    """The VM, and the container in it that is the inner byre's host."""
    async with byre.UtilityVM(memory_mib=MEMORY_MIB, cpus=CPUS, accelerator="tcg") as vm:
        place = await vm.attach_disk(disk)
        script = _MOUNT.format(target=place.target, lun=place.lun)
        await vm.run(["sh", "-c", script], check=True, timeout=_MOUNT_SECONDS)
        everything = "/run/nested/all"
        mounts = [
            _bind(everything, DISK),
            _bind(f"{everything}/{userland.TREE}", str(userland.ROOT)),
            _bind(f"{everything}/{userland.BUSYBOX_COPY}", "/usr/bin/busybox"),  # the images' recipe has its bytes
            _bind("/dev", "/dev"),
            _bind("/sys", "/sys"),
        ]
        async with await vm.create_container(
            "nested",
            image=f"oci:{image}",
            args=["sleep", "infinity"],
            privileged=True,
            no_new_privileges=False,
            env=ENVIRONMENT,
            scratch_bytes=SCRATCH,
            mounts=mounts,
            tmpfs=["/run", "/tmp:exec"],
        ) as container:
            await container.start()
            yield vm, container
