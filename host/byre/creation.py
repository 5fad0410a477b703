"""From an image's reference to a container in a VM, or back to where it began.

    image -> layers (converted, cached) -> attached and mounted, all at once -> spec -> container.create
    scratch, volumes -> made, locked, attached and mounted -----------------------^
    rootfs, mounts -> shared directories, mounted --------------------------------^

Rule: every step that fails or is cancelled takes back what the steps before it did, and only that (B22).
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from .container import GuestContainer, InitStreams
from .container_mounts import attach, shared, unshare
from .errors import ByreError, ContainerNotFound, InvalidRequest
from .machines.spawn import stoppable
from .parameters import Resources, check_size

if TYPE_CHECKING:
    from pathlib import Path

    from .bridge import Bridge
    from .container_disks import ContainerDisks
    from .disks import Layers
    from .mounts import Mount
    from .networks.registry import Networks
    from .oci.files import Lease
    from .oci.image import ImageConfig
    from .oci.pull import PullProgress
    from .oci.registry import Registry
    from .oci.store import LayerProgress
    from .shares.registry import Shares

#: As podman and containerd have it; the id becomes the name of a directory and of a cgroup in the guest.
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")

#: Deadline of `container.create` in seconds: overlay, cgroup and the user's lookup, on a loaded guest.
CREATE_TIMEOUT = 120.0

#: What a container or a pod may have for a network.
NETS = ("none", "user")

#: What a container's writable layer may lie on.
SCRATCHES = ("tmpfs", "disk")


@dataclass(frozen=True, kw_only=True)
class ContainerOptions:
    """What a container is made like.  What is left out is the image's, or podman's default.

    args            in place of the image's Cmd
    entrypoint      in place of its Entrypoint and Cmd
    env             added to its environment
    cwd, user       working directory; ``uid``, ``uid:gid``, ``name`` or ``name:group`` of the image's own files
    hostname        None: the container's id; in a pod the pod's
    pod             the pod in which it is, "": none (`UtilityVM.create_pod`)
    net             "none", its loopback alone, or "user": a way out (`UtilityVM.open_network`); in a pod the pod's
    terminal, width, height   of its init process
    stdin           whether its init process has one, when it is asked for (B20)
    resources       limits (B28)
    privileged      all capabilities, all devices, nothing masked: the VM is the boundary (B30a)
    cap_add, cap_drop   beside the default set; "ALL" is all of them
    no_new_privileges   no setuid programs
    seccomp         False: no filter
    read_only       its root file system
    mounts          `HostDirectory`, `Volume`, or OCI mounts; they come last
    tmpfs           paths with ``:options``, as podman's --tmpfs
    scratch         what its writable layer is: "tmpfs", or "disk", a sparse file here that goes with it
    scratch_bytes   the size of that at most; 0: half of the VM's memory, or 10 GiB of disk
    stop_signal     None: the image's, or SIGTERM
    rlimits         name -> (soft, hard)
    sysctl          of its namespaces
    pull            when a name is fetched from its registry: "missing", "always", "never"
    registry        how registries are reached, where containers' own files do not say it
    progress        hears how far pull and conversion are, in a thread of its own
    """

    args: Sequence[str] = ()
    entrypoint: Sequence[str] | None = None
    env: Mapping[str, str] | None = None
    cwd: str = ""
    user: str = ""
    hostname: str | None = None
    pod: str = ""
    net: str = "none"
    terminal: bool = False
    width: int = 80
    height: int = 24
    stdin: bool = True
    resources: Resources | None = None
    privileged: bool = False
    cap_add: Sequence[str] = ()
    cap_drop: Sequence[str] = ()
    no_new_privileges: bool = True
    seccomp: bool = True
    read_only: bool = False
    mounts: Sequence[Mount | Mapping[str, Any]] = ()
    tmpfs: Sequence[str] = ()
    scratch: str = "tmpfs"
    scratch_bytes: int = 0
    stop_signal: int | str | None = None
    rlimits: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    sysctl: Mapping[str, str] = field(default_factory=dict)
    pull: str = "missing"
    registry: Registry | None = None
    progress: Callable[[PullProgress | LayerProgress], None] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.args, str) or isinstance(self.entrypoint, str):
            raise InvalidRequest("args and entrypoint are sequences of strings")
        if self.pod and self.hostname is not None:
            raise InvalidRequest("the host name of a container in a pod is the pod's", hint="leave hostname out")
        check_net(self.net)
        if self.pod and self.net != "none":
            raise InvalidRequest("the network of a container in a pod is the pod's", hint="create_pod has net, too")
        if self.scratch_bytes < 0:
            raise InvalidRequest(f"scratch_bytes must not be below 0; not {self.scratch_bytes}")
        if self.scratch not in SCRATCHES:
            raise InvalidRequest(f"unknown scratch {self.scratch!r}", hint=f"one of {', '.join(SCRATCHES)}")
        check_size(self.width, self.height)


class VM(NamedTuple):
    """What a container is made with."""

    bridge: Bridge
    layers: Layers
    disks: ContainerDisks
    shares: Shares
    networks: Networks


class _Root(NamedTuple):
    """What is below a container's writable layer: an image's layers, or a shared directory."""

    config: ImageConfig
    request: dict[str, Any]
    paths: Sequence[Path] = ()


async def create(vm: VM, container_id: str, image: str, rootfs: str, options: ContainerOptions) -> GuestContainer:
    """See `UtilityVM.create_container`."""
    container_id = container_id or secrets.token_hex(6)
    check_id(container_id, "a container")
    async with contextlib.AsyncExitStack() as undo:
        root = await (_shared_root(vm, rootfs, undo) if rootfs else _image_root(vm, image, options, undo))
        mounts, shares = await shared(vm, options.mounts, undo)
        request = {**_request(container_id, root.config, options, mounts), **root.request, "shares": shares}
        request["network"] = await way_out(vm.bridge, vm.networks, options.net, undo)
        undo.push_async_callback(lambda: vm.bridge.finish(vm.disks.drop(request["lease"])))
        await attach(vm.disks, request, options)
        container = await _create(vm, root.paths, request, options)
        undo.pop_all()
    vm.layers.keep(root.paths)
    return container


def check_id(name: str, what: str) -> None:
    """Whether a container or a pod can be called this.  Raises `InvalidRequest`."""
    if not _ID.fullmatch(name):
        raise InvalidRequest(f"{name!r} cannot name {what}", hint="letters, digits, _ . and -; 64 at most")


def check_net(net: str) -> None:
    """Whether there is such a kind of network.  Raises `InvalidRequest`."""
    if net not in NETS:
        raise InvalidRequest(f"unknown net {net!r}", hint=f"one of {', '.join(NETS)}")


async def way_out(bridge: Bridge, networks: Networks, net: str, undo: contextlib.AsyncExitStack) -> str:
    """The agent's name of a new network for what is about to be made, "" where it is to have none."""
    if net == "none":
        return ""
    network = await networks.open(own=False)

    async def close() -> None:
        with contextlib.suppress(ByreError):  # the error that led to it is the one to tell
            await bridge.finish(network.close())

    undo.push_async_callback(close)
    return network.name


