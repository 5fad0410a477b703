"""The containers of this machine: who is called what, and the handlers of the METHODS.

    handlers(server)                the methods, for the server's table
    create_process_in_container     `process.create` with a container
    start_files_in_container        `files.start` with a container
    handle_socket_of_container      `socket.connect` and `socket.listen` with one

Rule: a handler checks and hands on; what may block is in helper children (`bundle`, `storage`), what a container
is at the moment in `container`.  Where there is no cgroup version 2, everything is refused with the reason.
"""

from __future__ import annotations

from byre_proto import messages
from byre_proto.errors import ByreError, ContainerExists, ContainerNotFound, InvalidRequest, NotSupported

from . import cgroups, children, disks, oci, pods, stats, volumes
from .container import STORAGE_TIMEOUT, Container
from .execs import Exec
from .networks import Networks
from .shares import Shares

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from byre_proto.session import Session

    from .server import Call, Handler, Server

#: Longest id: it becomes a path, a cgroup and a mount option.
MAX_ID = 64

#: Containers at once: each holds two mounts and two watched files.
MAX_CONTAINERS = 1024

_ALPHANUMERIC = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
_ID_CHARACTERS = _ALPHANUMERIC | frozenset("_.-")

#: What the methods begin with that are served here.
METHODS = ("container.", "disk.", "network.", "pod.", "share.")

#: Signals are 1 to 64; 0 would probe, not stop.
MAX_SIGNAL = 64

#: The keys under which the handlers of what is done in a container stand beside the methods.
CREATE_PROCESS = "process.create in a container"
START_FILES = "files.start in a container"
SOCKET = "a socket of a container"

_tables: dict[Server, dict[str, Handler]] = {}


def handlers(server: Server) -> dict[str, Handler]:
    """Method -> handler, for the server's table.

    The first call loads the drivers of disks: make it before a template of the VM is saved.
    """
    table = _tables.get(server)
    if table is None:
        reason = cgroups.why_not()
        table = _tables[server] = _refusals(reason) if reason else Containers(server).handlers()
    return table


def create_process_in_container(call: Call, arguments: dict[str, Any]) -> None:
    """`process.create` where `container` is not ""."""
    handlers(call.server)[CREATE_PROCESS](call, arguments)


def start_files_in_container(call: Call, arguments: dict[str, Any]) -> None:
    """`files.start` where `container` is not ""."""
    handlers(call.server)[START_FILES](call, arguments)


def handle_socket_of_container(call: Call, arguments: dict[str, Any]) -> None:
    """`socket.connect` and `socket.listen` where `container` is not ""."""
    handlers(call.server)[SOCKET](call, arguments)


def check_id(name: str) -> None:
    """Whether a container may be called this.  Raises `InvalidRequest`."""
    if not name or name[0] not in _ALPHANUMERIC or not _ID_CHARACTERS.issuperset(name) or len(name) > MAX_ID:
        raise InvalidRequest(
            f"{name[:80]!r} is not a container id",
            hint=f"1 to {MAX_ID} letters, digits, '_', '.' and '-', a letter or digit first",
            field="container",
        )


