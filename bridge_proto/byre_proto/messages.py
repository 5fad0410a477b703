"""The requests and events that cross the wire, as a table: names, fields, types.

Both ends check against it: the sender so that a mistake fails alone where it was made, the receiver because the
peer may be hostile (B45).  A field that the table does not know is the sender's mistake; the receiver drops it (a
newer peer may send it).  A missing one takes its default.  `WIRE.md` is written from this table
(`python -m byre_proto.messages` prints its part).

A type is written as in Python:  ``int``, ``str?`` (or None), ``[str]``, ``{str}`` (string keys), ``any``.
A field without a default is required.
"""

from __future__ import annotations

from .errors import InvalidRequest, NotSupported, printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: Streams are named by their id; 0 means: not asked for.
_STDIO = {"stdin": ("int", 0), "stdout": ("int", 0), "stderr": ("int", 0)}

#: What one process is told to be.  `container` "" is the VM itself.  `env` None: the container's or the VM's own;
#: `add_env` is added to whichever it is.
#: `oci` is an OCI process object and replaces the other fields but the streams, `terminal` and its size.
_PROCESS = {
    **_STDIO,
    "args": ("[str]", []),
    "command_line": ("str", ""),
    "env": ("{str}?", None),
    "add_env": ("{str}", {}),
    "cwd": ("str", ""),
    "user": ("str", ""),
    "additional_gids": ("[int]", []),
    "capabilities": ("[str]?", None),
    "rlimits": ("[any]", []),  # [name, soft, hard], RLIM_INFINITY is -1
    "no_new_privileges": ("bool", False),
    "terminal": ("bool", False),
    "width": ("int", 0),
    "height": ("int", 0),
    "oci": ("any", None),
}

#: Where a socket is; `path` "" is TCP.
_ADDRESS = {"host": ("str", "127.0.0.1"), "port": ("int", 0), "path": ("str", "")}

#: How a process or a container ended.  `code` is 128+n for a death by signal n (B8), `signal` is n or 0; the byte
#: counts are what the agent read from the process's stdout and stderr, -1 while a stream is still open.
_EXIT = {"code": ("int",), "signal": ("int",), "oom": ("bool", False)}

#: What the agent writes to the console when it is quiet (`system.quiesce`).
QUIET = "byre: the agent is quiet"

