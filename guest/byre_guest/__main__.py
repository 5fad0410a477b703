"""Starts the agent: as PID 1 of a VM, or as an ordinary program.

    python3 -I -S -E -X utf8 agent.pyc    in the VM: PID 1 finds its channel itself
    python3 -m byre_guest --fd N          over an inherited socket, N
    python3 -m byre_guest --stdio         over stdin and stdout (SSH)
    python3 -m byre_guest --serial DEVICE [BAUD]     over a serial line, for one host after the other
    python3 -m byre_guest --listen PATH              over a UNIX socket that hosts dial, one after the other

As an ordinary program it ends with its channel, or when it is told to, and everything that it started ends with it.
As PID 1 it goes on and takes the next connection; when it cannot go on, the VM ends, and the console says why.
"""

from __future__ import annotations

import gc
import os
import sys
from time import monotonic

from byre_proto.errors import NotSupported
from byre_proto.messages import QUIET

from . import channels, init, linux, logs, reserve, scheduling, spawn, trees
from .loop import EPOLLHUP, EPOLLIN, Loop
from .processes import Processes
from .reaper import Reaper
from .server import Server
from .signals import signals
from .system import System

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import Any, NoReturn

    from .channels import Channel
    from .freezer import Freezer
    from .server import Call

#: A round of the loop that takes longer shows its stack on stderr (a VM's console), and again each time it passes.
WATCHDOG_SECONDS = 20.0

#: Between two attempts to reach the host by vsock, growing from the first to the second.
REDIAL_SECONDS = (0.05, 2.0)

#: As PID 1: how long after its start the agent settles, unless it has more to do than a first process before that.
SETTLE_SECONDS = 1.0

#: Between two looks whether all children have ended, before the agent falls quiet.
QUIET_SECONDS = 0.02

#: New objects before the collector runs.  It must run, for the cycles of ended processes; each run costs, though.
GC_THRESHOLD = 5000

#: Freed memory that the agent keeps for its buffers: a few times what waits to be sent at most.
KEPT_MEMORY = 4 * 1024 * 1024


