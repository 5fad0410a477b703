"""Parts of the OCI runtime specification that the agent writes itself: no I/O, no policy of its own.

    container_spec   the host's spec, with what only the guest knows: root, cgroup, user, home
    exec_process     the process object of an exec: the container's own, with what the request changes
    to_json          for the runtime to read

Rule: what the request does not mention is the container's: environment, directory, capabilities, limits,
no_new_privileges.  Source: runtime-spec, config.md and config-linux.md.
"""

from __future__ import annotations

from _json import encode_basestring_ascii  # `json` imports re and enum: 100 ms under emulation

from byre_proto.errors import InvalidRequest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

VERSION = "1.0.2"

#: Nested values deeper than this are refused, before the encoder runs out of stack.
MAX_DEPTH = 32

#: The five sets of capabilities(7) in a process object.
CAPABILITY_SETS = ("bounding", "effective", "permitted", "inheritable", "ambient")


def to_json(value: Any, depth: int = 0) -> str:
    """A value that came from msgpack as JSON text.  Raises `InvalidRequest`."""
    if isinstance(value, str):
        return encode_basestring_ascii(value)
    if value is None or value is True or value is False:
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (int, float)):
        return repr(value)
    if depth > MAX_DEPTH:
        raise InvalidRequest(f"the spec is nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, (list, tuple)):
        return "[" + ",".join([to_json(item, depth + 1) for item in value]) + "]"
    if isinstance(value, dict):
        items = [f"{encode_basestring_ascii(key)}:{to_json(item, depth + 1)}" for key, item in value.items()]
        return "{" + ",".join(items) + "}"
    raise InvalidRequest(f"a {type(value).__name__} cannot stand in a spec")


def check_spec(spec: dict[str, Any]) -> None:
    """Whether a container's spec has the parts that the agent works with.  Raises `InvalidRequest`."""
    for name, kind in (("process", dict), ("linux", dict), ("mounts", list), ("root", dict)):
        if not isinstance(spec.get(name, kind()), kind):
            raise InvalidRequest(f"the spec's {name} must be a {kind.__name__}", field=name)
    check_process(spec.get("process", {}))
    for mount in spec.get("mounts", []):
        if not isinstance(mount, dict) or not isinstance(mount.get("destination"), str):
            raise InvalidRequest("a mount of the spec has no destination", field="mounts")


def check_process(process: Any) -> None:
    """Whether it is a process object with a program.  Raises `InvalidRequest`."""
    if not isinstance(process, dict):
        raise InvalidRequest("an OCI process is a map", field="process")
    args, env = process.get("args"), process.get("env", [])
    if not isinstance(args, list) or not args or not all(isinstance(a, str) for a in args) or not args[0]:
        raise InvalidRequest("the process has no args", hint="give a list of strings", field="args")
    if not isinstance(env, list) or not all(isinstance(e, str) and "=" in e[1:] for e in env):
        raise InvalidRequest("the process's env is not a list of NAME=value", field="env")
    if not isinstance(process.get("cwd", "/"), str) or not process.get("cwd", "/").startswith("/"):
        raise InvalidRequest("the process's cwd must be an absolute path", field="cwd")
    if not isinstance(process.get("user", {}), dict):
        raise InvalidRequest("the process's user must be a map", field="user")
    if any("\0" in text for text in (*args, *env, process.get("cwd", "/"))):
        raise InvalidRequest("the process has a NUL character in it", field="args")


def container_spec(spec: dict[str, Any], root: str, cgroup: str, process: dict[str, Any]) -> dict[str, Any]:
    """The spec as the runtime gets it: at `root`, in `cgroup`, running `process`."""
    readonly = bool(spec.get("root", {}).get("readonly"))
    return {
        "ociVersion": VERSION,
        **spec,
        "process": process,
        "root": {"path": root, "readonly": readonly},
        "linux": {**spec.get("linux", {}), "cgroupsPath": cgroup},
    }


def joined(spec: dict[str, Any], paths: dict[str, str]) -> dict[str, Any]:
    """The spec with these namespaces, kind -> path, in the place of what it has of its own."""
    linux = spec.get("linux", {})
    own = [kind for kind in linux.get("namespaces", []) if kind.get("type") not in paths]
    others = [{"type": kind, "path": path} for kind, path in paths.items()]
    return {**spec, "linux": {**linux, "namespaces": [*own, *others]}}


def init_process(given: dict[str, Any], user: dict[str, Any] | None) -> dict[str, Any]:
    """The process object of a container's init; `user` as `users.look_up` found it, None: as given."""
    process = {"cwd": "/", "env": [], "user": {"uid": 0, "gid": 0}, **given, "terminal": False}
    process.pop("consoleSize", None)
    # The agent protects itself from the OOM killer; a container must not inherit that.
    process.setdefault("oomScoreAdj", 0)
    if user is not None:
        extra = process["user"].get("additionalGids", [])
        process["user"] = {**_user(process["user"], user), "additionalGids": sorted({*user["gids"], *extra})}
    return process


def exec_process(base: dict[str, Any], arguments: dict[str, Any], user: dict[str, Any] | None) -> dict[str, Any]:
    """The process object of an exec from `process.create`'s arguments; `base` is the container's own process."""
    if arguments["oci"] is not None:
        check_process(arguments["oci"])
        process = {"cwd": "/", "user": {"uid": 0, "gid": 0}, "oomScoreAdj": 0, **arguments["oci"]}
    else:
        process = {**base, "args": _command(arguments)}
        if arguments["env"] is not None:
            process["env"] = [f"{name}={value}" for name, value in arguments["env"].items()]
        elif user is not None:  # another user's HOME is not the container's
            process["env"] = [entry for entry in base["env"] if not entry.startswith("HOME=")]
        added = arguments["add_env"]
        kept = [entry for entry in process["env"] if entry.partition("=")[0] not in added]
        process["env"] = kept + [f"{name}={value}" for name, value in added.items()]
        process["cwd"] = arguments["cwd"] or base["cwd"]
        if user is not None:
            process["user"] = _user(base["user"], user)
        if arguments["additional_gids"]:
            gids = {*process["user"].get("additionalGids", []), *arguments["additional_gids"]}
            process["user"] = {**process["user"], "additionalGids": sorted(gids)}
        if arguments["capabilities"] is not None:
            process["capabilities"] = _capabilities(arguments["capabilities"], process["user"]["uid"])
        if arguments["rlimits"]:
            process["rlimits"] = _rlimits(base.get("rlimits", []), arguments["rlimits"])
        if arguments["no_new_privileges"]:
            process["noNewPrivileges"] = True
    process["terminal"] = arguments["terminal"]
    process.pop("consoleSize", None)
    if arguments["terminal"]:
        process["consoleSize"] = {"height": arguments["height"] or 24, "width": arguments["width"] or 80}
    check_process(process)
    return process


def _command(arguments: dict[str, Any]) -> list[str]:
    args, line = arguments["args"], arguments["command_line"]
    if bool(args) == bool(line):
        raise InvalidRequest("give either args or a command line", hint="args is a list of strings")
    return ["/bin/sh", "-c", line] if line else list(args)


def with_home(process: dict[str, Any], home: str) -> None:
    """Set HOME unless it is given.  The runtime would otherwise read the container's /etc/passwd, unprotected."""
    if not variable(process, "HOME"):
        process["env"] = [*process.get("env", []), f"HOME={home}"]


def variable(process: dict[str, Any], name: str) -> str:
    """A variable of the process's environment, of several the last; "" when it is not there."""
    prefix = f"{name}="
    values = [entry[len(prefix) :] for entry in process.get("env", []) if entry.startswith(prefix)]
    return values[-1] if values else ""


def _user(base: dict[str, Any], user: dict[str, Any]) -> dict[str, Any]:
    found = {"uid": user["uid"], "gid": user["gid"], "additionalGids": user["gids"]}
    return {**found, "umask": base["umask"]} if "umask" in base else found


def _capabilities(names: list[str], uid: int) -> dict[str, list[str]]:
    """Ambient too for an ordinary user: an exec would take them away (capabilities(7))."""
    full = [name.upper() if name.upper().startswith("CAP_") else f"CAP_{name.upper()}" for name in names]
    return dict.fromkeys(CAPABILITY_SETS if uid else CAPABILITY_SETS[:3], full)


def _rlimits(base: list[dict[str, Any]], given: list[Any]) -> list[dict[str, Any]]:
    limits = {entry["type"]: entry for entry in base}
    for entry in given:
        try:
            name, soft, hard = entry
            limits[name] = {"type": name, "soft": _limit(soft), "hard": _limit(hard)}
        except (TypeError, ValueError):
            raise InvalidRequest(
                f"{entry!r} is not a limit", hint='give ["RLIMIT_NOFILE", soft, hard]', field="rlimits"
            ) from None
    return list(limits.values())


def _limit(value: int) -> int:
    """-1 is RLIM_INFINITY, which JSON carries as the unsigned number."""
    if type(value) is not int:
        raise TypeError
    return value & ((1 << 64) - 1)
