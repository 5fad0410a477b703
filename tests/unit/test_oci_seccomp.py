"""The seccomp profile of a container: podman's meaning is kept, and no way leads to AF_VSOCK (B30)."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from byre.errors import InvalidRequest, ToolMissing
from byre.oci import seccomp
from byre.oci.spec import ALL_CAPABILITIES, DEFAULT_CAPABILITIES

from .oci_seccomp_vm import ALLOW, ERRNO, X86, X86_64, compiled, verdict

SOCKET, SOCKETCALL, SOCKET_32 = 41, 102, 359
NOT_A_FAMILY = ERRNO | errno.EAFNOSUPPORT
AUDIT = (*DEFAULT_CAPABILITIES, "CAP_AUDIT_WRITE")


@pytest.fixture(
    scope="module", params=[DEFAULT_CAPABILITIES, AUDIT, ALL_CAPABILITIES], ids=["default", "audit", "all"]
)
def program(request: pytest.FixtureRequest) -> bytes:
    return compiled(seccomp.evaluate(seccomp.load_profile(), capabilities=request.param))


@pytest.mark.behaviour("B30")
@pytest.mark.parametrize("family", [40, (1 << 32) + 40, (7 << 40) + 40])
@pytest.mark.parametrize("protocol", [0, 9])
def test_a_vsock_socket_is_refused(program: bytes, family: int, protocol: int) -> None:
    for last in (0, 1, 2**64 - 1):
        assert verdict(program, X86_64, SOCKET, family, 1, protocol, 0, 0, last) == NOT_A_FAMILY
    assert verdict(program, X86, SOCKET_32, 40, 1, protocol) == NOT_A_FAMILY


@pytest.mark.behaviour("B30")
def test_the_ways_around_socket_are_closed(program: bytes) -> None:
    for pointer in (0, 16, 4096):
        assert verdict(program, X86, SOCKETCALL, 1, pointer) == NOT_A_FAMILY
    for number in (425, 426, 427):  # io_uring_setup, _enter, _register: the same on every architecture
        assert verdict(program, X86_64, number) == ERRNO | errno.ENOSYS
        assert verdict(program, X86, number) == ERRNO | errno.ENOSYS


def test_other_sockets_are_open(program: bytes) -> None:
    for family in (1, 2, 10, 16, (1 << 32) + 2):
        assert verdict(program, X86_64, SOCKET, family, 1, 0) == ALLOW
    assert verdict(program, X86, SOCKET_32, 1, 1, 0) == ALLOW
    for call in range(2, 21):
        assert verdict(program, X86, SOCKETCALL, call, 4096) == ALLOW


def test_a_family_that_is_not_known_is_refused(program: bytes) -> None:
    assert verdict(program, X86_64, SOCKET, 46, 1, 0) == ERRNO | errno.ENOSYS


def test_audit_needs_its_capability() -> None:
    profile = seccomp.load_profile()
    without = compiled(seccomp.evaluate(profile, capabilities=DEFAULT_CAPABILITIES))
    granted = compiled(seccomp.evaluate(profile, capabilities=AUDIT))
    assert verdict(without, X86_64, SOCKET, 16, 3, 9) == ERRNO | errno.EINVAL
    assert verdict(granted, X86_64, SOCKET, 16, 3, 9) == ALLOW


def test_capabilities_open_their_calls() -> None:
    profile, bpf, kexec_load = seccomp.load_profile(), 321, 246
    without = compiled(seccomp.evaluate(profile, capabilities=DEFAULT_CAPABILITIES))
    granted = compiled(seccomp.evaluate(profile, capabilities=ALL_CAPABILITIES))
    assert verdict(without, X86_64, bpf) == ERRNO | errno.EPERM
    assert verdict(granted, X86_64, bpf) == ALLOW
    assert verdict(without, X86_64, kexec_load) == ERRNO | errno.EPERM


def _profile(*rules: dict[str, Any], default: str = "SCMP_ACT_ERRNO") -> dict[str, Any]:
    arches = [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86", "SCMP_ARCH_X32"]}]
    return {"defaultAction": default, "defaultErrnoRet": 38, "archMap": arches, "syscalls": list(rules)}


def _names(profile: dict[str, Any], **more: Any) -> set[str]:
    rules = seccomp.evaluate(profile, **{"capabilities": (), **more})["syscalls"]
    return {name for rule in rules for name in rule["names"] if rule["action"] == "SCMP_ACT_ALLOW"}


def test_includes_and_excludes() -> None:
    allow = {"action": "SCMP_ACT_ALLOW"}
    profile = _profile(
        {**allow, "names": ["both"], "includes": {"caps": ["CAP_A", "CAP_B"]}},
        {**allow, "names": ["unless"], "excludes": {"caps": ["CAP_A", "CAP_B"]}},
        {**allow, "names": ["arm"], "includes": {"arches": ["arm64"]}},
        {**allow, "names": ["new"], "includes": {"minKernel": "5.10"}},
    )
    assert _names(profile) == {"unless", "new"}
    assert _names(profile, capabilities=["CAP_A"]) == {"new"}
    assert _names(profile, capabilities=["CAP_A", "CAP_B"]) == {"both", "new"}
    assert _names(profile, architecture="arm64", kernel=(5, 9)) == {"unless", "arm"}


def test_a_profile_that_allows_by_default_still_refuses_vsock() -> None:
    program = compiled(seccomp.evaluate(_profile(default="SCMP_ACT_ALLOW"), capabilities=ALL_CAPABILITIES))
    assert verdict(program, X86_64, SOCKET, 40, 1, 0) == NOT_A_FAMILY
    assert verdict(program, X86, SOCKETCALL, 1, 4096) == NOT_A_FAMILY
    assert verdict(program, X86_64, 425) == ERRNO | errno.ENOSYS
    assert verdict(program, X86_64, SOCKET, 2, 1, 0) == ALLOW


def test_an_open_socket_rule_in_a_profile_does_not_open_vsock() -> None:
    rule = {"names": ["socket", "socketcall", "io_uring_setup", "read"], "action": "SCMP_ACT_ALLOW"}
    program = compiled(seccomp.evaluate(_profile(rule), capabilities=()))
    assert verdict(program, X86_64, SOCKET, 40, 1, 0) == NOT_A_FAMILY
    assert verdict(program, X86, SOCKETCALL, 1, 4096) == NOT_A_FAMILY
    assert verdict(program, X86_64, 425) == ERRNO | errno.ENOSYS
    assert verdict(program, X86_64, 0) == ALLOW


@pytest.mark.parametrize(
    "profile",
    [
        {},
        {"defaultAction": "SCMP_ACT_ALLOW"},
        {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": 3},
        {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["read"]}]},
        {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": 1, "action": "SCMP_ACT_ALLOW"}]},
    ],
)
def test_a_malformed_profile_is_a_typed_error(profile: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="seccomp profile is malformed"):
        seccomp.evaluate(profile, capabilities=())


def test_a_missing_profile_names_its_package(tmp_path: Path) -> None:
    with pytest.raises(ToolMissing, match="golang-github-containers-common"):
        seccomp.load_profile(tmp_path / "seccomp.json")
    (tmp_path / "bad.json").write_text(json.dumps([]))
    with pytest.raises(InvalidRequest):
        seccomp.load_profile(tmp_path / "bad.json")
