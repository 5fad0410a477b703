"""The pods of this machine: what several containers share, and the limits that they have together.

    /run/byre/p/NAME/network, ipc, uts, pid   the namespaces (`namespaces`)
    /run/byre/p/NAME/shm                      /dev/shm of all its containers
    /run/byre/p/NAME/etc                      what they read of names (`names`)
    /sys/fs/cgroup/containers/@NAME           the limits; the containers' own are below

Rule: a pod is there from its making to its deletion, whatever becomes of its containers; deleted, it takes them all
with it, and its name is free when nothing of it is left.  What may block is in helper children.
"""

from __future__ import annotations

import os
from time import time_ns

from byre_proto.errors import (
    ContainerNotReady,
    InvalidRequest,
    PodExists,
    PodNotFound,
    PodNotReady,
    StorageFailed,
)

from . import bundle, cgroups, children, linux, names, namespaces, oci

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from byre_proto.errors import ByreError

    from .container import Container
    from .loop import Loop
    from .networks import Network, Networks
    from .reaper import Reaper
    from .server import Call, Handler

BASE = "/run/byre/p"

#: To make a pod or to remove what is left of it, in seconds; some 50 ms under emulation when all is well.
TIMEOUT = 60.0

#: Each holds up to six mounts.
MAX_PODS = 256

#: Longest host name that the kernel takes.
MAX_HOSTNAME = 64

#: The cgroup of a pod's first process, beside those of its containers: none of their ids begins so.
FIRST = "@first"

#: /dev/shm as podman has it.  The names' file system is small: its containers may write to it.
SHM = "size=64000k,mode=1777"
ETC = "size=256k,nr_inodes=16,mode=0755"

CONTROLLERS = "+cpu +memory +pids +io"


class Pod:
    """See the module's text."""

    def __init__(self, name: str, hostname: str, share_pid: bool) -> None:
        self.name = name
        self.hostname = hostname
        self.network: Network | None = None  # one that leads out, and is pinned elsewhere
        self.kinds = ("network", "ipc", "uts")
        self.share_pid = share_pid
        self.directory = f"{BASE}/{name}"
        self.etc = f"{self.directory}/etc"
        self.cgroup = cgroups.path_of_pod(name)
        self.state = "creating"  # then ready; deleting; failed: something of it could not be removed
        self.containers: set[Container] = set()
        self.on_empty: Callable[[], object] = lambda: None
        self._created_ns = time_ns()

    def describe(self) -> dict[str, Any]:
        """As `pod.list` shows it."""
        return {
            "id": self.name,
            "state": self.state,
            "hostname": self.hostname,
            "share_pid": self.share_pid,
            "created_ns": self._created_ns,
            "containers": sorted(container.id for container in self.containers),
        }

    def spec(self, spec: dict[str, Any]) -> dict[str, Any]:
        """A container's spec, with the pod's in the place of what the container would have of its own."""
        shared = (*self.kinds, "pid") if self.share_pid else self.kinds
        spec = oci.joined(spec, {kind: self._path(kind) for kind in shared})
        process = spec.get("process", {})
        env = process.get("env", [])
        if not any(variable.startswith("HOSTNAME=") for variable in env):
            env = [*env, f"HOSTNAME={self.hostname}"]
        shm = {
            "destination": "/dev/shm",
            "type": "bind",
            "source": f"{self.directory}/shm",
            "options": ["bind", "private", "nosuid", "noexec", "nodev"],
        }
        mounts = [
            shm if mount["destination"] == "/dev/shm" and mount.get("type") == "tmpfs" else mount
            for mount in spec.get("mounts", [])
        ]
        return {
            **{key: value for key, value in spec.items() if key not in ("hostname", "domainname")},
            "process": {**process, "env": env},
            "mounts": mounts,
        }

    def _path(self, kind: str) -> str:
        """Where the namespace is pinned."""
        network = self.network if kind == "network" else None
        return network.path if network is not None else f"{self.directory}/{kind}"

    def forget(self, container: Container) -> None:
        """It is gone."""
        self.containers.discard(container)
        if not self.containers:
            self.on_empty()

    # -- in helper children --------------------------------------------------------------------------------

    def make(self, limits: dict[str, str]) -> int:
        """Cgroup, namespaces, files; the first process of shared ones, or 0.  Raises `StorageFailed`, ..."""
        first = 0
        try:
            os.mkdir(self.cgroup)
            cgroups.write(f"{self.cgroup}/cgroup.subtree_control", CONTROLLERS)
            os.makedirs(self.directory, 0o700)
            for name, options in (("shm", SHM), ("etc", ETC)):
                os.mkdir(f"{self.directory}/{name}")
                linux.mount(name, f"{self.directory}/{name}", "tmpfs", linux.MS_NODEV, options)
            names.write(self.etc, [self.hostname, self.name], self.network.nameserver if self.network else "")
            if self.share_pid:
                os.mkdir(f"{self.cgroup}/{FIRST}")
                first = namespaces.hold(self.directory, f"{self.cgroup}/{FIRST}")
            own = [kind for kind in self.kinds if kind != "network" or self.network is None]
            namespaces.pin(self.directory, own, self.hostname)
        except OSError as error:
            raise StorageFailed(f"the pod {self.name} could not be made: {error}", errno=error.errno) from error
        cgroups.apply(self.cgroup, limits)
        return first

    def remove(self) -> None:
        """Undo `make`, however far it came.  Raises `StorageFailed`."""
        bundle.end(self.cgroup)
        try:
            if os.path.isdir(self.directory):
                namespaces.release(self.directory)
                for name in os.listdir(self.directory):
                    bundle.unmount(f"{self.directory}/{name}")
                    os.rmdir(f"{self.directory}/{name}")
                os.rmdir(self.directory)
        except OSError as error:
            raise StorageFailed(f"{self.directory} could not be removed: {error}", errno=error.errno) from error


