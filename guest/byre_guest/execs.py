"""One exec: from `process.create` in a container to a process that the host knows, or to nothing (B14, B15).

    checking   a helper child looks up the user, checks directory and program, writes the process object
    joining    `crun exec` runs; the new process has the container's namespaces and a cgroup of its own in it
    done       it is adopted, and answered; or everything is undone, and the reason answered

Rule: cancelled or overdue, it leaves no process, no stream and no file.
"""

from __future__ import annotations

from byre_proto.errors import ByreError, RuntimeFailed

from . import bundle, cgroups, children, runtime
from .processes import Stdio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .container import Container
    from .processes import Process
    from .server import Call


class Exec:
    """See the module's text."""

    def __init__(self, container: Container, call: Call, arguments: dict[str, Any]) -> None:
        owner = container.owner
        self._container = container
        self._owner = owner
        self._call = call
        self._arguments = arguments
        self._number = owner.processes.reserve()
        self._leaf = f"byre-{self._number}"
        self._cgroup = f"{container.cgroup}/{self._leaf}"
        self._crun = runtime.Call(owner.loop, owner.reaper, container.id, self._number)
        self._stdio = Stdio(owner.session, arguments, make_terminal=False)
        self._given_up: ByreError | None = None
        self._child: children.Child | None = None

    def begin(self) -> None:
        """Start; the call is answered later."""
        container, arguments = self._container, self._arguments
        assert container.init is not None
        root, base = f"/proc/{container.init.pid}/root", container.process
        file, cgroup = self._crun.process_file, self._cgroup
        self._child = children.run(
            self._owner.loop,
            self._owner.reaper,
            lambda: bundle.prepare_exec(root, base, arguments, file, cgroup),
            runtime.TIMEOUT,
            self._prepared,
        )
        self._call.on_cancel = self._give_up
        container.execs.add(self)

    def _give_up(self, error: ByreError) -> None:
        self._given_up = error
        if self._child is not None:
            self._child.cancel()

    def _prepared(self, process: dict[str, Any] | None, error: ByreError | None) -> None:
        error = self._given_up or error
        if error is not None or process is None:
            self._undo(error or RuntimeFailed("the exec was not prepared"))
            return
        self._crun.process = process
        command = ["exec", "--detach", "--process", self._crun.process_file, "--cgroup", self._leaf]
        try:
            self._child = self._crun.run(command, self._joined, stdio=self._stdio)
        except (ByreError, OSError) as failure:
            self._undo(failure if isinstance(failure, ByreError) else RuntimeFailed(str(failure)))

    def _joined(self, error: ByreError | None) -> None:
        error = self._given_up or error
        if error is not None:
            self._undo(error)
            return
        try:
            process = self._owner.processes.adopt(
                self._crun.finish(self._stdio),
                self._stdio,
                container=self._container.id,
                args=self._crun.process["args"],
                cgroup=self._cgroup,
                number=self._number,
                on_exit=self._ended,
            )
        except (ByreError, OSError) as failure:
            self._undo(failure if isinstance(failure, ByreError) else RuntimeFailed(str(failure)))
            return
        self._crun.close()
        self._call.on_cancel = None
        self._call.reply({"process": process.id, "pid": process.pid})

    def _ended(self, process: Process) -> None:
        process.oom = self._container.was_oom(process)
        self._container.exec_over(self, self._cgroup)

    def _undo(self, error: ByreError) -> None:
        cgroups.kill(self._cgroup)
        self._container.exec_over(self, self._cgroup)
        self._crun.close()
        self._stdio.close()
        self._call.fail(error)