async def _image_root(vm: VM, image: str, options: ContainerOptions, undo: contextlib.AsyncExitStack) -> _Root:
    config, paths, lease = await stoppable(
        lambda check: _prepare(image, options, check), undo=lambda prepared: prepared[2].close()
    )
    with lease:  # until the machine has the layers, and holds them itself
        names = await vm.layers.acquire(paths)
    undo.push_async_callback(lambda: vm.bridge.finish(vm.layers.release(paths)))
    return _Root(config, {"layers": names}, paths)


async def _shared_root(vm: VM, rootfs: str, undo: contextlib.AsyncExitStack) -> _Root:
    """Nobody changes it while an overlay has it, so all of it can be cached."""
    from .oci.image import ImageConfig

    share = await vm.shares.share(rootfs, True, "loose")
    undo.push_async_callback(unshare, vm, share)
    return _Root(ImageConfig(architecture="", os="linux"), {"root_share": share.name})


async def _create(
    vm: VM, paths: Sequence[Path], request: dict[str, Any], options: ContainerOptions
) -> GuestContainer:
    bridge, container_id = vm.bridge, request["container"]
    how = InitStreams(stdin=options.stdin, terminal=options.terminal, width=options.width, height=options.height)
    made: list[GuestContainer] = []

    def accept(_: dict[str, Any]) -> None:  # at once, so that an exit which follows is heard
        made.append(GuestContainer(bridge, container_id, how, release))

    async def release() -> None:
        await vm.layers.release(paths)
        await vm.disks.drop(request["lease"])

    async def undo(_: dict[str, Any]) -> None:
        await made[0].close()
        try:
            await bridge.call("container.delete", container=container_id)
        except ContainerNotFound:
            return

    await bridge.call("container.create", timeout=CREATE_TIMEOUT, accept=accept, undo=undo, **request)
    return made[0]