class Containers:
    """See the module's text."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.loop = server.loop
        self.reaper = server.reaper
        self.processes = server.processes
        self.emit = server.event
        self.log = server.logs.log
        self.disks = disks.Disks(server.loop, server.reaper)
        self.networks = Networks(server)
        self.pods = pods.Pods(server.loop, server.reaper, self.log, self.networks)
        self.shares = Shares(server, self._detour)
        self._by_id: dict[str, Container] = {}

    @property
    def session(self) -> Session:
        """Of the present connection."""
        return self._server.session

    def handlers(self) -> dict[str, Handler]:
        """Method -> handler."""
        return {
            "disk.mount": self.disks.mount,
            "disk.unmount": self.disks.unmount,
            "disk.sync": self.disks.sync,
            "share.open": self.shares.open,
            "share.mount": self.shares.mount,
            "share.unmount": self.shares.unmount,
            "share.wait": self.shares.wait,
            "network.open": self.networks.open,
            "network.close": self.networks.close,
            "container.create": self._create,
            "container.init": self._init,
            "container.start": lambda call, arguments: self._find(arguments).start(call),
            "container.shutdown": self._shutdown,
            "container.terminate": self._terminate,
            "container.delete": self._delete,
            "container.wait": lambda call, arguments: self._find(arguments).wait(call),
            "container.list": self._list,
            "container.state": self._state,
            "container.processes": self._processes,
            "container.stats": self._stats,
            "container.update": self._update,
            "container.log": self._log,
            **self.pods.handlers(),
            "container.mount": lambda call, arguments: self._find(arguments).mounts.add(call, arguments),
            "container.unmount": lambda call, arguments: self._find(arguments).mounts.remove(call, arguments),
            CREATE_PROCESS: self._create_process,
            START_FILES: lambda call, arguments: self._find(arguments).start_files(call, arguments),
            SOCKET: self._socket,
        }

    def forget(self, container: Container) -> None:
        """It is gone; its id and its disks are free."""
        self._by_id.pop(container.id, None)
        self.disks.release(container.id)
        self.shares.release(container.id)
        self.networks.release(f"c {container.id}")
        if container.pod is not None:
            container.pod.forget(container)

    def _detour(self) -> None:
        """There is to be a share.  Raises OSError."""
        self.processes.detour()
        for container in self._by_id.values():
            container.log.detour()

    def _find(self, arguments: dict[str, Any]) -> Container:
        name = arguments["container"]
        container = self._by_id.get(name)
        if container is None:
            raise ContainerNotFound(f"there is no container {name[:80]!r}", container=name[:80])
        if container.state == "creating":
            raise container.not_ready("is still being created")
        return container

    def _create(self, call: Call, arguments: dict[str, Any]) -> None:
        name = arguments["container"]
        check_id(name)
        if name in self._by_id:
            raise ContainerExists(f"there is a container {name!r} already", hint="delete it first", container=name)
        if len(self._by_id) >= MAX_CONTAINERS:
            raise InvalidRequest(f"there are {MAX_CONTAINERS} containers", hint="delete some first")
        if bool(arguments["layers"]) == bool(arguments["root_share"]):
            raise InvalidRequest("a container needs layers, or a share that is its root", field="layers")
        if arguments["scratch_bytes"] < 0 or not 0 < arguments["stop_signal"] <= MAX_SIGNAL:
            raise InvalidRequest("scratch_bytes or stop_signal is out of range")
        oci.check_spec(arguments["spec"])
        if arguments["pod"] and arguments["network"]:
            raise InvalidRequest("a container in a pod has the pod's network", field="network")
        pod = self.pods.find(arguments["pod"]) if arguments["pod"] else None
        container = Container(self, name, arguments["stop_signal"], arguments["lease"], pod)
        self._by_id[name] = container
        if pod is not None:
            pod.containers.add(container)
        try:
            network = self.networks.use(arguments["network"], f"c {name}") if arguments["network"] else None
            container.create(call, self._hold(name, arguments), network, arguments)
        except (ByreError, OSError):
            self.forget(container)
            raise

    def _hold(self, name: str, arguments: dict[str, Any]) -> dict[str, str]:
        """The disks and the root of a container, which with its shares are its from now on: name -> where it is."""
        root = arguments["root_share"]
        self.shares.use([*arguments["shares"], *filter(None, [root])], name)
        disks = [*arguments["layers"], *filter(None, [arguments["scratch"]]), *volumes.named(arguments["spec"])]
        paths = dict(zip(disks, self.disks.use(disks, name)))
        if root:
            paths[root] = self.shares.path(root)
        return paths

    def _init(self, call: Call, arguments: dict[str, Any]) -> None:
        container = self._find(arguments)

        def answer(error: ByreError | None) -> None:
            if error is not None or container.init is None:
                call.fail(error or container.not_ready("has no first process"))
            else:
                call.reply({"process": container.init.id, "pid": container.init.pid})

        if container.init is not None:  # asked for again it is the same one (B20)
            answer(None)
        else:
            container.make_init(arguments, answer)

    def _shutdown(self, call: Call, arguments: dict[str, Any]) -> None:
        self._find(arguments).shutdown()
        call.reply({})

    def _terminate(self, call: Call, arguments: dict[str, Any]) -> None:
        self._find(arguments).terminate()
        call.reply({})

    def _delete(self, call: Call, arguments: dict[str, Any]) -> None:
        """Idempotent: what is not there is deleted."""
        if arguments["container"] in self._by_id:
            self._find(arguments).delete(call.done)
        else:
            call.reply({})

    def _list(self, call: Call, _arguments: dict[str, Any]) -> None:
        call.reply({"containers": [container.describe() for container in self._by_id.values()]})

    def _state(self, call: Call, arguments: dict[str, Any]) -> None:
        call.reply({"state": self._find(arguments).describe()})

    def _stats(self, call: Call, arguments: dict[str, Any]) -> None:
        call.reply({"stats": stats.statistics(self._find(arguments).cgroup)})

    def _processes(self, call: Call, arguments: dict[str, Any]) -> None:
        cgroup = self._find(arguments).cgroup
        self._in_child(call, lambda: {"processes": stats.processes(cgroup)})

    def _update(self, call: Call, arguments: dict[str, Any]) -> None:
        cgroup = self._find(arguments).cgroup
        files = cgroups.files_of_resources(arguments["resources"])

        def update() -> dict[str, Any]:
            cgroups.apply(cgroup, files)
            return {}

        self._in_child(call, update)

    def _in_child(self, call: Call, function: Callable[[], dict[str, Any]]) -> None:
        """Answer with what the function gives; it may block."""

        def done(result: dict[str, Any] | None, error: ByreError | None) -> None:
            if error is not None:
                call.fail(error)
            else:
                call.reply(result or {})

        children.run(self.loop, self.reaper, function, STORAGE_TIMEOUT, done)

    def _log(self, call: Call, arguments: dict[str, Any]) -> None:
        ring, start = self._find(arguments).log, arguments["start"]

        def answer() -> None:
            if ring.closing:
                ring.wait(answer)
                return
            data, dropped = ring.read(start)
            call.reply({"data": data, "dropped": dropped, "ended": ring.ended})

        def give_up(error: ByreError) -> None:
            ring.wait_no_more(answer)
            call.fail(error)

        call.on_cancel = give_up
        if arguments["wait"] and start >= ring.total and not ring.ended:
            ring.wait(answer)
        else:
            answer()

    def _socket(self, call: Call, arguments: dict[str, Any]) -> None:
        """Its network is there from the making of its first process to that one's end."""
        container = self._find(arguments)
        if container.state not in ("ready", "starting", "running"):
            raise container.not_ready("is not running")
        assert self._server.sockets is not None, "the server has it for the call"
        self._server.sockets.handle(call, arguments, container.init)

    def ended(self, container: Container) -> None:
        """It has stopped."""
        if self._server.sockets is not None:
            self._server.sockets.container_ended(container.id)

    def _create_process(self, call: Call, arguments: dict[str, Any]) -> None:
        """An exec (B21)."""
        container = self._find(arguments)
        if container.state != "running" or container.init is None:
            raise container.not_ready("is not running")
        Exec(container, call, arguments).begin()


def _refusals(reason: str) -> dict[str, Handler]:
    """Every method of this module, refused."""

    def refuse(call: Call, _arguments: dict[str, Any]) -> None:
        raise NotSupported(
            f"{call.method}: there can be no containers here: {reason}", hint="use a virtual machine"
        )

    names = [name for name in messages.METHODS if name.startswith(METHODS)]
    return dict.fromkeys([*names, CREATE_PROCESS, START_FILES, SOCKET], refuse)
