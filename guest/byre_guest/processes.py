"""The processes that the host knows, by an id that is never used again.

    starting   forked; its error pipe is open
    running    it has been reported to the host; signals, resize, release
    exited     its exit was reported; kept until released, so that a late `process.wait` gets it

`Processes.create` starts them in the VM; `adopt` takes in what somebody else started (the OCI runtime), and gives
it pumps, signals, resize, exits and release all the same.

Rule: an exit is reported at once, after what the pipes hold has been read as far as credit goes, and without
waiting for their ends (B2, B5).  Nothing here waits.
"""

from __future__ import annotations

import os

from byre_proto.errors import (
    ByreError,
    InvalidRequest,
    NotATerminal,
    ProcessNotFound,
    ResourceExhausted,
    StartFailed,
)

from . import detours, spawn, terminals, trees
from .children import Collector
from .inputs import ToPipe
from .pumps import FromPipe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from byre_proto.session import Session

    from .loop import Loop
    from .pumps import Pumps
    from .reaper import Reaper
    from .server import Call

#: Processes known at once, running or kept after their exit.  One more is refused: a host that releases nothing
#: must not fill the guest's memory (each is about 3 KiB and, while it runs, five descriptors).
MAX_PROCESSES = 4096

#: The exit status of a process that a signal ended is this plus the signal's number (B8).
SIGNALLED = 128


class Stdio:
    """A new process's standard streams: their stream ids, our ends of them and its own (-1: none).

    `theirs` are descriptors for the process, close-on-exec; close them with `close_theirs` once it has them.  A
    stream that was not asked for is /dev/null there.  A terminal's master is our stdin and stdout both; where
    somebody else makes the terminal (crun), `set_master` brings it.
    """

    def __init__(self, session: Session, arguments: dict[str, Any], *, make_terminal: bool = True) -> None:
        """From the fields stdin, stdout, stderr, terminal, width, height.  Raises `InvalidRequest`, OSError, ..."""
        self.session = session
        self.terminal: bool = arguments["terminal"]
        self.ids: tuple[int, int, int] = (arguments["stdin"], arguments["stdout"], arguments["stderr"])
        self.detoured = False
        self.ours = [-1, -1, -1]
        self.theirs = [-1, -1, -1]
        if self.terminal and self.ids[2]:
            raise InvalidRequest("a terminal has one output stream", hint="ask for no stderr", field="stderr")
        self._accepted: list[int] = []
        try:
            for index, number in enumerate(self.ids):
                if number:
                    session.accept_stream(number, sending=index > 0, receiving=index == 0)
                    self._accepted.append(number)
            if self.terminal:
                if make_terminal:
                    self._open_terminal(arguments["width"], arguments["height"])
            else:
                self._open_pipes()
        except BaseException:
            self.close()
            raise

    def _open_terminal(self, width: int, height: int) -> None:
        master, slave = terminals.open_terminal(width, height)
        self.theirs = [slave, slave, slave]
        self.set_master(master)

    def set_master(self, master: int) -> None:
        """Take over a terminal's master; the two directions end independently, so each has its own descriptor."""
        self.ours[1] = master
        self.ours[0] = os.dup(master) if self.ids[0] else -1

    def _open_pipes(self) -> None:
        for index, number in enumerate(self.ids):
            if not number:
                self.theirs[index] = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            elif index == 0:
                self.theirs[0], self.ours[0] = os.pipe2(os.O_CLOEXEC)
            else:
                self.ours[index], self.theirs[index] = os.pipe2(os.O_CLOEXEC)
        self.detour_if_needed()

    def detour_if_needed(self) -> None:
        """Where there is a share by now.  Raises OSError: then there can be no process."""
        if detours.needed and not (self.detoured or self.terminal):
            for index, fd in enumerate(self.ours):
                if fd >= 0:
                    self.ours[index] = detours.around(fd, reading=index > 0)
            self.detoured = True

    def close_theirs(self) -> None:
        """Our copies of the process's ends: with them open no stream would ever end."""
        _close(self.theirs)

    def close(self) -> None:
        """There will be no process: leave neither descriptors nor streams (B15)."""
        _close(self.theirs)
        _close(self.ours)
        for number in self._accepted:
            self.session.stop(number)
            self.session.reset(number)