def _prepare(
    image: str, options: ContainerOptions, check: Callable[[], None]
) -> tuple[ImageConfig, list[Path], Lease]:
    """The image's configuration and its layers as disk images.  Blocks; ends when `check` raises."""
    from .oci.pull import obtained
    from .oci.store import LayerStore

    def progress(step: PullProgress | LayerProgress) -> None:
        check()
        if options.progress is not None:
            options.progress(step)

    with obtained(image, options.pull, options.registry, progress) as found:
        layers, lease = LayerStore().lease(found, progress)
        return found.config, [layer.path for layer in layers], lease


def _request(
    container_id: str, config: ImageConfig, options: ContainerOptions, mounts: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The arguments of `container.create`, but for its disks and what is below its root; `mounts` are OCI's."""
    from .oci import spec
    from .parameters import signal_number

    capabilities = _capabilities(options)
    resources = options.resources or Resources()
    seccomp = None
    if options.seccomp and not options.privileged:
        from .oci.seccomp import evaluate, load_profile

        seccomp = evaluate(load_profile(), capabilities=capabilities)
    stop = spec.stop_signal(config) if options.stop_signal is None else signal_number(options.stop_signal)
    return {
        "container": container_id,
        "spec": spec.build_spec(
            config=config,
            args=list(options.args) or None,
            entrypoint=options.entrypoint,
            env=options.env,
            cwd=options.cwd,
            terminal=options.terminal,
            hostname=_hostname(container_id, options),
            memory_bytes=resources.memory_bytes,
            cpus=resources.cpus,
            pids_limit=spec.DEFAULT_PIDS if resources.pids is None else resources.pids,
            capabilities=capabilities,
            privileged=options.privileged,
            no_new_privileges=options.no_new_privileges,
            read_only=options.read_only,
            mounts=[*(_tmpfs(text) for text in options.tmpfs), *mounts],
            rlimits=options.rlimits,
            sysctl=options.sysctl,
            seccomp=seccomp,
        ),
        "user": spec.effective_user(config, options.user),
        "scratch_bytes": options.scratch_bytes,
        "lease": secrets.token_hex(8),
        "stop_signal": stop,
        "pod": options.pod,
    }


def _hostname(container_id: str, options: ContainerOptions) -> str:
    """ "" in a pod: the agent knows its name."""
    if options.hostname is None:
        return "" if options.pod else container_id
    return options.hostname


def _capabilities(options: ContainerOptions) -> set[str]:
    """podman's rules: drop ALL, then add; or the default set (all where privileged), less and more."""
    from .oci import spec

    def full(names: Sequence[str]) -> set[str]:
        upper = {name.upper() for name in names}
        if "ALL" in upper:
            return set(spec.ALL_CAPABILITIES)
        return {name if name.startswith("CAP_") else f"CAP_{name}" for name in upper}

    default = spec.ALL_CAPABILITIES if options.privileged else spec.DEFAULT_CAPABILITIES
    added, dropped = full(options.cap_add), full(options.cap_drop)
    if "ALL" in {name.upper() for name in options.cap_drop}:
        return added
    return (set(default) | added) - dropped


def _tmpfs(text: str) -> dict[str, Any]:
    """``PATH[:OPTION,…]``, as podman's --tmpfs."""
    path, _, options = text.partition(":")
    if not path.startswith("/"):
        raise InvalidRequest(f"a tmpfs needs an absolute path, not {path!r}")
    return {
        "destination": path,
        "type": "tmpfs",
        "source": "tmpfs",
        "options": ["nosuid", "nodev", *filter(None, options.split(","))],
    }
