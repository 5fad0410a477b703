"""`system.*`: identity, clock and entropy of this machine; what it is; where everybody stands (B49, B52).

Rule: only a VM's own init changes the machine it runs on; as an ordinary program it refuses.  A step of `configure`
that fails, fails the call: a clone with its template's random numbers must not go on as if all were well.
"""

from __future__ import annotations

import os
import sys
from time import CLOCK_BOOTTIME, CLOCK_REALTIME, clock_gettime, clock_settime_ns

from byre_proto.errors import ByreError, InvalidRequest, NotSupported

from . import VERSION, linux, trees

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .init import Timeline
    from .logs import Logs
    from .server import Call

MACHINE_ID = "/run/machine-id"
MACHINE_ID_LENGTH = 32

#: Host names of Linux (uname(2)) have at most this many bytes.
MAX_HOSTNAME = 64

#: For a driver to be loaded, in seconds: some milliseconds, mostly.
DRIVER_TIMEOUT = 30.0

#: Bytes of stacks in one answer: those of a few hundred processes.
MAX_STACKS = 256 * 1024


class System:
    """Handlers of `system.*`.  `timeline` is there when the agent is a VM's init; `configured()` is called when
    every step of a `configure` has succeeded."""

    def __init__(self, logs: Logs, timeline: Timeline | None, configured: Callable[[], object]) -> None:
        self._logs = logs
        self._configured = configured
        self._timeline = timeline
        self._constant: dict[str, Any] | None = None  # looked up once

    def configure(self, call: Call, arguments: dict[str, Any]) -> None:
        """`system.configure`: every step that was asked for, or the error of the first that failed."""
        steps = (
            ("clock", arguments["realtime_ns"], set_clock),
            ("entropy", arguments["entropy"], linux.add_entropy),
            ("host name", arguments["hostname"], set_hostname),
            ("machine id", arguments["machine_id"], set_machine_id),
        )
        for name, value, step in steps:
            if not value:
                continue
            if self._timeline is None:
                raise NotSupported(f"this agent is no VM's init: it does not set the {name} of its machine")
            try:
                step(value)
            except OSError as error:
                raise ByreError(f"the {name} of the VM could not be set: {error}", step=name) from error
        self._logs.level = arguments["log_level"]
        self._configured()
        call.reply({"info": self._describe()})

    def info(self, call: Call, _arguments: dict[str, Any]) -> None:
        """`system.info`."""
        call.reply({"info": self._describe()})

    def balloon(self, call: Call, _arguments: dict[str, Any]) -> None:
        """`system.balloon`: from now on this machine can give memory back."""
        if self._timeline is None:
            raise NotSupported("this agent is no VM's init: it loads no driver")
        from . import children, storage

        def loaded(_result: object, error: ByreError | None) -> None:
            call.reply({}) if error is None else call.fail(error)

        server = call.server
        children.run(server.loop, server.reaper, lambda: storage.need("virtio_balloon"), DRIVER_TIMEOUT, loaded)

    def _describe(self) -> dict[str, Any]:
        if self._constant is None:
            self._constant = self._describe_constant()
        return {
            **self._constant,
            "hostname": os.uname().nodename,
            "uptime_s": clock_gettime(CLOCK_BOOTTIME),
            # [name, seconds of the monotonic clock at which this step of the boot was done]
            "boot": [list(step) for step in self._timeline.steps] if self._timeline else [],
        }

    def _describe_constant(self) -> dict[str, Any]:
        uname = os.uname()
        return {
            "agent": VERSION,
            "pid": os.getpid(),
            "kernel": uname.release,
            "machine": uname.machine,
            "python": sys.version.split()[0],
            "cpus": len(os.sched_getaffinity(0)),
            "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            "is_vm": self._timeline is not None,
        }

    def stacks(self, call: Call, _arguments: dict[str, Any]) -> None:
        """`system.stacks`: the agent's own stack, and where each process is in the kernel."""
        pids = _all_pids() if self._timeline is not None else sorted(trees.descendants(os.getpid()))
        text = f"agent {os.getpid()}:\n{own_stack()}"
        for pid in pids:
            if len(text) > MAX_STACKS:
                text += "... and more\n"
                break
            text += kernel_stack(pid)
        call.reply({"text": text})


def set_clock(realtime_ns: int) -> None:
    """CLOCK_REALTIME, from nanoseconds since 1970."""
    clock_settime_ns(CLOCK_REALTIME, realtime_ns)


def set_hostname(name: str) -> None:
    """Raises `InvalidRequest` for what is no host name (hostname(7))."""
    if len(name) > MAX_HOSTNAME or not name.isascii() or not name.replace("-", "").replace(".", "").isalnum():
        raise InvalidRequest(f"{name[:80]!r} is not a host name", field="hostname")
    linux.sethostname(name)


def set_machine_id(machine_id: str) -> None:
    """/etc/machine-id, which is a link to here.  Raises `InvalidRequest`; format: machine-id(5).

    Written over in one piece: whoever reads it sees the old one or the new one, for they have the same length.
    """
    if len(machine_id) != MACHINE_ID_LENGTH or set(machine_id) - set("0123456789abcdef"):
        raise InvalidRequest("a machine id is 32 lower-case hexadecimal digits", field="machine_id")
    fd = os.open(MACHINE_ID, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o444)
    try:
        os.write(fd, f"{machine_id}\n".encode())
    finally:
        os.close(fd)


def own_stack() -> str:
    """Where the agent's Python is."""
    import faulthandler

    fd = os.memfd_create("stack")
    try:
        faulthandler.dump_traceback(fd, all_threads=False)
        return os.pread(fd, MAX_STACKS, 0).decode(errors="replace")
    finally:
        os.close(fd)


def _all_pids() -> list[int]:
    return sorted(int(name) for name in os.listdir("/proc") if name.isdigit())


def kernel_stack(pid: int) -> str:
    """Name, state, wait channel and kernel stack of a process, as far as it may be read; "" when it is gone.

    Nothing that needs the process's memory is read (its command line would): a stuck one would hold us up.
    """
    stat = _read(f"/proc/{pid}/stat")
    if not stat:
        return ""
    state = stat.rpartition(")")[2].split()[0]
    head = f"{pid} {_read(f'/proc/{pid}/comm').strip()} {state} {_read(f'/proc/{pid}/wchan')}\n"
    return head + "".join(f"    {line}\n" for line in _read(f"/proc/{pid}/stack").splitlines())


def _read(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return file.read().decode(errors="replace")
    except OSError:
        return ""
