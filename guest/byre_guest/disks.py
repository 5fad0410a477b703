"""Disks of the VM, layers above all: found by their SCSI address, mounted at short paths, counted, let go.

    /l/N    one layer (100 of them must fit the 4 KiB of mount(2)'s options); or, of a file system that can be
            written, a container's scratch or a volume

    absent -> waiting (for the disk to appear) -> mounting -> mounted -> removing -> absent

Rule: mounts and removals run in helper children with deadlines; the loop only learns of disks by the kernel's
uevents (netlink(7), NETLINK_KOBJECT_UEVENT) and looks into sysfs.  The guest lets go of a disk first: after
`disk.unmount` its SCSI device is deleted, and the host may take it away (B60).  A disk that an overlay uses stays
(B61).  Overlays hold layers even after /l/N is gone, so it is their users that count, not EBUSY.
"""

from __future__ import annotations

import _socket  # not `socket`, which imports enum and selectors
import errno

from byre_proto.errors import (
    ByreError,
    DeadlineExceeded,
    DiskInUse,
    InvalidRequest,
    StartFailed,
    StorageFailed,
)

from . import children, storage
from .loop import EPOLLIN

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .loop import Loop, Timer
    from .reaper import Reaper
    from .server import Call

#: File systems that a layer may have: read-only ones, parsed by this kernel from an image that the host made; and
#: that of disks which containers write.
FILESYSTEMS = ("squashfs", "erofs", storage.WRITABLE)

#: Kernel modules for the disks; a layer's file system is loaded with the first layer.
DRIVERS = ("virtio_scsi", "sd_mod")

#: For a disk to appear and to be mounted, in seconds: 30 to 60 ms when all is well, more under emulation.
MOUNT_TIMEOUT = 30.0

#: For a disk to be let go of: the last user's namespaces may be on their way out.
REMOVE_TIMEOUT = 30.0

#: For what was written to be on the disks: a host's slow disk takes its time.
SYNC_TIMEOUT = 60.0

#: The next step after a mount that failed.
HINT = "is the image complete, and of this file system?"

#: linux/netlink.h; group 1 is the kernel's own messages.
NETLINK_KOBJECT_UEVENT = 15
UEVENT_GROUP = 1
UEVENT_SIZE = 16 * 1024


class Layer:
    """A disk that is a layer, or is to become one."""

    def __init__(self, address: tuple[int, int], name: str, filesystem: str) -> None:
        self.address = address
        self.name = name
        self.filesystem = filesystem
        self.state = "waiting"
        self.count = 0  # mounts that were not yet undone
        self.users: set[str] = set()  # containers whose overlay has it
        self.calls: list[Call] = []  # that wait for the mount
        self.timer: Timer | None = None

    @property
    def path(self) -> str:
        """Where it is mounted."""
        return f"{storage.LAYERS}/{self.name}"


