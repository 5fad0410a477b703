"""A container's first process: from `crun create` to one that waits and that the host knows (B20).

Rule: it has its streams, and none of the container's code has run.  What fails leaves no process and no stream.
"""

from __future__ import annotations

import os

from byre_proto.errors import ByreError, RuntimeFailed

from . import bundle, runtime, terminals
from .processes import Stdio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .container import Container
    from .processes import Process
    from .ring import Ring

    Done = Callable[["Process | None", "ByreError | None"], object]

#: The fields of `container.init` when nobody asked for it: no streams, no terminal.
UNASKED = {"stdin": 0, "stdout": 0, "stderr": 0, "terminal": False, "width": 0, "height": 0}


class Init:
    """One attempt.  `done(process, None)` or `done(None, error)` follows `begin`."""

    def __init__(
        self,
        container: Container,
        arguments: dict[str, Any],
        done: Callable[[Process | None, ByreError | None], object],
    ) -> None:
        owner = container.owner
        self._container = container
        self._arguments = arguments
        self._done = done
        self._number = owner.processes.reserve()
        self._stdio = Stdio(owner.session, arguments, make_terminal=False)
        self._crun = runtime.Call(owner.loop, owner.reaper, container.id, self._number)
        self._crun.process = container.process

    def _log_to(self, log: Ring) -> None:
        """Nobody asked for its streams."""
        theirs, pipe = self._stdio.theirs, log.pipe()
        os.close(theirs[1])
        theirs[1] = pipe
        os.dup2(pipe, theirs[2], inheritable=False)

    def begin(self, log: Ring | None) -> None:
        """Call the runtime, with `log` for what it writes.  Raises `StartFailed`, OSError."""
        path = bundle.path_of(self._container.id)
        config = "config-terminal.json" if self._stdio.terminal else "config.json"
        try:
            if log is not None:
                self._log_to(log)
            self._crun.run(
                ["create", "--bundle", path, "--config", f"{path}/{config}"], self._created, stdio=self._stdio
            )
        except BaseException:
            self._crun.close()
            self._stdio.close()
            raise

    def _created(self, error: ByreError | None) -> None:
        process = None
        if error is None:
            try:
                process = self._adopt()
            except ByreError as failure:
                error = failure
            except OSError as failure:
                error = RuntimeFailed(f"container {self._container.id}: its first process: {failure}")
        self._crun.close()
        if error is not None:
            self._stdio.close()
        self._done(process, error)

    def _adopt(self) -> Process:
        container, stdio = self._container, self._stdio
        pid = self._crun.finish(stdio)
        if stdio.terminal:
            width, height = self._arguments["width"], self._arguments["height"]
            terminals.resize(stdio.ours[1], width or terminals.DEFAULT_WIDTH, height or terminals.DEFAULT_HEIGHT)
        return container.owner.processes.adopt(
            pid,
            stdio,
            container=container.id,
            args=container.process["args"],
            cgroup=container.cgroup,
            number=self._number,
            on_exit=container.init_exited,
        )