class Pods:
    """All pods, and the handlers of `pod.*`."""

    def __init__(self, loop: Loop, reaper: Reaper, log: Callable[[int, str], object], networks: Networks) -> None:
        self._loop = loop
        self._reaper = reaper
        self._log = log
        self._networks = networks
        self._by_name: dict[str, Pod] = {}

    def handlers(self) -> dict[str, Handler]:
        """Method -> handler."""
        return {"pod.create": self._create, "pod.delete": self._delete, "pod.list": self._list}

    def find(self, name: str) -> Pod:
        """A pod that takes containers.  Raises `PodNotFound`, `PodNotReady`."""
        pod = self._by_name.get(name)
        if pod is None:
            raise PodNotFound(f"there is no pod {name[:80]!r}", pod=name[:80])
        if pod.state != "ready":
            raise self._not_ready(pod)
        return pod

    def _first_ended(self, pod: Pod) -> None:
        if pod.state == "ready":  # with it, the kernel has killed all others
            self._log(40, f"pod {pod.name}: its first process was killed, and so its containers were")

    @staticmethod
    def _not_ready(pod: Pod) -> PodNotReady:
        words = {"failed": "could not be removed as a whole"}.get(pod.state, f"is {pod.state}")
        return PodNotReady(f"the pod {pod.name} {words}", pod=pod.name, state=pod.state)

    def _create(self, call: Call, arguments: dict[str, Any]) -> None:
        name = arguments["pod"]
        check_name(name)
        hostname = arguments["hostname"] or name
        if len(hostname) > MAX_HOSTNAME or not hostname.isascii() or not hostname.isprintable() or " " in hostname:
            raise InvalidRequest(f"{hostname[:80]!r} is not a host name", field="hostname")
        limits = cgroups.files_of_resources(arguments["resources"])
        if name in self._by_name:
            raise PodExists(f"there is a pod {name!r} already", hint="delete it first", pod=name)
        if len(self._by_name) >= MAX_PODS:
            raise InvalidRequest(f"there are {MAX_PODS} pods", hint="delete some first")
        pod = Pod(name, hostname, arguments["share_pid"])
        if arguments["network"]:
            pod.network = self._networks.use(arguments["network"], f"p {name}")
        given_up: list[ByreError] = []

        def made(first: int | None, error: ByreError | None) -> None:
            failure = given_up[0] if given_up else error
            if first:
                self._reaper.watch(first, lambda _status: self._first_ended(pod))
            if failure is None:
                pod.state = "ready"
                call.reply({})
            else:
                reason = failure
                self._remove(pod, lambda _error: call.fail(reason))

        child = children.run(self._loop, self._reaper, lambda: pod.make(limits), TIMEOUT, made)
        self._by_name[name] = pod

        def give_up(error: ByreError) -> None:
            given_up.append(error)
            child.cancel()

        call.on_cancel = give_up

    def _list(self, call: Call, _arguments: dict[str, Any]) -> None:
        call.reply({"pods": [pod.describe() for pod in self._by_name.values()]})

    def _delete(self, call: Call, arguments: dict[str, Any]) -> None:
        """Kill and delete its containers, then what they shared.  Idempotent: what is not there is deleted."""
        if arguments["pod"] not in self._by_name:
            call.reply({})
            return
        pod = self._by_name[arguments["pod"]]
        if pod.state not in ("ready", "failed"):
            raise self._not_ready(pod)
        if not arguments["force"] and any(container.exit is None for container in pod.containers):
            raise ContainerNotReady(f"containers of the pod {pod.name} have not ended", pod=pod.name)
        pod.state = "deleting"

        def emptied() -> None:
            self._remove(pod, call.done)

        if not pod.containers:
            emptied()
        pod.on_empty = emptied
        for container in list(pod.containers):
            container.delete(lambda error: error and self._log(30, str(error)))

    def _remove(self, pod: Pod, done: Callable[[ByreError | None], object]) -> None:
        def removed(_result: object, error: ByreError | None) -> None:
            if error is None:
                self._by_name.pop(pod.name, None)
                self._networks.release(f"p {pod.name}")
            else:
                pod.state = "failed"
            done(error)

        children.run(self._loop, self._reaper, pod.remove, TIMEOUT, removed)


def check_name(name: str) -> None:
    """Pods are called as containers are.  Raises `InvalidRequest`."""
    from .containers import check_id

    check_id(name)
