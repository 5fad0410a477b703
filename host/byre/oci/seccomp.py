"""A seccomp profile in podman's format becomes the OCI runtime's `linux.seccomp`, for one container.

Rule: what the profile refuses stays refused, and AF_VSOCK is refused whatever the profile says: no namespace
confines it, so a container could dial the host (CID 2) and the VM's agent.  Three ways lead to a vsock socket; each
is closed:

    socket(2)        allowed family by family, comparing 32 bits as the kernel does: a rule "any family but 40"
                     passes 2**32 + 40, which the kernel takes for 40
    socketcall(2)    the 32-bit way; its arguments are behind a pointer, so its call SYS_SOCKET is refused.  32-bit
                     programs must use socket(2) itself, which Linux has since 4.3
    io_uring         IORING_OP_SOCKET passes no filter; its system calls are refused (podman's profile has none)

Order matters.  On x86 libseccomp opens socketcall(SYS_SOCKET) along with socket(2); the rule that came first wins,
so ours is the first.  A refusal of some socket(2) it takes for a conflict with that opening, unless it comes later
and looks at more arguments than the first: hence the refusals at the end, and `arg5 >= 0`, which always holds.

Sources: seccomp.json(5) of containers-common, OCI runtime-spec 1.0.2 `config-linux.md`, seccomp_rule_add(3),
socketcall(2).
"""

from __future__ import annotations

import errno
import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from byre.errors import InvalidRequest, ToolMissing

#: Debian's package golang-github-containers-common; Fedora's containers-common has it at the same place.
DEFAULT_PROFILE = Path("/usr/share/containers/seccomp.json")

_ARCHITECTURES = {"amd64": "SCMP_ARCH_X86_64", "arm64": "SCMP_ARCH_AARCH64"}
_REFUSALS = ("SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_KILL_THREAD", "SCMP_ACT_TRAP")
_AF_VSOCK = 40
#: AF_UNSPEC up to AF_MAX of Linux 6.1; a family of a later kernel is refused.
_FAMILIES = [family for family in range(46) if family != _AF_VSOCK]
#: socketcall's calls, SYS_BIND to SYS_SENDMMSG; 1 is SYS_SOCKET.
_CALLS = range(2, 21)
_EXPANDED: dict[str, Sequence[int]] = {"socket": _FAMILIES, "socketcall": _CALLS}
_IO_URING = ("io_uring_setup", "io_uring_enter", "io_uring_register")
_INT = 0xFFFFFFFF
_COMPARE = {
    "SCMP_CMP_NE": lambda x, a, b: x != a,
    "SCMP_CMP_LT": lambda x, a, b: x < a,
    "SCMP_CMP_LE": lambda x, a, b: x <= a,
    "SCMP_CMP_EQ": lambda x, a, b: x == a,
    "SCMP_CMP_GE": lambda x, a, b: x >= a,
    "SCMP_CMP_GT": lambda x, a, b: x > a,
    "SCMP_CMP_MASKED_EQ": lambda x, a, b: x & a == b,
}

Rule = dict[str, Any]


def load_profile(path: Path = DEFAULT_PROFILE) -> dict[str, Any]:
    """The profile at `path`.  Raises ToolMissing where there is none, InvalidRequest where it is no JSON object."""
    try:
        profile = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ToolMissing(
            f"the seccomp profile {path} is missing",
            hint="install the package golang-github-containers-common (Debian) or containers-common (Fedora)",
        ) from None
    except ValueError as error:
        raise InvalidRequest(f"the seccomp profile {path} is not JSON: {error}") from None
    if not isinstance(profile, dict):
        raise InvalidRequest(f"the seccomp profile {path} is not a JSON object")
    return profile


def evaluate(
    profile: dict[str, Any],
    *,
    capabilities: Collection[str],
    architecture: str = "amd64",
    kernel: tuple[int, int] = (6, 1),
) -> dict[str, Any]:
    """`linux.seccomp` for a container that has `capabilities` (CAP_… names).  Raises InvalidRequest."""
    try:
        default = profile["defaultAction"]
        rules = [rule for rule in profile["syscalls"] if _applies(rule, capabilities, architecture, kernel)]
        result = {
            "defaultAction": default,
            "architectures": _architectures(profile, architecture),
            "syscalls": [*_refused_first(default), *_confined(rules), _vsock_refused()],
        }
        if default == "SCMP_ACT_ERRNO":
            result["defaultErrnoRet"] = _errno(profile, "defaultErrnoRet", "defaultErrno")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InvalidRequest(f"the seccomp profile is malformed: {type(error).__name__} {error}") from error
    return result