#: Method -> (arguments, result).  Served by the guest's agent.
METHODS: dict[str, tuple[dict[str, tuple[Any, ...]], dict[str, tuple[Any, ...]]]] = {
    # Identity, clock and entropy of this VM, once after each first connection (B52).
    "system.configure": (
        {
            "realtime_ns": ("int", 0),
            "entropy": ("bytes", b""),
            "hostname": ("str", ""),
            "machine_id": ("str", ""),
            "log_level": ("int", 20),
        },
        {"info": ("{any}",)},
    ),
    # The machine is about to be saved: once this host has gone, the agent says so on the console and does nothing
    # until another one comes, for whatever it did every clone would do.  `freeze`: nothing else runs either, until
    # the next `system.configure` has succeeded, of this host or of a clone's.
    "system.quiesce": ({"freeze": ("bool", False)}, {}),
    "system.balloon": ({}, {}),  # its driver is loaded, where the machine has one
    "system.info": ({}, {"info": ("{any}",)}),
    "system.stacks": ({}, {"text": ("str",)}),
    "process.create": (
        {"container": ("str", ""), **_PROCESS},
        {"process": ("int",), "pid": ("int",)},
    ),
    "process.signal": (
        {"process": ("int",), "signal": ("int",), "tree": ("bool", False)},
        {"delivered": ("bool",)},
    ),
    "process.resize": ({"process": ("int",), "width": ("int",), "height": ("int",)}, {}),
    "process.release": ({"process": ("int",)}, {}),
    "process.wait": ({"process": ("int",)}, _EXIT),
    "process.list": ({}, {"processes": ("[any]",)}),
    # A process that runs an operation of the agent on files where `container` says; its streams: records.py.
    "files.start": (
        {
            "container": ("str", ""),
            "stdin": ("int", 0),
            "stdout": ("int", 0),
            "operation": ("str",),
            "path": ("str",),
            "options": ("{any}", {}),
        },
        {"process": ("int",), "pid": ("int",)},
    ),
    # A connection of the agent, where `container` says, on two streams; without streams it is only tried.  An
    # address is a `host` as a number with its `port`, or the `path` of a UNIX socket.
    "socket.connect": (
        {"container": ("str", ""), "stdin": ("int", 0), "stdout": ("int", 0), **_ADDRESS},
        {},
    ),
    # What connects there waits for an accept each.  It ends with `socket.close`, the container, the connection.
    "socket.listen": (
        {"container": ("str", ""), **_ADDRESS, "mode": ("int", 0o666)},
        {"listener": ("int",), "port": ("int",)},
    ),
    "socket.accept": ({"listener": ("int",), "stdin": ("int", 0), "stdout": ("int", 0)}, {}),
    "socket.close": ({"listener": ("int",)}, {}),
    # A layer; or, of a file system that can be written, a scratch or a volume of containers.
    "disk.mount": (
        {"target": ("int",), "lun": ("int",), "filesystem": ("str", "squashfs")},
        {"layer": ("str",)},
    ),
    "disk.unmount": ({"target": ("int",), "lun": ("int",)}, {}),
    # What was written to the disks that can be written is on them.
    "disk.sync": ({}, {}),
    # A file system whose 9P server is at the other end of two streams; `path` is where the VM will have it.  They
    # flow once a call is answered, and mounting needs them: so it is two calls.
    "share.open": ({"stdin": ("int",), "stdout": ("int",)}, {"share": ("str",), "path": ("str",)}),
    "share.mount": ({"share": ("str",), "read_only": ("bool", False), "cache": ("str", "mmap")}, {}),
    "share.unmount": ({"share": ("str",)}, {}),
    # Answered when it is gone, or (`lost`) its server is: then whatever is asked of it fails with EIO.
    "share.wait": ({"share": ("str",)}, {"lost": ("bool",)}),
    # A network card whose cable is two streams of Ethernet frames, each after its length in two bytes, big endian.
    # It is in a new network, for a container or a pod to be made with, or (`own`) in the VM's own.
    "network.open": (
        {
            "stdin": ("int",),
            "stdout": ("int",),
            "own": ("bool", False),
            "address": ("str",),  # of the card, as 10.0.2.100/24
            "gateway": ("str",),
            "nameserver": ("str",),
            "mtu": ("int",),
        },
        {"network": ("str",)},
    ),
    "network.close": ({"network": ("str",)}, {}),
    "container.create": (
        {
            "container": ("str",),
            "spec": ("{any}",),
            "layers": ("[str]", []),  # lowest first, as disk.mount named them
            "root_share": ("str", ""),  # in the place of layers
            "shares": ("[str]", []),  # that are the container's from now on, and go with it
            "scratch": ("str", ""),  # the disk for what it writes, as disk.mount named it; "" is a tmpfs
            "scratch_bytes": ("int", 0),  # of the tmpfs
            "lease": ("str", ""),  # of its disks; container.deleted gives it back
            "user": ("str", ""),
            "stop_signal": ("int", 15),
            "pod": ("str", ""),
            "network": ("str", ""),  # that is the container's from now on, and goes with it; "" leads nowhere
        },
        {},
    ),
    "container.init": (
        {
            "container": ("str",),
            **_STDIO,
            "terminal": ("bool", False),
            "width": ("int", 0),
            "height": ("int", 0),
        },
        {"process": ("int",), "pid": ("int",)},
    ),
    "container.start": ({"container": ("str",)}, {"pid": ("int",)}),
    "container.shutdown": ({"container": ("str",)}, {}),
    "container.terminate": ({"container": ("str",)}, {}),
    "container.delete": ({"container": ("str",)}, {}),
    "container.wait": ({"container": ("str",)}, _EXIT),
    "container.list": ({}, {"containers": ("[any]",)}),
    "container.state": ({"container": ("str",)}, {"state": ("{any}",)}),
    "container.processes": ({"container": ("str",)}, {"processes": ("[any]",)}),
    "container.stats": ({"container": ("str",)}, {"stats": ("{any}",)}),
    "container.update": ({"container": ("str",), "resources": ("{any}",)}, {}),
    # What containers share: network, IPC, host name; processes where `share_pid`; `resources` are all theirs.
    "pod.create": (
        {
            "pod": ("str",),
            "hostname": ("str", ""),
            "share_pid": ("bool", False),
            "resources": ("{any}", {}),
            "network": ("str", ""),  # as a container's
        },
        {},
    ),
    # With `force` its containers are killed and deleted; without it they have to have ended.
    "pod.delete": ({"pod": ("str",), "force": ("bool", False)}, {}),
    "pod.list": ({}, {"pods": ("[any]",)}),
    # From byte `start` of all that it has written: what is kept, after `dropped` bytes that are gone.  With `wait`
    # the answer comes when there is more than that, or has `ended`.
    "container.log": (
        {"container": ("str",), "start": ("int", 0), "wait": ("bool", False)},
        {"data": ("bytes",), "dropped": ("int",), "ended": ("bool", False)},
    ),
    # A live mount in its mount namespace: of `source` in the VM, or of the mounted disk `layer`, or a tmpfs of
    # `size_bytes`.  A path is resolved with the container's root for its "/"; what is missing of it is made.
    "container.mount": (
        {
            "container": ("str",),
            "destination": ("str",),
            "source": ("str", ""),
            "layer": ("str", ""),
            "size_bytes": ("int", 0),
            "read_only": ("bool", True),
        },
        {},
    ),
    # The result is what it had been mounted with.
    "container.unmount": (
        {"container": ("str",), "destination": ("str",)},
        {"source": ("str", ""), "layer": ("str", ""), "size_bytes": ("int", 0), "read_only": ("bool", True)},
    ),
}