class Disks:
    """See the module's text."""

    def __init__(self, loop: Loop, reaper: Reaper) -> None:
        self._loop = loop
        self._reaper = reaper
        self._layers: dict[tuple[int, int], Layer] = {}
        self._by_name: dict[str, Layer] = {}
        self._last_name = 0
        self._broken: ByreError | None = None  # why there can be no disks
        self._uevents = _listen()
        loop.add(self._uevents.fileno(), EPOLLIN, lambda _mask: self._on_uevents())
        self._load()

    # -- layers of containers ------------------------------------------------------------------------------

    def use(self, names: list[str], container: str) -> list[str]:
        """Hold disks for a container; their paths, in the same order.  Raises `InvalidRequest`."""
        layers = [self._by_name.get(name) for name in names]
        for name, layer in zip(names, layers):
            if layer is None or layer.state != "mounted":
                raise InvalidRequest(f"there is no layer {name!r}", hint="mount its disk first", layer=name)
        held = [layer for layer in layers if layer is not None]
        for layer in held:
            layer.users.add(container)
        return [layer.path for layer in held]

    def release(self, container: str) -> None:
        """The container's overlay is gone."""
        for layer in self._by_name.values():
            layer.users.discard(container)

    # -- disk.mount ----------------------------------------------------------------------------------------

    def mount(self, call: Call, arguments: dict[str, Any]) -> None:
        """`disk.mount`: the same disk again is the same layer, counted (B60)."""
        address = (arguments["target"], arguments["lun"])
        if arguments["filesystem"] not in FILESYSTEMS:
            raise InvalidRequest(
                f"{arguments['filesystem']!r} is not a layer's file system",
                hint=f"use {' or '.join(FILESYSTEMS)}",
                field="filesystem",
            )
        layer = self._layers.get(address)
        if layer is None:
            layer = self._new(address, arguments["filesystem"])
        if layer.state == "mounted":
            layer.count += 1
            call.reply({"layer": layer.name})
            return
        if layer.state == "removing":
            raise DiskInUse(f"the disk {_label(address)} is being removed", hint="wait for disk.unmount")
        layer.calls.append(call)
        call.on_cancel = lambda error: self._give_up(layer, call, error)

    def _new(self, address: tuple[int, int], filesystem: str) -> Layer:
        if self._broken is not None:
            raise self._broken
        self._last_name += 1
        layer = Layer(address, str(self._last_name), filesystem)
        self._layers[address] = layer
        layer.timer = self._loop.call_later(MOUNT_TIMEOUT, lambda: self._never_came(layer))
        self._loop.call_soon(self._look)
        return layer

    def _give_up(self, layer: Layer, call: Call, error: ByreError) -> None:
        """A mount that runs is let run; one that nobody waits for then is undone."""
        layer.calls.remove(call)
        call.fail(error)
        if not layer.calls and layer.state == "waiting":
            self._forget(layer)

    def _load(self) -> None:
        children.run(self._loop, self._reaper, lambda: storage.need(*DRIVERS), MOUNT_TIMEOUT, self._loaded)

    def _loaded(self, _result: object, error: ByreError | None) -> None:
        """The drivers are there, and with them the disks that were there before; or no disk will ever come."""
        if error is None:
            self._look()
            return
        if isinstance(error, StartFailed):  # that passes
            self._loop.call_later(children.AGAIN_SECONDS, self._load)
            return
        self._broken = error
        for layer in list(self._layers.values()):
            if layer.state == "waiting":
                self._fail(layer, error)

    def _on_uevents(self) -> None:
        changed = False
        while True:
            try:
                message = self._uevents.recv(UEVENT_SIZE)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                changed = True  # some were lost: look for oneself
                continue
            changed = changed or b"\0SUBSYSTEM=block\0" in message
        if changed:
            self._look()

    def _look(self) -> None:
        """Mount all layers whose disk is there by now."""
        ready = []
        for layer in self._layers.values():
            device = storage.find_disk(*layer.address) if layer.state == "waiting" else ""
            if device:
                ready.append((layer, device))
        if ready:
            self._mount(ready)

    def _mount(self, ready: list[tuple[Layer, str]]) -> None:
        for layer, _ in ready:
            layer.state = "mounting"
            if layer.timer is not None:
                layer.timer.cancel()
        wanted = [(device, layer.path, layer.filesystem) for layer, device in ready]

        def mounted(failures: list[str] | None, error: ByreError | None) -> None:
            for (layer, _), failure in zip(ready, failures or [""] * len(ready)):
                self._mounted(layer, StorageFailed(failure, hint=HINT) if failure else error)

        children.run(self._loop, self._reaper, lambda: storage.mount_layers(wanted), MOUNT_TIMEOUT, mounted)

    def _mounted(self, layer: Layer, error: ByreError | None) -> None:
        calls, layer.calls = layer.calls, []
        if error is not None or not calls:  # undone, the guest's side first (B60)
            self._remove(layer, lambda _error: _fail_all(calls, error))
            return
        layer.state = "mounted"
        layer.count = len(calls)
        self._by_name[layer.name] = layer
        for call in calls:
            call.reply({"layer": layer.name})

    def _never_came(self, layer: Layer) -> None:
        if layer.state != "waiting":
            return
        error = DeadlineExceeded(
            f"the disk {_label(layer.address)} did not appear within {MOUNT_TIMEOUT:g} s",
            hint="was it attached to the VM's SCSI controller?",
        )
        self._fail(layer, error)

    def _fail(self, layer: Layer, error: ByreError) -> None:
        self._forget(layer)
        for call in layer.calls:
            call.fail(error)

    def _forget(self, layer: Layer) -> None:
        if layer.timer is not None:
            layer.timer.cancel()
        self._layers.pop(layer.address, None)
        self._by_name.pop(layer.name, None)

    def sync(self, call: Call, _arguments: dict[str, Any]) -> None:
        """`disk.sync`: answers when all is written; it may block for as long as the host's disk does."""
        written = [layer.path for layer in self._by_name.values() if layer.filesystem == storage.WRITABLE]

        def synced(_result: object, error: ByreError | None) -> None:
            if error is not None:
                call.fail(error)
            else:
                call.reply({})

        children.run(self._loop, self._reaper, lambda: storage.sync(written), SYNC_TIMEOUT, synced)

    # -- disk.unmount --------------------------------------------------------------------------------------

    def unmount(self, call: Call, arguments: dict[str, Any]) -> None:
        """`disk.unmount`: the last of its mounts lets the disk go.  Raises `DiskInUse` (B61)."""
        address = (arguments["target"], arguments["lun"])
        layer = self._layers.get(address) or Layer(address, "", "")  # not a layer: only its device is deleted
        if layer.state in ("mounting", "removing") or layer.calls:
            raise DiskInUse(f"the disk {_label(address)} is being mounted or removed")
        if layer.count > 1:
            layer.count -= 1
            call.reply({})
            return
        if layer.users:
            users = sorted(layer.users)
            raise DiskInUse(
                f"the disk {_label(address)} is a layer of {', '.join(users[:8])}",
                hint="delete the containers first",
                containers=users,
            )

        def removed(error: ByreError | None) -> None:
            if error is None:
                call.reply({})
            else:
                call.fail(error)

        self._remove(layer, removed)

    def _remove(self, layer: Layer, done: Callable[[ByreError | None], object]) -> None:
        before, layer.state = layer.state, "removing"

        def finished(_result: object, error: ByreError | None) -> None:
            if isinstance(error, StartFailed) and before == "mounted":
                layer.state = before  # nothing was done
            elif isinstance(error, DiskInUse) and layer.name:
                layer.state = "mounted"
            else:
                self._forget(layer)
            done(error)

        self._layers[layer.address] = layer
        children.run(
            self._loop,
            self._reaper,
            lambda: storage.remove_layer(layer.path if layer.name else "", layer.filesystem, *layer.address),
            REMOVE_TIMEOUT,
            finished,
        )


def _fail_all(calls: list[Call], error: ByreError | None) -> None:
    if error is not None:
        for call in calls:
            call.fail(error)


def _listen() -> _socket.socket:
    """A socket that gets the kernel's uevents."""
    kind = _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC | _socket.SOCK_NONBLOCK
    uevents = _socket.socket(_socket.AF_NETLINK, kind, NETLINK_KOBJECT_UEVENT)
    uevents.bind((0, UEVENT_GROUP))
    return uevents


def _label(address: tuple[int, int]) -> str:
    return f"{address[0]}:{address[1]}"
