"""Disks on a running QEMU's virtio-scsi bus, which every machine type has, microvm included.

Rule: a disk is a block node and a device, added in that order and removed in the other; removal finds whatever
half of it there is.  Paths reach QEMU as JSON strings, so nothing in them is syntax; an open file as a descriptor,
in a set that has the target's number.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Protocol

from byre.errors import DeadlineExceeded, MachineFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from byre.machines.disks import Disk

logger = logging.getLogger(__name__)

#: The controller's id on the command line.
CONTROLLER = "scsi0"
#: A disk leaves the bus without the guest's help: in milliseconds, on a loaded host in a second.
UNPLUG_TIMEOUT = 20.0


class Execute(Protocol):
    """`Qmp.execute`, ended by the machine's end as well."""

    async def __call__(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any: ...


def node(disk: Disk) -> dict[str, object]:
    """The block node of a disk, as QMP and the command line take it.  An open file is in a set of descriptors."""
    return {
        "driver": "host_device" if disk.file is None and disk.path.is_block_device() else "file",
        "node-name": disk.serial,
        "filename": str(disk.path) if disk.file is None else f"/dev/fdset/{disk.target}",
        "read-only": disk.read_only,
        "discard": "unmap",
    }


def device(disk: Disk) -> dict[str, object]:
    """Its device on the bus."""
    return {
        "driver": "scsi-hd",
        "bus": f"{CONTROLLER}.0",
        "id": disk.serial,
        "drive": disk.serial,
        "serial": disk.serial,
        "scsi-id": disk.target,
        "lun": disk.lun,
        "werror": "report",  # the default stops the whole machine when the host's disk is full
        "rerror": "report",
    }


class ScsiBus:
    """The bus of one machine."""

    def __init__(self, execute: Execute, send_fd: Callable[[int], None]) -> None:
        self._execute = execute
        self._send_fd = send_fd
        self._sending = asyncio.Lock()  # QEMU keeps the last descriptor only
        self._deleted: dict[str, asyncio.Event] = {}

    async def plug(self, disk: Disk) -> None:
        """Add the disk.  After a failure `unplug` is due."""
        if disk.file is not None:
            async with self._sending:
                self._send_fd(disk.file)
                await self._execute("add-fd", {"fdset-id": disk.target})
        await self._execute("blockdev-add", node(disk))
        await self._execute("device_add", device(disk))

    async def unplug(self, disk: Disk) -> None:
        """Remove the disk, or what there is of it."""
        try:
            await self._unplug(disk)
        finally:
            if disk.file is not None:
                await self._take_back(disk)

    async def _take_back(self, disk: Disk) -> None:
        """Without a node on it the set is gone with this; where it never came there is nothing to do."""
        try:
            await self._execute("remove-fd", {"fdset-id": disk.target})
        except MachineFailed as error:
            logger.debug("= %s", error)

    async def _unplug(self, disk: Disk) -> None:
        name = disk.serial
        await self._delete_device(name)
        try:
            await self._execute("blockdev-del", {"node-name": name})
        except MachineFailed:
            nodes = await self._execute("query-named-block-nodes", {"flat": True})
            if any(node.get("node-name") == name for node in nodes):
                raise

    def on_deleted(self, name: str) -> None:
        """QEMU's DEVICE_DELETED event."""
        if name in self._deleted:
            self._deleted[name].set()

    async def _delete_device(self, name: str) -> None:
        deleted = self._deleted[name] = asyncio.Event()
        try:
            await self._execute("device_del", {"id": name})
            async with asyncio.timeout(UNPLUG_TIMEOUT):
                await deleted.wait()
        except MachineFailed as error:
            if error.data.get("qmp_class") != "DeviceNotFound":
                raise
        except TimeoutError:
            raise DeadlineExceeded(f"QEMU did not remove the disk {name} within {UNPLUG_TIMEOUT:g} s") from None
        finally:
            del self._deleted[name]