#: Served by the keeper of a detached VM, which passes every other method on to the agent.
METHODS.update(
    {
        "vm.info": ({}, {"info": ("{any}",)}),
        "vm.attach_disk": ({"path": ("str",)}, {"target": ("int",), "lun": ("int",)}),
        "vm.detach_disk": ({"path": ("str",)}, {}),
        # A disk that a container may write, attached and mounted until all that hold it have dropped it: the volume
        # in the directory `path`, or with "" a scratch of its own of `size` bytes.
        "vm.hold_disk": (
            {"lease": ("str",), "container": ("str",), "path": ("str", ""), "size": ("int", 0)},
            {"disk": ("str",)},
        ),
        "vm.drop_disks": ({"lease": ("str",)}, {}),
        # Forwards that live as long as the container, or the VM: `host` here leads to `guest` there.
        "vm.publish": ({"container": ("str", ""), "host": ("str",), "guest": ("str",)}, {"host": ("str",)}),
        "vm.unpublish": ({"host": ("str",)}, {}),
        "vm.ports": ({}, {"ports": ("[any]",)}),
        # A directory of this host; its server is the keeper's.
        "vm.share": (
            {"directory": ("str",), "read_only": ("bool", False), "cache": ("str", "mmap")},
            {"share": ("str",), "path": ("str",)},
        ),
        # As network.open, with the keeper at the cable's other end.
        "vm.network": ({"own": ("bool", False)}, {"network": ("str",)}),
        "vm.console": ({"lines": ("int", 40)}, {"text": ("str",)}),
        # Its events after the number `after`, when there are any; at once, without any, for -1.  `last` is the
        # number of the last one that has happened.
        "vm.events": ({"after": ("int", -1)}, {"events": ("[any]",), "last": ("int",)}),
        "vm.pause": ({}, {}),
        # What the guest has then, and what the emulator held of its host's memory, in bytes.
        "vm.reclaim": (
            {"memory_mib": ("int",)},
            {"memory": ("int",), "resident_before": ("int",), "resident_after": ("int",)},
        ),
        "vm.resume": ({}, {}),
        "vm.shutdown": ({"patience_ms": ("int?", None)}, {}),  # then by force
        # The processes that this client creates are killed, with their trees, when its connection ends.
        "vm.tie": ({}, {}),
        # The container is deleted as soon as it has ended.
        "vm.remove_at_exit": ({"container": ("str",)}, {}),
    }
)

