"""One container, from its making to its end.

    creating   scratch, overlay and specs are being made, in a helper child
    created    they are there; the runtime has not been called
    preparing  `crun create` runs
    ready      init waits; none of the container's code has run (B20)
    starting   `crun start` runs
    running
    stopping   init has ended; the others are killed, and their ends awaited (B24)
    failed     `failure` says why there is no init; nothing ran, and only its end can follow (B23)
    stopped    `exit` says how; kept until it is deleted
    deleting   the runtime's state, the mounts and the cgroup are being removed

Rule: whatever fails is undone, and the id can be used again (B22).  The exit is told once, after every process of
the container has gone and, where it was known to the host, been reported.
"""

from __future__ import annotations

from time import time_ns

from byre_proto.errors import ByreError, ContainerNotReady, RuntimeFailed, StartFailed

from . import bundle, cgroups, children, oci, runtime
from .inits import UNASKED, Init
from .ring import Ring
from .watches import Count, Watches

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .containers import Containers
    from .execs import Exec
    from .files import ContainerFiles
    from .mounts import Mounts
    from .networks import Network
    from .pods import Pod
    from .processes import Process
    from .server import Call

    Done = Callable[["ByreError | None"], object]

#: To make or remove mounts and directories, in seconds; milliseconds when all is well.
STORAGE_TIMEOUT = 60.0

#: For killed processes to be gone.  One that a device or a file system holds may never go; the exit is then
#: reported all the same.
GONE_TIMEOUT = 30.0

#: Names the files of its own calls of the runtime, as a process's id does those of an exec's; ids begin at 1.
OWN = 0

#: As if SIGKILL had ended it: the exit of a container that was terminated before it had started (B23).
KILLED = {"code": 137, "signal": 9, "oom": False}

#: States as users of containers know them.
SHOWN = {
    **dict.fromkeys(("preparing", "ready", "failed"), "created"),
    **dict.fromkeys(("starting", "stopping"), "running"),
}


