"""What the interfaces take: the configuration of processes and containers, signals, requests to `modify`.

Plain frozen records, checked when they are made; nothing here talks to a VM.
"""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from .errors import InvalidRequest

#: A signal as an int, a `signal.Signals`, or a name with or without "SIG".
Signal: TypeAlias = int | str | signal.Signals

#: The `process` object of an OCI runtime specification (config.md, "Process").
OCIProcess: TypeAlias = Mapping[str, Any]

#: Highest signal number of Linux (SIGRTMAX).
MAX_SIGNAL = 64


def signal_number(value: Signal) -> int:
    """The number of a signal; 0 probes (B7).  Raises `InvalidRequest`."""
    if isinstance(value, str):
        name = value.upper()
        if name.isdecimal():
            value = int(name)
        else:
            name = name if name.startswith("SIG") else f"SIG{name}"
            try:
                return signal.Signals[name].value
            except KeyError:
                raise InvalidRequest(
                    f"{value!r} is not a signal", hint="use a name such as TERM or a number"
                ) from None
    if isinstance(value, bool) or not 0 <= value <= MAX_SIGNAL:
        raise InvalidRequest(f"{value!r} is not a signal", hint=f"signals are 0 to {MAX_SIGNAL}")
    return int(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessParameters:
    """One process (B14).  Of `args` and `command_line` exactly one is given.

    args            program and arguments; the program is looked up in the PATH of `env` where it has no slash
    command_line    one string, given to ``/bin/sh -c``
    env             the whole environment; None: that of the container or the VM
    add_env         variables that are added to it, or replace some of it
    cwd             working directory; "": that of the container, or / in the VM
    user            ``uid``, ``uid:gid``, ``name`` or ``name:group``, looked up where the process runs
    additional_gids supplementary groups, beside those of the group file
    capabilities    names such as CAP_NET_ADMIN that the process keeps; None: the container's, or all for root
    rlimits         RLIMIT name -> (soft, hard); -1 is unlimited
    no_new_privileges  prctl(2) PR_SET_NO_NEW_PRIVS
    terminal        a pseudo-terminal is its stdin, stdout and stderr; `stdout` carries its output (B12)
    width, height   size of the terminal in characters, set before the program starts
    stdin, stdout, stderr  which streams to create; one that is not asked for is /dev/null
    """

    args: Sequence[str] = ()
    command_line: str = ""
    env: Mapping[str, str] | None = None
    add_env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    cwd: str = ""
    user: str = ""
    additional_gids: Sequence[int] = ()
    capabilities: Sequence[str] | None = None
    rlimits: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    no_new_privileges: bool = False
    terminal: bool = False
    width: int = 80
    height: int = 24
    stdin: bool = False
    stdout: bool = False
    stderr: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.args, str):
            raise InvalidRequest("args is a sequence of strings", hint="use command_line= for a shell command")
        if bool(self.args) == bool(self.command_line):
            raise InvalidRequest("exactly one of args and command_line is needed")
        texts = [*self.args, self.command_line, self.cwd, self.user]
        variables = {**(self.env or {}), **self.add_env}
        texts += [part for pair in variables.items() for part in pair]
        if any("\0" in text for text in texts):
            raise InvalidRequest("a string of the process holds a NUL byte")
        if any("=" in name or not name for name in variables):
            raise InvalidRequest("the name of an environment variable is empty or holds '='")
        if self.terminal and self.stderr:
            raise InvalidRequest("a terminal has one merged output stream", hint="leave stderr out")
        check_size(self.width, self.height)


def check_size(width: int, height: int) -> None:
    """Whether a terminal can be of this size (struct winsize has 16 bits).  Raises `InvalidRequest`."""
    if not (0 <= width < 1 << 16 and 0 <= height < 1 << 16):
        raise InvalidRequest(f"a terminal cannot be {width} x {height}", hint="0 to 65535 in each direction")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resources:
    """Limits of a container.  None leaves a limit as it is; -1 removes it.

    memory_bytes    memory.max (and memory.swap.max 0: a container does not swap)
    cpus            processors' worth of time, 0.5 is half a one (cpu.max)
    pids            pids.max
    """

    memory_bytes: int | None = None
    cpus: float | None = None
    pids: int | None = None

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "cpus", "pids"):
            value = getattr(self, name)
            if value is not None and (value != -1 and value <= 0):
                raise InvalidRequest(f"{name} must be above 0, or -1 for no limit; not {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateResources:
    """`Container.modify`: set limits live (B28)."""

    resources: Resources


@dataclasses.dataclass(frozen=True, kw_only=True)
class AddMount:
    """`Container.modify`: a mount in a container that runs; what is missing of `destination` is made.

    source      a file or directory of the VM; or
    size_bytes  of a new tmpfs
    """

    destination: str
    source: str = ""
    size_bytes: int = 0
    read_only: bool = False

    def __post_init__(self) -> None:
        if bool(self.source) == (self.size_bytes > 0):
            raise InvalidRequest("exactly one of source and size_bytes (above 0) is needed")
        if self.source and not self.source.startswith("/"):
            raise InvalidRequest(f"the source {self.source!r} is not an absolute path of the VM")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AddDisk:
    """`Container.modify`: an image of this host (squashfs), attached to the VM and mounted, read-only."""

    path: str
    destination: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class RemoveMount:
    """`Container.modify`: undo an `AddMount` or `AddDisk`.  Raises `MountInUse` (B61)."""

    destination: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class AddPort:
    """`Container.modify`: as `UtilityVM.publish`; both are an `Address` or what makes one.  `host` has a number."""

    host: str
    guest: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class RemovePort:
    """`Container.modify`: as `UtilityVM.unpublish`."""

    host: str


#: What `Container.modify` takes, one of them or several; for every other kind it raises `NotSupported`.
ModifyRequest: TypeAlias = UpdateResources | AddMount | AddDisk | RemoveMount | AddPort | RemovePort


class Step(NamedTuple):
    """One change of a plan.  `how`: "live"; or "restart", or "unsupported", and why."""

    change: object
    how: str
    reason: str = ""


#: What `modify` would do, or has done: a step for each change, in the order in which they were given.
Plan: TypeAlias = tuple[Step, ...]

#: What `create_process` takes (B20, B21): None is a container's init.
ProcessConfig: TypeAlias = ProcessParameters | OCIProcess | None
