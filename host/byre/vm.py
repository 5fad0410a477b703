"""`UtilityVM`: a virtual machine as a `ProcessHost`, and the maker of its containers.

    async with UtilityVM() as vm:                       # ours: booted here, ends with the block
        await vm.run(["uname", "-a"])
    async with await UtilityVM.attach("default") as vm: # a keeper's: goes on after the block

Rule: what needs the machine goes through the owner, the rest over the bridge; this only puts the two together.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from . import clone, creation, pod
from .clone import Origin
from .container import GuestContainer, InitStreams
from .creation import ContainerOptions
from .disks import Layers
from .errors import (
    ByreError,
    ConnectionLost,
    ContainerNotFound,
    DeadlineExceeded,
    InvalidRequest,
    MachineFailed,
    NotSupported,
    host_failed,
)
from .health import PAUSED, Health
from .machines.spawn import in_thread
from .mounts import host_path
from .owner import MachineOwner
from .process import GuestProcessHost
from .stats import ContainerStats
from .timings import span

if TYPE_CHECKING:
    from byre_images import Image

    from .bridge import Bridge
    from .container_disks import ContainerDisks, Scratch
    from .journal import EventReader, Events
    from .machines.balloon import Reclaimed
    from .machines.base import Machine
    from .machines.config import MachineConfig
    from .networks.network import Network
    from .networks.registry import Networks
    from .owner import DiskPlace, Owner
    from .parameters import Resources
    from .pod import Pod
    from .ports.address import Address, AddressLike
    from .ports.registry import Ports, PublishedPort
    from .shares.registry import Shares
    from .shares.share import Share
    from .snapshots import Snapshot

#: Deadline of the agent's own stack dump, in seconds, before its silence is the answer.
STACKS_TIMEOUT = 5.0


class UtilityVM(GuestProcessHost):
    """See the module.

    memory_mib, cpus   of the virtual machine
    accelerator, machine, transport   "auto", or what is required (see `machines.config`)
    boot_timeout       seconds until `BootTimeout`; None: a constant times the measured speed of this host
    kernel_arguments   appended to the kernel's command line
    image              the guest image; None: the cached one, built when there is none
    template           "auto": a clone of a machine that was booted and saved before, which is done now where it
                       was not; "off": a boot of its own.  ``(await info())["machine"]["template"]`` says which
    name, detached     with `detached` the VM belongs to a keeper under this name, and survives this program
    """

    def __init__(
        self,
        *,
        name: str = "",
        memory_mib: int = 512,
        cpus: int = 1,
        accelerator: str = "auto",
        machine: str = "auto",
        transport: str = "auto",
        boot_timeout: float | None = None,
        kernel_arguments: Sequence[str] = (),
        image: Image | None = None,
        template: str = "auto",
        detached: bool = False,
    ) -> None:
        self.name = name
        self._options: dict[str, Any] = {
            "memory_mib": memory_mib,
            "cpus": cpus,
            "accelerator": accelerator,
            "machine": machine,
            "transport": transport,
            "kernel_arguments": tuple(kernel_arguments),
        }
        self._boot_timeout = boot_timeout
        self._image = image
        self._template = template
        self._detached = detached
        self._snapshot: Snapshot | None = None  # where it goes on from
        self._origin: Origin
        self._saving = asyncio.Lock()
        self._started = False
        self._guest: dict[str, Any] = {}
        self._owner: Owner
        self._bridge: Bridge
        self._layers: Layers
        self.container_disks: ContainerDisks
        self._ports: Ports
        self._shares: Shares
        self._networks: Networks
        self._ending: asyncio.Task[None] | None = None
        self.health: Health
        self.journal: Events  # what `events` reads

    # -- life ----------------------------------------------------------------------------------------------

    async def start(self, progress: Callable[[str], None] | None = None) -> None:
        """Boot or clone it, and wait until the agent answers.

        Raises `BootFailed`, `BootTimeout` (B40), `AcceleratorUnavailable`, `ToolMissing`, `HostFailed`, ...; after
        an error or a cancellation nothing is left (B41).  `progress` hears of the image's build, when there has to
        be one.
        """
        if self._started:
            raise MachineFailed("a VM starts once", hint="make another one")
        self._started = True
        with host_failed("the VM cannot be started"):
            await self._start(progress)

    async def _start(self, progress: Callable[[str], None] | None) -> None:
        if self._detached:
            await self._launch()
            return
        hostname = self.name or "byre"
        begun_with: tuple[Scratch, ...] = ()
        if self._snapshot is not None:
            self._origin, begun_with = self._snapshot.origin, self._snapshot.scratches
            machine, bridge, self._guest = await self._snapshot.boot(hostname, self._boot_timeout)
        else:
            self._origin = Origin(self._make_machine, await self._config(progress))
            machine, bridge, self._guest = await clone.start(
                self._origin, template=self._template, hostname=hostname, timeout=self._boot_timeout
            )
        self._adopt(MachineOwner(machine, begun_with), bridge)

    async def _launch(self) -> None:
        """Have a keeper boot it, and attach."""
        from . import detached

        self.name = self.name or "default"
        more = {"boot_timeout": self._boot_timeout, "template": self._template}
        await detached.start(self.name, {**self._options, **more})
        self._adopt(*await detached.attach(self.name))

    @classmethod
    def from_snapshot(cls, snapshot: Snapshot, name: str = "") -> UtilityVM:
        """`Snapshot.clone`."""
        vm = cls(name=name)
        vm._snapshot = snapshot
        return vm

    @classmethod
    async def attach(cls, name: str = "default") -> UtilityVM:
        """A VM that is up under a name.  Raises `VMNotFound`."""
        from . import detached

        vm = cls(name=name, detached=True)
        vm._started = True
        vm._adopt(*await detached.attach(name))
        return vm

    async def _config(self, progress: Callable[[str], None] | None) -> MachineConfig:
        import byre_images

        from .machines.config import MachineConfig

        image = self._image
        if image is None:
            with span("image"):
                image = await in_thread(lambda: byre_images.ensure(progress))
        options = dict(self._options)
        options["kernel_arguments"] = (*byre_images.KERNEL_ARGUMENTS, *options["kernel_arguments"])
        return MachineConfig(kernel=image.kernel, initramfs=image.initramfs, root=image.root, **options)

    def _make_machine(self, config: MachineConfig) -> Machine:
        from .machines.qemu import QemuMachine

        return QemuMachine(config)

    def _adopt(self, owner: Owner, bridge: Bridge) -> None:
        """Take over a VM that runs: ours, or a keeper's."""
        self._owner, self._bridge = owner, bridge
        self._layers = Layers(owner, bridge)
        self.container_disks = owner.container_disks(bridge, self.name or owner.id)
        self._ports = owner.ports(bridge)
        self._shares = owner.shares(bridge)
        self._networks = owner.networks(bridge)
        self.journal = owner.events(bridge)
        self.health = Health(owner, bridge)
        self.health.start()

    async def __aenter__(self) -> Self:
        if not self._started:
            await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ours is shut down; a keeper's goes on (B43)."""
        await self.close()

    async def shutdown(self, timeout: float = 10.0) -> None:
        """End the VM, and all in it; by force after `timeout` seconds.  Harmless when repeated (B51)."""
        await self._end("the VM was shut down", lambda owner: owner.shutdown(timeout), orderly=True)

    async def terminate(self, reason: str = "the VM was terminated") -> None:
        """End the VM now; whatever still waits hears the reason.  Harmless when repeated (B51)."""
        await self._end(reason, lambda owner: owner.kill())

    async def close(self) -> None:
        """This program is done with it: ours ends, a keeper's goes on.  Harmless when repeated."""
        await self._end("the VM was closed", lambda owner: owner.release(), orderly=True)

    async def _end(self, reason: str, how: Callable[[Owner], Any], *, orderly: bool = False) -> None:
        """The first of several ends is the one; the others wait for it."""
        if not hasattr(self, "_owner"):
            return
        if self._ending is None:
            self._ending = asyncio.get_running_loop().create_task(self._end_once(reason, how, orderly))
        await asyncio.shield(self._ending)

    async def _end_once(self, reason: str, how: Callable[[Owner], Any], orderly: bool) -> None:
        if orderly:
            await self.container_disks.sync()
        # A keeper is asked over the bridge, so its owner ends the VM first.
        with contextlib.suppress(ConnectionLost):
            await how(self._owner)
        await self._bridge.close(reason)
        await self.health.stop()

    async def wait(self) -> str:
        """Wait for the VM's end: why it ended."""
        return await self._owner.wait()

    # -- as a host of processes ----------------------------------------------------------------------------

    @property
    def bridge(self) -> Bridge:
        if not hasattr(self, "_bridge"):
            raise ConnectionLost("the VM is not running", hint="use: async with UtilityVM() as vm")
        return self._bridge

    @property
    def id(self) -> str:
        """Unique on this host; in the names of its loggers."""
        return self._owner.id

    @property
    def machine_pid(self) -> int:
        """Process id of the emulator; 0 where there is none."""
        return self._owner.machine_pid

    # -- containers ----------------------------------------------------------------------------------------

    async def create_container(
        self, id: str = "", *, image: str = "", rootfs: str | os.PathLike[str] = "", **options: Any
    ) -> GuestContainer:
        """Make a container of an image; `start` runs it (B20).  `options`: see `creation.ContainerOptions`.

        `image` is a path or a name (`oci.reference` says which): ``oci:PATH[:TAG]``, ``./archive.tar``, ``debian``,
        ``docker://registry:5000/app@sha256:…``.  A name is pulled where it is missing.  In its place `rootfs` is a
        directory of this host with a whole root file system: nobody may change it meanwhile, and the container does
        not; what it writes is gone with it.

        Raises `ImageNotFound`, `ImageInvalid`, `RegistryFailed`, `ContainerExists`, `UserNotFound`, ...; after an
        error or a cancellation the id can be used again, and nothing is attached or mounted (B22).
        """
        if bool(image) == bool(rootfs):
            raise InvalidRequest("exactly one of image and rootfs is needed")
        vm = creation.VM(self.bridge, self._layers, self.container_disks, self._shares, self._networks)
        root = host_path(rootfs) if rootfs else ""
        container = await creation.create(vm, id, image, root, ContainerOptions(**options))
        container.changes.lend(self._layers, self._ports)
        return container

    async def containers(self) -> list[dict[str, Any]]:
        """What the agent knows of each container of this VM."""
        found: list[dict[str, Any]] = (await self.bridge.call("container.list"))["containers"]
        return found

    async def stats(self) -> list[ContainerStats]:
        """What each of its containers uses, and their limits."""
        names = [found["id"] for found in await self.containers() if found["state"] != "creating"]

        async def look(name: str) -> list[ContainerStats]:
            with contextlib.suppress(ContainerNotFound):  # deleted meanwhile
                answer = await self.bridge.call("container.stats", container=name)
                return [ContainerStats.of(name, answer["stats"])]
            return []

        return [found for looked in await asyncio.gather(*map(look, names)) for found in looked]

    async def open_container(self, id: str) -> GuestContainer:
        """A container that exists, whoever made it.  Raises `ContainerNotFound` (B22)."""
        answer = await self.bridge.call("container.state", container=id)
        terminal = bool(answer["state"].get("terminal", False))
        container = GuestContainer(self.bridge, id, InitStreams(terminal=terminal))
        container.changes.lend(self._layers, self._ports)
        container.watch()
        return container

    # -- pods ----------------------------------------------------------------------------------------------

    async def create_pod(
        self,
        name: str = "",
        *,
        hostname: str = "",
        resources: Resources | None = None,
        share_pid: bool = False,
        net: str = "none",
    ) -> Pod:
        """A pod for containers of this VM: they share network, IPC and host name (`name` without `hostname`), and,
        with `share_pid`, the processes that they see and signal.

        `resources` are the limits of all together; each container's own hold beneath them.  `net` is "none", or
        "user": a way out (see `open_network`).  Raises `PodExists`.
        """
        creation.check_net(net)
        async with contextlib.AsyncExitStack() as undo:
            network = await creation.way_out(self.bridge, self._networks, net, undo)
            made = await pod.create(self, name, hostname, resources, share_pid, network)
            undo.pop_all()
        return made

    async def pods(self) -> list[dict[str, Any]]:
        """What the agent knows of each pod of this VM."""
        found: list[dict[str, Any]] = (await self.bridge.call("pod.list"))["pods"]
        return found

    async def open_pod(self, name: str) -> Pod:
        """A pod that exists, whoever made it.  Raises `PodNotFound`."""
        found = pod.Pod(self, name)
        await found.info()
        return found

    # -- ports that are the VM's ---------------------------------------------------------------------------

    async def publish(self, host: AddressLike, guest: AddressLike, *, container: str = "") -> Address:
        """As `forward` of the VM, or of that container; but it is the VM's: it goes on until `unpublish`, or until
        the container or the VM has ended.  For a detached VM its keeper holds it.  Returns where it listens."""
        return await self._held_ports.publish(container, host, guest)

    async def unpublish(self, host: AddressLike) -> None:
        """End what `publish` began.  Raises `InvalidRequest` when nothing is published there."""
        await self._held_ports.unpublish(host)

    async def published(self) -> list[PublishedPort]:
        """What is published, with the connections that there are now."""
        return await self._held_ports.published()

    @property
    def _held_ports(self) -> Ports:
        if self.bridge.lost is not None:  # before the start `bridge` itself raises
            raise self.bridge.lost
        return self._ports

    # -- directories of this host --------------------------------------------------------------------------

    async def share(
        self, directory: str | os.PathLike[str], *, read_only: bool = False, cache: str = "mmap"
    ) -> Share:
        """Give the VM a directory of this host, while both go on: at the `path` of what is returned.

        Nothing in the VM can leave it, and with `read_only` this host refuses every change.  A container gets one
        by `mounts` of `create_container`.  `cache`: "mmap", what the host changes is seen; "loose" is faster, for a
        directory that nobody changes meanwhile.  For a detached VM its keeper serves it.

        Raises `PathNotFound`, `PathNotDirectory`, `PermissionRefused`, `ToolMissing` (diod), `ShareFailed` (the
        next step in its hint), `ResourceExhausted`.
        """
        if self.bridge.lost is not None:
            raise self.bridge.lost
        return await self._shares.share(host_path(directory), read_only, cache)

    async def open_network(self, *, own: bool = True) -> Network:
        """Give the processes of the VM itself a way out, while they run: a card, `eth0`, with this host behind it.

        They reach what this host reaches, by TCP, UDP and ping over IPv4, and the name server that it has; but no
        address of this host itself (`expose` gives a service of it), and nobody reaches them (`forward` does).
        Containers and pods have networks of their own, which `net="user"` at their making gives a way out.  It goes
        on until it is closed; for a detached VM its keeper holds it.  `own=False` is for one that a container is to
        be made with.

        Raises `ToolMissing` (slirp4netns), `NetworkFailed`, `InvalidRequest` when the VM has one already.
        """
        return await self._networks.open(own=own)

    # -- the machine ---------------------------------------------------------------------------------------

    async def attach_disk(self, path: str | os.PathLike[str]) -> DiskPlace:
        """Hot-add a raw image or block device, read-only; the same one again is counted (B60).

        Raises `ResourceExhausted` past the last place (B62).
        """
        await self._bridge.call("container.list")  # with the first of such calls the agent loads the disks' drivers
        return await self._owner.attach_disk(_absolute(path))

    async def detach_disk(self, disk: DiskPlace) -> None:
        """Undo one `attach_disk`; the last one removes it (B60).  Raises `DiskInUse` (B61)."""
        await self._owner.detach_disk(disk)

    async def reclaim(self, memory_mib: int) -> Reclaimed:
        """Have the guest give memory back to this host, until `memory_mib` are left to it, or let it have that much
        again; what came of it, in bytes.  Raises `NotSupported` for a clone, `InvalidRequest` beyond its size.
        """
        await self.bridge.call("system.balloon")
        return await self._owner.reclaim(memory_mib)

    async def pause(self) -> None:
        """Stop its CPUs.  Calls wait meanwhile, and their deadlines go on."""
        await self.health.rest()
        await self._owner.pause()

    async def resume(self) -> None:
        """Let its CPUs run, and set its clock (B52)."""
        await self._owner.resume()
        await self.bridge.call("system.configure", realtime_ns=time.time_ns())
        await self.health.resume()

    def events(self, *, after: int | None = None) -> EventReader:
        """What happens in it, in order: ``async for event in vm.events()``; records of `byre.events`.

        From now on, or, of what is kept, from the number `after` on (0: all of it).  Any number of readers; a slow
        or late one is told by `Missed` how many it missed.  The last one is `VMEnded`.  For a detached VM these are
        its keeper's; without that, `ConnectionLost`.
        """
        assert self.bridge, "it raises before the start"
        return self.journal.read(after)

    async def snapshot(self) -> Snapshot:
        """Save it as it is now, with all that runs in it, for any number of clones; it goes on (see `snapshots`).

        It stands still meanwhile: some milliseconds, and about one for each MiB that it has written since its
        start, to its memory and to the scratch disks of its containers, which are copied too.
        Raises `NotSupported` for a detached VM, and with the path for a directory of this host that it has, for a
        volume, and for another disk that it can write to; `ResourceExhausted` without room for its memory below the
        user's cache, `StorageFailed` without room for the scratch disks.
        """
        from . import snapshots

        bridge = self.bridge
        if not isinstance(self._owner, MachineOwner):
            raise NotSupported("a detached VM is its keeper's", hint="snapshots are of a program's own VMs")
        if shared := self._shares.directories():
            raise NotSupported(
                f"the VM has directories of this host, which its clones could not have: {', '.join(shared)}",
                hint="close the share, or delete the container that has it",
                directories=shared,
            )
        if self._networks.count:
            raise NotSupported(
                f"the VM has {self._networks.count} networks, whose other end its clones could not have",
                hint="close the network, or delete the container or pod that has it",
            )
        async with self._saving:
            if self.health.state == PAUSED:
                raise InvalidRequest("a VM that is paused cannot be saved", hint="resume() it first")
            await self.health.rest()
            try:
                return await snapshots.take(self._owner.machine, bridge, self._origin, self.container_disks)
            finally:
                await self.health.resume()

    async def console(self, lines: int = 40) -> str:
        """The last lines that the guest wrote to its console, escaped; also while all else hangs (B49)."""
        return await self._owner.console(lines)

    def console_tail(self, lines: int = 40) -> str:
        """`console` without waiting.  Raises `NotSupported` for a keeper's VM."""
        return self._owner.console_tail(lines)

    async def stacks(self) -> str:
        """Where every task of the agent is; when it does not answer, what the console shows (B49)."""
        try:
            text: str = (await self.bridge.call("system.stacks", timeout=STACKS_TIMEOUT))["text"]
            return text
        except DeadlineExceeded as error:
            return f"{error.message}; the console's last lines:\n{await self.console()}"

    async def info(self) -> dict[str, Any]:
        """Of the machine (``machine``) and of the guest (``guest``): what they are, and why."""
        guest = self._guest
        with contextlib.suppress(ByreError):
            guest = (await self.bridge.call("system.info", timeout=STACKS_TIMEOUT))["info"]
        return {"name": self.name, "machine": await self._owner.info(), "guest": guest}

    def __repr__(self) -> str:
        owner = getattr(self, "_owner", None)
        return f"<UtilityVM {self.name or (owner.id if owner else 'not started')}>"


def _absolute(path: str | os.PathLike[str]) -> Path:
    """A path that means the same to a keeper."""
    return Path(path).absolute()