class Container:
    """See the module's text."""

    def __init__(self, owner: Containers, name: str, stop_signal: int, lease: str, pod: Pod | None) -> None:
        self.owner = owner
        self.id = name
        self.lease = lease  # of the disks that it can write, the host's to give back
        self.pod = pod
        self.cgroup = cgroups.path_of(name, pod.name if pod else "")
        self.state = "creating"
        self.process: dict[str, Any] = {}  # OCI process object of init; execs start from it
        self.init: Process | None = None
        self.exit: dict[str, Any] | None = None
        self.failure: ByreError | None = None
        self.log = Ring(owner.loop)
        self.execs: set[Exec] = set()  # on their way, or running
        self._files: ContainerFiles | None = None  # operations on them
        self._mounts: Mounts | None = None
        self._waiters: list[Call] = []
        self._deletions: list[Done] = []
        self._give_up: Callable[[ByreError], object] = lambda _error: None  # its making
        self._watches = Watches(owner.loop, self.cgroup)
        self._leaves: list[str] = []  # cgroups of execs, in which something may still run
        self._stop_signal = stop_signal
        self._created_ns = time_ns()
        self._started_ns = 0
        self._kill_wanted = False
        self._releasing = False  # the runtime is about to let init go
        self._oom_kills = 0  # that were laid to a process's account
        oom, pids = cgroups.oom_kills, cgroups.refused_forks
        self._counts = (
            Count(owner.loop, lambda: oom(self.cgroup), lambda risen: self._emit("oom", kills=risen)),
            Count(owner.loop, lambda: pids(self.cgroup), lambda risen: self._emit("pids", refused=risen)),
        )

    def describe(self) -> dict[str, Any]:
        """As `container.state` and `container.list` show it."""
        return {
            "id": self.id,
            "pod": self.pod.name if self.pod else "",
            "state": SHOWN.get(self.state, self.state),
            "pid": self.init.pid if self.init else 0,
            "process": self.init.id if self.init else 0,
            "created_ns": self._created_ns,
            "started_ns": self._started_ns,
            "exit": self.exit,
            "lease": self.lease,
        }

    # -- create --------------------------------------------------------------------------------------------

    def create(self, call: Call, paths: dict[str, str], network: Network | None, arguments: dict[str, Any]) -> None:
        """Make everything that the runtime will need; answers the call.  `paths`: of its disks, by name."""
        etc = nameserver = ""
        if self.pod is not None:
            arguments, etc = {**arguments, "spec": self.pod.spec(arguments["spec"])}, self.pod.etc
        elif network is not None:
            arguments = {**arguments, "spec": oci.joined(arguments["spec"], {"network": network.path})}
            nameserver = network.nameserver
        given_up: list[ByreError] = []

        def prepared(process: dict[str, Any] | None, error: ByreError | None) -> None:
            failure = given_up[0] if given_up else error
            if failure is None and process is not None:
                try:
                    self._created(process)
                    call.reply({})
                    return
                except OSError as problem:
                    self._watches.close()
                    failure = RuntimeFailed(f"container {self.id} cannot be watched: {problem}")
            reason = failure or RuntimeFailed(f"container {self.id} was not prepared")
            self._remove(lambda _error: call.fail(reason))

        child = self._in_child(
            lambda: bundle.prepare(self.id, self.cgroup, paths, arguments, etc, nameserver), prepared
        )

        def give_up(error: ByreError) -> None:
            given_up.append(error)
            child.cancel()

        call.on_cancel = self._give_up = give_up

    def _created(self, process: dict[str, Any]) -> None:
        self.process = process
        self._watches.add("cgroup.events", self._check_gone)
        for name, count in zip(("memory.events", "pids.events"), self._counts):
            self._watches.add(name, count.changed)
        self.state = "created"
        self._emit("created")

    # -- init and start ------------------------------------------------------------------------------------

    def make_init(self, arguments: dict[str, Any], done: Done, *, logged: bool = False) -> None:
        """Make its first process, which waits.  `logged`: its output goes to the container's log."""
        self._require("created", "has its first process already")

        def made(process: Process | None, error: ByreError | None) -> None:
            if error is not None:
                self._init_failed(error)
            else:
                self.init = process
                self.state = "ready"
                if self._kill_wanted:
                    cgroups.kill(self.cgroup)
            done(error)

        Init(self, arguments, made).begin(self.log if logged else None)
        self.state = "preparing"

    def _init_failed(self, error: ByreError) -> None:
        """There will never be an init.  No exit is invented: the container is as one that nobody started."""
        cgroups.kill(self.cgroup)
        self.failure = error
        self.state = "failed"
        if self._kill_wanted:
            self._finish(KILLED)

    def start(self, call: Call) -> None:
        """`container.start`; makes init first where nobody asked for it."""
        if self.state == "created":
            self.make_init(UNASKED, lambda error: call.fail(error) if error else self._start(call), logged=True)
        else:
            self._require("ready", "has ended" if self.state == "stopped" else "was started already")
            self._start(call)

    def _start(self, call: Call) -> None:
        self.state = "starting"
        self._releasing = True
        crun = runtime.Call(self.owner.loop, self.owner.reaper, self.id, OWN)

        def started(error: ByreError | None) -> None:
            crun.close()
            self._releasing = False
            if error is not None:
                cgroups.kill(self.cgroup)
                call.fail(error)
            else:
                self._started_ns = time_ns()
                pid = self.init.pid if self.init else 0
                self._emit("started", pid=pid)
                call.reply({"pid": pid})
                if self.state == "starting":
                    self.state = "running"
            self._check_gone()  # init may have ended by now

        try:
            crun.run(["start"], started)
        except StartFailed as error:
            started(error)

    # -- the end -------------------------------------------------------------------------------------------

    def shutdown(self) -> None:
        """Send the stop signal; what never started is ended as by `terminate` (B23)."""
        if self.state in ("starting", "running") and self.init is not None:
            self._emit("killed", signal=self._stop_signal)
            self.owner.reaper.signal(self.init.pid, self._stop_signal)
        else:
            self.terminate()

    def terminate(self) -> None:
        """Kill everything in it (B23).  Harmless when repeated or too late."""
        if not self._kill_wanted and self.state not in ("stopping", "stopped", "deleting"):
            self._emit("killed", signal=KILLED["signal"])
        self._kill_wanted = True
        if self.state in ("created", "failed"):
            self._finish(KILLED)
        elif self.state in ("ready", "starting", "running", "stopping"):
            cgroups.kill(self.cgroup)

    def init_exited(self, process: Process) -> None:
        """Its first process has ended: so do the others (B24)."""
        process.oom = self.was_oom(process)
        self.state = "stopping"
        cgroups.kill(self.cgroup)
        self.owner.loop.call_later(GONE_TIMEOUT, self._never_gone)
        self.owner.loop.call_soon(self._check_gone)

    def exec_over(self, gone: Exec, leaf: str) -> None:
        """The process of an exec has ended, or never was; what it left running keeps the cgroup `leaf`."""
        self.execs.discard(gone)
        self._leaves.append(leaf)
        self._leaves = [path for path in self._leaves if not cgroups.remove(path)]
        if self.state == "stopping":
            self.owner.loop.call_soon(self._check_gone)

    def was_oom(self, process: Process) -> bool:
        """Whether the kernel killed it for want of memory: since the last such end, the count has risen (B29)."""
        seen, self._oom_kills = self._oom_kills, cgroups.oom_kills(self.cgroup)
        killed = process.exit is not None and process.exit["code"] == KILLED["code"]
        return killed and self._oom_kills > seen and not self._kill_wanted

    def _emit(self, event: str, **fields: Any) -> None:
        self.owner.emit(f"container.{event}", {"container": self.id, **fields})

    def _check_gone(self) -> None:
        if self.state != "stopping" or self.execs or self._releasing:
            return
        if cgroups.populated(self.cgroup):
            cgroups.kill(self.cgroup)  # an exec may just have come in
        else:
            self._ended()

    def _never_gone(self) -> None:
        if self.state == "stopping":
            self.owner.log(30, f"container {self.id}: killed processes are not gone after {GONE_TIMEOUT:g} s")
            self._ended()

    def _ended(self) -> None:
        assert self.init is not None and self.init.exit is not None
        self._finish(self.init.exit)

    def _finish(self, how: dict[str, Any]) -> None:
        self.exit = dict(how)
        self.state = "stopped"
        self._watches.close()
        self.log.finish()
        self.owner.ended(self)
        for count in self._counts:
            count.close()
        self._emit("exit", **self.exit)
        waiters, self._waiters = self._waiters, []
        for call in waiters:
            call.reply(self.exit)
        if self._deletions:
            self._dispose()

    def wait(self, call: Call) -> None:
        """`container.wait`: answers with the exit, now or later."""
        if self.exit is not None:
            call.reply(self.exit)
        else:
            call.wait_among(self._waiters)

    # -- delete --------------------------------------------------------------------------------------------

    def delete(self, done: Done) -> None:
        """Kill it, then remove all of it; `done(None)` or `done(error)` follows, unless it was never made."""
        self._deletions.append(done)
        if self.state == "creating":
            self._give_up(ContainerNotReady(f"container {self.id} is deleted before it is made"))
        elif self.state == "stopped":
            self._dispose()
        elif self.state != "deleting":
            self.terminate()

    def start_files(self, call: Call, arguments: dict[str, Any]) -> None:
        """`files.start`, from its making to its end: stopped, it has what its layers and its scratch have."""
        if self.state == "deleting":
            raise self.not_ready("is being deleted")
        if self._files is None:
            from .files import ContainerFiles

            self._files = ContainerFiles(self.owner.loop, self.owner.processes, f"{bundle.path_of(self.id)}/rootfs")
        self._files.start(call, arguments, self.init)

    @property
    def mounts(self) -> Mounts:
        """Those that come and go while it runs."""
        if self._mounts is None:
            from .mounts import Mounts

            self._mounts = Mounts(self)
        return self._mounts

    def _dispose(self) -> None:
        self.state = "deleting"
        if self._files is None:
            self._dispose_now()
        else:
            self._files.end(self._dispose_now)

    def _dispose_now(self) -> None:
        if self.init is None and self.failure is None:  # the runtime has never heard of it
            self._remove(self._deleted)
        else:
            self._have_forgotten()

    def _have_forgotten(self) -> None:
        crun = runtime.Call(self.owner.loop, self.owner.reaper, self.id, OWN)

        def forgotten(error: ByreError | None) -> None:
            crun.close()
            if error is not None:
                self.owner.log(30, f"container {self.id}: {error}")
            self._remove(self._deleted)

        try:
            crun.run(["delete", "--force"], forgotten)
        except StartFailed as error:
            self._again(error, self._have_forgotten)

    def _remove(self, done: Done) -> None:
        """Unmount and forget; the layers are free when that is done."""

        def removed(_result: object, error: ByreError | None) -> None:
            if isinstance(error, StartFailed):
                self._again(error, remove)
                return
            self.log.close()
            if self._mounts is not None:
                self._mounts.ended()
            self.owner.forget(self)
            done(error)

        end_shares = self.owner.shares.ending(self.id)

        def tear_down() -> None:
            bundle.teardown(self.id, self.cgroup)  # an overlay may have one of them below it
            end_shares()

        def remove() -> None:
            self._in_child(tear_down, removed)

        remove()

    def _again(self, error: StartFailed, step: Callable[[], object]) -> None:
        """A step of taking it away could not begin: there are no descriptors or no memory for it."""
        self.owner.log(30, f"container {self.id} cannot be removed yet: {error}")
        self.owner.loop.call_later(children.AGAIN_SECONDS, step)

    def _deleted(self, error: ByreError | None) -> None:
        if error is None:
            self._emit("deleted", lease=self.lease)
        for done in self._deletions:
            done(error)

    # -- helpers -------------------------------------------------------------------------------------------

    def _in_child(self, function: Callable[[], object], done: children.Done) -> children.Child:
        return children.run(self.owner.loop, self.owner.reaper, function, STORAGE_TIMEOUT, done)

    def _require(self, state: str, otherwise: str) -> None:
        if self.failure is not None:
            raise self.failure
        if self.state != state:
            raise self.not_ready(otherwise)

    def not_ready(self, why: str) -> ByreError:
        """The error for what its state does not allow."""
        return ContainerNotReady(f"container {self.id} {why}", container=self.id, state=self.state)