def _close(fds: list[int]) -> None:
    for fd in set(fds):
        if fd >= 0:
            os.close(fd)
    fds[:] = [-1, -1, -1]


class Process:
    """One of them; see the module's text.  Made by `Processes`."""

    def __init__(self, number: int, pid: int, args: Sequence[str], container: str, tree: trees.Tree) -> None:
        self.id = number
        self.pid = pid
        self.args = list(args)
        self.container = container
        self.tree = tree
        self.terminal = False
        self.oom = False  # set by whoever can tell, before or in `on_exit`
        self.released = False
        self.exit: dict[str, Any] | None = None
        self.totals = [0, 0, 0]  # bytes of stdout and stderr; -1 until their end was seen
        self.master = -1
        self.outputs: dict[int, FromPipe] = {}
        self.input: ToPipe | None = None
        self.waiters: list[Call] = []
        self.starting: _Start | None = None
        self.on_exit: Callable[[Process], object] | None = None

    def describe(self) -> dict[str, Any]:
        """As `process.list` shows it."""
        return {
            "process": self.id,
            "pid": self.pid,
            "container": self.container,
            "args": self.args,
            "terminal": self.terminal,
            "exit": self.exit,
        }

    def close_streams(self) -> None:
        """Its input ends, its output pipes break, its terminal hangs up (SIGHUP)."""
        for pump in [*self.outputs.values(), self.input]:
            if pump is not None:
                pump.close()

    def written(self, index: int) -> int:
        """Bytes written to stdout (1) or stderr (2) until now, carried or not; -1 when nobody knows."""
        total, pump = self.totals[index], self.outputs.get(index)
        return pump.written if total < 0 and pump is not None else total