class Agent:
    """The parts, put together; what differs between a VM's init and an ordinary program is here."""

    def __init__(self, timeline: init.Timeline | None = None) -> None:
        self.timeline = timeline
        self.logs = logs.Logs()
        self.loop = Loop(lambda error: self.logs.failure("an error of the agent itself", error))
        self.reaper = Reaper(self.loop, self._on_signal)
        self.processes = Processes(self.loop, self.reaper, self._emit)
        self.server = Server(self.loop, self.reaper, self.logs, self.processes, self._dropped)
        self._channel: Channel | None = None
        self._dial: tuple[int, int] | None = None
        self._listener: socket.socket | None = None
        self._redial_in = REDIAL_SECONDS[0]
        self._unsettled = {"system.configure", "process.create"}
        self.server.before_request = self._before_request
        self._quiescing = False  # the host has asked for it, and has not gone yet
        self._freezer: Freezer | None = None
        system, processes = System(self.logs, timeline, self._go_on), self.processes
        self.server.handlers.update(
            {
                "system.configure": system.configure,
                "system.quiesce": self._quiesce,
                "system.balloon": system.balloon,
                "system.info": system.info,
                "system.stacks": system.stacks,
                "process.create": processes.create,
                "process.signal": processes.signal,
                "process.resize": processes.resize,
                "process.release": processes.release,
                "process.wait": processes.wait,
                "process.list": processes.list,
            }
        )

    def settle(self) -> None:
        """Do what the first process of a VM does without, and need not wait for.  Harmless when repeated."""
        if self.server.before_request is None:
            return
        self.server.before_request = None
        spawn.settle()
        self.reaper.listen()
        reserve.LENT.keep()
        self.loop.watch_over = Watchdog().watch
        linux.keep_freed_memory(KEPT_MEMORY)
        if self.timeline is not None:
            scheduling.let_others_first()
            self.logs.follow_kernel(self.loop)
        gc.freeze()  # what is there now stays: no need to look at it again
        gc.set_threshold(GC_THRESHOLD)
        gc.enable()  # off until here, in a VM

    def _before_request(self, method: str) -> None:
        """A VM's first request that is not one for identity or a process, or is the second such, settles it."""
        if method in self._unsettled:
            self._unsettled.remove(method)
        else:
            self.settle()

    def attach(self, channel: Channel, secret: bytes | None = None) -> None:
        """Serve the host at the other end of the channel."""
        self._channel = channel
        channel.watch(self.loop, self._on_channel)
        if not channel.port or channels.has_host(channel.read_fd):
            self.server.connect(channel, secret)

    def _on_channel(self, mask: int) -> None:
        channel = self._channel
        if channel is None:
            return
        if channel.port and not self.server.connected:
            if mask & EPOLLHUP:
                self._quiet()
            elif not self._quiescing:
                self.server.connect(channel, None)  # a host has opened the port
        self.server.on_channel()

    def _quiesce(self, call: Call, arguments: dict[str, Any]) -> None:
        """`system.quiesce`: this host will go, and the next one may be a clone's."""
        if self.timeline is None:
            raise NotSupported("this agent is no VM's init: its machine is not one to be saved")
        if arguments["freeze"]:
            from . import freezer  # here: no template needs it

            self._freezer = self._freezer or freezer.Freezer(self.server)
            self._freezer.freeze(call, self._expect_another_host)
        elif not self.reaper.idle:  # what its helpers do now, each clone would do
            self.loop.call_later(QUIET_SECONDS, lambda: self._quiesce(call, arguments))
        else:
            self.processes.trees.make_ahead()
            self._expect_another_host()
            call.reply({})

    def _expect_another_host(self) -> None:
        self._quiescing = True

    def _go_on(self) -> None:
        """A host has made this machine what it is to be: the one that was there, or a clone's."""
        self._quiescing = False
        if self._freezer is not None:
            self._freezer.thaw()

    def _quiet(self) -> None:
        """The host has gone: from here on the machine may be saved."""
        if self._quiescing:
            self._quiescing = False
            init.say(QUIET)

    def dial(self, cid: int, port: int) -> None:
        """Connect to the host by vsock; and again when it is not there, as after the restore of a snapshot.

        A clone's host listens at another port, so it is looked up each time.
        """
        self._dial = (cid, port)
        try:
            channel = channels.dial(*(channels.vsock_address() or self._dial))
        except OSError as error:
            self.logs.log(logs.DEBUG, f"vsock {cid}:{port}: {error}")
            self.loop.call_later(self._redial_in, lambda: self.dial(cid, port))
            self._redial_in = min(self._redial_in * 2, REDIAL_SECONDS[1])
            return
        self._redial_in = REDIAL_SECONDS[0]
        self.attach(channel, channels.read_secret())
        self._quiet()  # a clone's kernel resets this connection, which makes the agent dial anew

    def listen(self, listener: socket.socket) -> None:
        """Serve the hosts that dial this socket, one after the other."""
        self._listener = listener
        self.loop.add(listener.fileno(), EPOLLIN, lambda _mask: self._accept(listener))

    def _accept(self, listener: socket.socket) -> None:
        channel = channels.accept(listener)
        if channel is not None:
            self.loop.remove(listener.fileno())
            self.attach(channel)

    def _dropped(self) -> None:
        """The connection is over."""
        channel = self._channel
        assert channel is not None
        if channel.port:
            channel.forget()
            if not channels.has_host(channel.read_fd):
                self._quiet()
            elif not self._quiescing:  # another one already: there will be no edge for it
                self.server.connect(channel, None)
            return
        if channel.renew():
            self.server.connect(channel, None)
            self._quiet()  # a clone's host begins anew on the line
            return
        self._channel = None
        channel.close()
        if self._dial is not None:
            self.dial(*self._dial)
        elif self._listener is not None:
            self.listen(self._listener)
        else:
            self.loop.stop()

    def _on_signal(self, number: int) -> None:
        if self.timeline is not None:
            if number != signals.SIGHUP:  # a terminal's end means nothing to an init
                init.fatal(f"it was asked to, by signal {number}")
        elif number != signals.SIGINT:  # typed into the host's terminal: the host's to handle
            self.loop.stop()

    def _emit(self, name: str, fields: dict[str, Any]) -> None:
        self.server.event(name, fields)

    def run(self) -> None:
        """Serve until the end."""
        self.loop.run()

    def close(self) -> None:
        """As an ordinary program: nothing that was started stays."""
        self.processes.trees.kill_all()
        self.reaper.wait_for_all()