#: Event -> fields.
EVENTS: dict[str, dict[str, tuple[Any, ...]]] = {
    "process.exit": {"process": ("int",), **_EXIT, "stdout": ("int", -1), "stderr": ("int", -1)},
    "container.created": {"container": ("str",)},
    "container.started": {"container": ("str",), "pid": ("int",)},
    "container.killed": {"container": ("str",), "signal": ("int",)},  # it was asked to end, by this signal
    "container.exit": {"container": ("str",), **_EXIT},
    "container.deleted": {"container": ("str",), "lease": ("str", "")},
    # Since the last such event so many processes were killed for want of memory; so many forks were refused.
    "container.oom": {"container": ("str",), "kills": ("int", 1)},
    "container.pids": {"container": ("str",), "refused": ("int", 1)},
    "vm.exit": {"reason": ("str",)},
}

#: Kinds that their type alone makes sure of.
_SIMPLE: dict[str, type] = {"str": str, "bytes": bytes, "bool": bool}
_KINDS: dict[str, type] = {"int": int, "str": str, "bytes": bytes, "bool": bool}


def streams_named(arguments: dict[str, Any]) -> list[int]:
    """The streams that a request's checked arguments name."""
    return [arguments[field] for field in _STDIO if arguments.get(field)]


def check_arguments(method: str, arguments: dict[str, Any], *, strict: bool = False) -> dict[str, Any]:
    """The arguments with defaults filled in; `strict` (the sender): unknown fields are refused, not dropped.

    Raises `NotSupported` (B46), `InvalidRequest`.
    """
    if method not in METHODS:
        raise NotSupported(f"the method {printable(method)[:80]!r} is not known here", method=method[:80])
    return _check(method, METHODS[method][0], arguments, strict)


def check_result(method: str, result: dict[str, Any], *, strict: bool = False) -> dict[str, Any]:
    """The result of `method`, checked in the same way."""
    return _check(method, METHODS[method][1], result, strict)


def check_event(name: str, fields: dict[str, Any], *, strict: bool = False) -> dict[str, Any]:
    """The fields of an event.  Raises `NotSupported`, `InvalidRequest`."""
    if name not in EVENTS:
        raise NotSupported(f"the event {printable(name)[:80]!r} is not known here")
    return _check(name, EVENTS[name], fields, strict)


def _check(name: str, table: dict[str, tuple[Any, ...]], given: dict[str, Any], strict: bool) -> dict[str, Any]:
    if strict and not given.keys() <= table.keys():
        unknown = sorted(given.keys() - table.keys(), key=str)
        raise InvalidRequest(f"{name} has no field {printable(str(unknown[0]))[:80]!r}")
    checked = {}
    for field, spec in table.items():
        if field in given:
            value = given[field]
            if type(value) is not _SIMPLE.get(spec[0]) and not fits(value, spec[0]):
                raise InvalidRequest(f"{name}: {field} must be {spec[0]}, not {type(value).__name__}", field=field)
            checked[field] = value
        elif len(spec) == 2:
            default = spec[1]
            checked[field] = [] if default == [] else default  # a list of its own: callers may append to theirs
        else:
            raise InvalidRequest(f"{name}: {field} is missing", field=field)
    return checked


def fits(value: object, kind: str) -> bool:
    """Whether a value is of a kind of the table."""
    if kind == "any":
        return True
    if kind[-1] == "?":
        return value is None or fits(value, kind[:-1])
    if kind[0] == "[":
        return isinstance(value, (list, tuple)) and all(fits(item, kind[1:-1]) for item in value)
    if kind[0] == "{":
        inner = kind[1:-1]
        return isinstance(value, dict) and all(isinstance(k, str) and fits(v, inner) for k, v in value.items())
    if kind == "int":
        return type(value) is int and -(1 << 63) <= value < 1 << 64
    return isinstance(value, _KINDS[kind])


def describe() -> str:
    """The table as Markdown, for WIRE.md."""

    def fields(table: dict[str, tuple[Any, ...]]) -> str:
        return ", ".join(f"`{n}` {s[0]}" + (f" = {s[1]!r}" if len(s) == 2 else "") for n, s in table.items()) or "-"

    lines = ["| method | arguments | result |", "|---|---|---|"]
    lines += [f"| `{name}` | {fields(a)} | {fields(r)} |" for name, (a, r) in METHODS.items()]
    lines += ["", "| event | fields |", "|---|---|"]
    lines += [f"| `{name}` | {fields(table)} |" for name, table in EVENTS.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    import sys

    sys.stdout.write(describe())