class Processes:
    """See the module's text.  `pumps` and `emit` (an event to the host) are those of the present connection."""

    def __init__(self, loop: Loop, reaper: Reaper, emit: Callable[[str, dict[str, Any]], object]) -> None:
        self.loop = loop
        self.reaper = reaper
        self.emit = emit
        self.pumps: Pumps | None = None
        self.trees = trees.Trees()
        self.default_env = dict(os.environ)
        self.by_id: dict[int, Process] = {}
        self._last_id = 0

    # -- how they come -------------------------------------------------------------------------------------

    def reserve(self) -> int:
        """A new id.  Raises `ResourceExhausted` when too many are known."""
        if len(self.by_id) >= MAX_PROCESSES:
            raise ResourceExhausted(
                f"{MAX_PROCESSES} processes are known", hint="release (close) those that are no longer needed"
            )
        self._last_id += 1
        return self._last_id

    def create(self, call: Call, arguments: dict[str, Any]) -> None:
        """`process.create` in the VM itself; answers when the program runs, or says why it does not."""
        if arguments["oci"] is not None:
            raise InvalidRequest("an OCI process spec is for a process in a container", field="oci")
        plan = spawn.Plan(arguments, self.default_env)
        number = self.reserve()
        assert self.pumps is not None, "requests come over a connection"
        stdio = Stdio(self.pumps.session, arguments)
        tree, report = self.launch(stdio, lambda: _spawn(plan, stdio))
        process = Process(number, tree.pid, plan.args, "", tree)
        if report >= 0:
            _Start(self, call, process, plan, report)
        self._take_in(process, stdio)
        if report < 0:
            call.reply({"process": number, "pid": tree.pid})

    def launch(self, stdio: Stdio, start: Callable[[], tuple[int, int]]) -> tuple[trees.Tree, int]:
        """Have `start() -> (pid, descriptor of its report)` start a process in a tree of its own.

        Raises `StartFailed`: then nothing is left, its streams neither.
        """
        tree = trees.Tree(0)
        try:
            tree = self.trees.new()
            self.trees.enter(tree)
            try:
                tree.pid, report = start()
            finally:
                self.trees.leave()
        except OSError as error:
            stdio.close()
            self.trees.ended(tree)
            raise StartFailed(f"no new process: {error.strerror}", errno=error.errno) from error
        return tree, report

    def adopt(
        self,
        pid: int,
        stdio: Stdio,
        *,
        container: str = "",
        args: Sequence[str] = (),
        cgroup: str = "",
        tree: trees.Tree | None = None,
        number: int = 0,
        on_exit: Callable[[Process], object] | None = None,
    ) -> Process:
        """Take in the running child `pid` and start its pumps.

        `cgroup` is a directory that holds its tree and nothing else, or ""; `tree` is one that was made for it.
        `on_exit(process)` is called when `process.exit` is known, just before it is sent.

        Raises ProcessLookupError when `pid` is no child of the agent; OSError; `ResourceExhausted`.
        """
        stdio.detour_if_needed()  # a share may have come since its streams were made
        number = number or self.reserve()
        process = Process(number, pid, args, container, tree or trees.Tree(pid, cgroup))
        process.on_exit = on_exit
        self._take_in(process, stdio)
        return process

    def _take_in(self, process: Process, stdio: Stdio) -> None:
        self.reaper.watch(process.pid, lambda status: self._ended(process, status))
        self.by_id[process.id] = process
        self._start_pumps(process, stdio)

    def _start_pumps(self, process: Process, stdio: Stdio) -> None:
        stdio.close_theirs()
        process.terminal = stdio.terminal
        pumps = self.pumps
        if pumps is None or pumps.session is not stdio.session:
            stdio.close()  # the connection that asked for it is gone
            return
        master = process.master = stdio.ours[1] if stdio.terminal else -1
        for index in (1, 2):
            if stdio.ours[index] >= 0 and stdio.ids[index]:
                process.totals[index] = -1
                ended = _output_ended(process, index)
                pump = process.outputs[index] = FromPipe(
                    pumps, stdio.ours[index], stdio.ids[index], ended, terminal=stdio.terminal
                )
                pump.detoured = stdio.detoured
        if stdio.ours[0] >= 0:
            at_eof = (lambda last: terminals.end_of_file(master, last)) if stdio.terminal else None
            process.input = ToPipe(pumps, stdio.ours[0], stdio.ids[0], lambda: None, at_eof)
            process.input.detoured = stdio.detoured

    # -- how they end --------------------------------------------------------------------------------------

    def _ended(self, process: Process, status: int) -> None:
        for pump in list(process.outputs.values()):
            pump.drain()
        self.loop.call_later(0, lambda: self.trees.ended(process.tree))  # the host hears of the exit first
        if process.starting is not None and not process.starting.ended():
            del self.by_id[process.id]
            return
        signal = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        code = SIGNALLED + signal if signal else os.WEXITSTATUS(status)
        process.exit = {"code": code, "signal": signal, "oom": False}
        if process.on_exit is not None:
            process.on_exit(process)
        process.exit["oom"] = process.oom
        for call in process.waiters:
            call.reply(process.exit)
        process.waiters.clear()
        if process.released:
            del self.by_id[process.id]
            return
        counts = {"stdout": process.written(1), "stderr": process.written(2)}
        self.emit("process.exit", {"process": process.id, **process.exit, **counts})

    def detour(self) -> None:
        """There is to be a share: no pipe may hold up the agent from now on.  Raises OSError."""
        for process in self.by_id.values():
            for pump in (*process.outputs.values(), process.input):
                if pump is not None and not process.terminal:
                    pump.detour()

    def disconnected(self) -> None:
        """The host is gone: every process loses its streams and runs on."""
        self.pumps = None
        for process in self.by_id.values():
            process.outputs, process.input, process.master = {}, None, -1

    # -- what the host asks of them ------------------------------------------------------------------------

    def find(self, number: int) -> Process:
        """Raises `ProcessNotFound`."""
        try:
            return self.by_id[number]
        except KeyError:
            raise ProcessNotFound(f"there is no process {number}", process=number) from None

    def signal(self, call: Call, arguments: dict[str, Any]) -> None:
        """`process.signal`."""
        process, number = self.find(arguments["process"]), arguments["signal"]
        if not 0 <= number < trees.SIGNALS:
            raise InvalidRequest(f"{number} is not a signal", field="signal")
        if arguments["tree"]:
            delivered = self.trees.signal(process.tree, number)
        else:
            delivered = process.exit is None and self.reaper.signal(process.pid, number)
        call.reply({"delivered": delivered})

    def resize(self, call: Call, arguments: dict[str, Any]) -> None:
        """`process.resize`; harmless after the exit (B11)."""
        process = self.find(arguments["process"])
        if not process.terminal:
            raise NotATerminal(f"process {process.id} has no terminal", hint="create it with terminal=True")
        if process.master >= 0:
            terminals.resize(process.master, arguments["width"], arguments["height"])
        call.reply({})

    def release(self, call: Call, arguments: dict[str, Any]) -> None:
        """`process.release`: close its streams, forget it as soon as it has ended."""
        process = self.find(arguments["process"])
        process.close_streams()
        process.released = True
        if process.exit is not None:
            del self.by_id[process.id]
        call.reply({})

    def wait(self, call: Call, arguments: dict[str, Any]) -> None:
        """`process.wait`: answers with the exit, now or later."""
        process = self.find(arguments["process"])
        if process.exit is not None:
            call.reply(process.exit)
        else:
            call.wait_among(process.waiters)

    def list(self, call: Call, _arguments: dict[str, Any]) -> None:
        """`process.list`."""
        call.reply({"processes": [process.describe() for process in self.by_id.values() if not process.released]})