class Watchdog:
    """A timer that only a stuck round lets expire; its signal is handled in C and prints the stack (B49)."""

    def __init__(self) -> None:
        import faulthandler

        faulthandler.register(signals.SIGALRM, file=2, all_threads=False)
        self._set_until = 0.0  # setting it again costs more than asking the clock

    def watch(self, busy: bool) -> None:
        """A round begins, or the loop sleeps."""
        if not busy:
            signals.setitimer(signals.ITIMER_REAL, 0)
            self._set_until = 0.0
            return
        now = monotonic()
        if now >= self._set_until:
            signals.setitimer(signals.ITIMER_REAL, WATCHDOG_SECONDS, WATCHDOG_SECONDS)
            self._set_until = now + WATCHDOG_SECONDS / 4


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the agent; does not return."""
    if os.getpid() == 1:
        _run_init()
    arguments = sys.argv[1:] if arguments is None else arguments
    channel: Channel | None = None
    listener: socket.socket | None = None
    if len(arguments) == 2 and arguments[0] == "--fd" and arguments[1].isdigit():
        fd = int(arguments[1])
        channel = channels.Channel(fd, fd)
    elif len(arguments) == 2 and arguments[0] == "--listen":
        listener = _listen(arguments[1])
    elif arguments == ["--stdio"]:
        channel = channels.Channel(os.dup(0), os.dup(1))
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
    elif 2 <= len(arguments) <= 3 and arguments[0] == "--serial":
        channel = _serial_channel(*arguments[1:])
    else:
        sys.exit("usage: byre_guest --fd N | --stdio | --serial DEVICE [BAUD] | --listen PATH")
    own_descriptors()
    os.umask(0o022)
    agent = Agent()
    agent.settle()
    if channel is not None:
        agent.attach(channel)
    if listener is not None:
        agent.listen(listener)
    try:
        agent.run()
    finally:
        agent.close()
        if listener is not None:
            os.unlink(arguments[1])
    sys.exit(0)


def _serial_channel(device: str, baud: str = "") -> Channel:
    from . import serial_line  # here: what it and the line need costs the other channels nothing

    try:
        return serial_line.open_tty(device, baud)
    except (OSError, ValueError) as error:
        sys.exit(f"byre_guest: {error}")


def _listen(path: str) -> socket.socket:
    try:
        return channels.listen(path)
    except OSError as error:
        sys.exit(f"byre_guest: {path}: {error.strerror}")


def own_descriptors() -> None:
    """What the agent has inherited is not for its children: no child closes anything, exec does."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            try:
                os.set_inheritable(int(name), False)
            except OSError:
                pass  # the listing's own


def _run_init() -> NoReturn:
    try:
        timeline = init.Timeline()
        timeline.done("agent imported")
        init.set_environment()
        channel = init.channel(timeline)
        agent = Agent(timeline)
        agent.processes.trees.use_cgroups(trees.VM_PROCESSES, f"{init.CGROUPS}/agent")
        kind, _, address = channel.partition(":")
        if kind == "vsock":
            cid, _, port = address.partition(":")
            agent.dial(int(cid), int(port))
        elif kind == "serial":
            device, _, baud = address.partition(":")
            agent.attach(_serial_channel(f"/dev/{device}", baud))
        else:
            agent.attach(channels.open_port())
        timeline.done("channel open")
        agent.loop.call_later(SETTLE_SECONDS, agent.settle)
        agent.run()
        reason = "its loop has ended"
    except BaseException as error:
        reason = logs.describe(error)
    init.fatal(reason)
    sys.exit(1)


if __name__ == "__main__":
    main()