def _architectures(profile: dict[str, Any], architecture: str) -> list[str]:
    native = _ARCHITECTURES[architecture]
    for entry in profile.get("archMap") or ():
        if entry["architecture"] == native:
            return [native, *(entry.get("subArchitectures") or ())]
    return [native]


def _applies(rule: Rule, capabilities: Collection[str], architecture: str, kernel: tuple[int, int]) -> bool:
    includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
    if any(name in capabilities for name in excludes.get("caps") or ()):
        return False
    if architecture in (excludes.get("arches") or ()):
        return False
    if any(name not in capabilities for name in includes.get("caps") or ()):
        return False
    if includes.get("arches") and architecture not in includes["arches"]:
        return False
    least = includes.get("minKernel")
    return not least or kernel >= tuple(int(part) for part in least.split(".")[:2])


def _confined(rules: Sequence[Rule]) -> Iterator[Rule]:
    """The rules for the runtime.  Those that open an `_EXPANDED` call are spelt out for each value that its first
    argument may have; those that refuse one come after them."""
    opened: dict[tuple[str, int, str, int | None], list[list[dict[str, int | str]]]] = {}
    refused: list[Rule] = []
    for rule in rules:
        action, args = rule["action"], rule.get("args") or []
        code = _errno(rule, "errnoRet", "errno") if action == "SCMP_ACT_ERRNO" else None
        names = list(rule.get("names") or [rule["name"]])
        sockets = sorted(set(names) & set(_EXPANDED))
        if sockets and action in _REFUSALS:
            refused.append(_rule(sockets, action, code, args))
        for name in sockets if action not in _REFUSALS else ():
            for value in _EXPANDED[name]:
                if all(_holds(arg, value) for arg in args if arg["index"] == 0):
                    rest = [arg for arg in args if arg["index"] != 0]
                    opened.setdefault((name, value, action, code), []).append(rest)
        names = [name for name in names if name not in _EXPANDED]
        if action not in _REFUSALS:
            names = [name for name in names if name not in _IO_URING]
        if names:
            yield _rule(names, action, code, args)
    for (name, value, action, code), conditions in opened.items():
        for rest in [[]] if [] in conditions else conditions:
            yield _rule([name], action, code, [_is(value), *rest])
    yield from refused


def _refused_first(default: str) -> Iterator[Rule]:
    yield _rule(["socketcall"], "SCMP_ACT_ERRNO", errno.EAFNOSUPPORT, [_is(1)])
    if default not in _REFUSALS:
        yield _rule(list(_IO_URING), "SCMP_ACT_ERRNO", errno.ENOSYS, [])


def _vsock_refused() -> Rule:
    always = {"index": 5, "value": 0, "op": "SCMP_CMP_GE"}
    return _rule(["socket"], "SCMP_ACT_ERRNO", errno.EAFNOSUPPORT, [_is(_AF_VSOCK), always])


def _is(value: int) -> dict[str, int | str]:
    """Argument 0 is `value`, as an int of the C language."""
    return {"index": 0, "value": _INT, "valueTwo": value, "op": "SCMP_CMP_MASKED_EQ"}


def _holds(arg: dict[str, Any], value: int) -> bool:
    return bool(_COMPARE[arg["op"]](value, arg["value"], arg.get("valueTwo") or 0))


def _rule(names: list[str], action: str, code: int | None, args: Sequence[dict[str, Any]]) -> Rule:
    rule: Rule = {"names": names, "action": action}
    if code is not None:
        rule["errnoRet"] = code
    if args:
        rule["args"] = [{k: v for k, v in arg.items() if v is not None} for arg in args]
    return rule


def _errno(where: dict[str, Any], number: str, name: str) -> int:
    value = where.get(number)
    return int(value) if value is not None else int(getattr(errno, where.get(name) or "EPERM"))