def _spawn(plan: spawn.Plan, stdio: Stdio) -> tuple[int, int]:
    """`(pid, descriptor of its report)`; -1 for the descriptor when it is the program already."""
    pid = spawn.quick(plan, stdio.theirs, stdio.terminal) if plan.plain else 0
    if pid:
        return pid, -1
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        return spawn.fork(plan, stdio.theirs, stdio.terminal, writing), reading
    except OSError:
        os.close(reading)
        raise
    finally:
        os.close(writing)


def _output_ended(process: Process, index: int) -> Callable[[int], None]:
    def ended(total: int) -> None:
        process.totals[index] = total
        if process.terminal:
            process.master = -1
            if process.input is not None:
                process.input.close()  # nobody sees what is typed there now: hang up

    return ended


class _Start:
    """A process between fork and exec, and the call that waits for its report."""

    def __init__(self, owner: Processes, call: Call, process: Process, plan: spawn.Plan, report: int) -> None:
        self._owner = owner
        self._call = call
        self._process = process
        self._plan = plan
        self._error: ByreError | None = None
        self._report = Collector(owner.loop, report, spawn.MAX_REPORT, self._reported)
        process.starting = self
        call.on_cancel = self._give_up

    def _give_up(self, error: ByreError) -> None:
        """Cancelled or too late: kill it; the answer follows its end (B15)."""
        self._error = error
        self._owner.trees.signal(self._process.tree, trees.SIGKILL)

    def _reported(self) -> None:
        """The error pipe has ended: the program runs, or the child has said why not and is about to end."""
        if not self._report.data and self._error is None:
            self._process.starting = None
            self._call.reply({"process": self._process.id, "pid": self._process.pid})

    def ended(self) -> bool:
        """The child has ended; whether it had become the program."""
        report = self._report.finish()
        if self._process.starting is None:
            return True
        error = self._error or spawn.failure(self._plan, report)
        self._process.close_streams()
        self._call.fail(error)
        return False
