"""config.json: what container users expect, from the image's defaults and the caller's wishes."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest

from byre.errors import InvalidRequest
from byre.oci import seccomp, spec
from byre.oci.image import ImageConfig
from byre.oci.spec import build_spec
from byre_proto import limits

IMAGE = ImageConfig(
    architecture="amd64",
    os="linux",
    entrypoint=("/entry", "--flag"),
    cmd=("serve",),
    env=("PATH=/image/bin", "A=1", "HOSTNAME=image"),
    user="app",
    working_dir="/srv",
    volumes=("/data",),
)
EMPTY = ImageConfig(architecture="amd64", os="linux")


def build(**wanted: Any) -> dict[str, Any]:
    return build_spec(**{"config": IMAGE, **wanted})


def environment(document: dict[str, Any]) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in document["process"]["env"])


@pytest.mark.parametrize(
    ("wanted", "command"),
    [
        ({}, ["/entry", "--flag", "serve"]),
        ({"args": ["other", "x"]}, ["/entry", "--flag", "other", "x"]),
        ({"args": []}, ["/entry", "--flag"]),
        ({"entrypoint": ["/bin/sh"]}, ["/bin/sh"]),
        ({"entrypoint": ["/bin/sh"], "args": ["-c", "x"]}, ["/bin/sh", "-c", "x"]),
        ({"entrypoint": [], "args": ["sh"]}, ["sh"]),
        ({"config": EMPTY, "args": ["sh"]}, ["sh"]),
        ({"config": None, "args": ["sh"]}, ["sh"]),
    ],
)
def test_entrypoint_and_command(wanted: dict[str, Any], command: list[str]) -> None:
    assert build(**wanted)["process"]["args"] == command


@pytest.mark.parametrize("wanted", [{"config": EMPTY}, {"config": EMPTY, "args": []}, {"entrypoint": []}])
def test_no_command_at_all(wanted: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="no command to run"):
        build(**wanted)


def test_environment() -> None:
    found = environment(build(env={"A": "2", "B": "3"}, hostname="box", terminal=True))
    assert found == {"PATH": "/image/bin", "A": "2", "B": "3", "HOSTNAME": "image", "TERM": "xterm"}
    assert environment(build(config=EMPTY, args=["x"], hostname="box")) == {
        "PATH": spec.DEFAULT_PATH,
        "HOSTNAME": "box",
    }


@pytest.mark.parametrize(
    "wanted",
    [
        {"env": {"A=B": ""}},
        {"env": {"": "x"}},
        {"env": {"A": "\0"}},
        {"args": "sh"},
        {"args": ["a\0"]},
        {"entrypoint": [""]},
        {"cwd": "relative"},
        {"capabilities": ["CAP_EVERYTHING"]},
    ],
)
def test_what_cannot_be_is_refused(wanted: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        build(**wanted)


@pytest.mark.behaviour("B30")
def test_the_defaults_confine() -> None:
    document = build(seccomp=seccomp.evaluate(seccomp.load_profile(), capabilities=spec.DEFAULT_CAPABILITIES))
    process, linux = document["process"], document["linux"]
    assert process["noNewPrivileges"] is True
    assert process["user"] == {"uid": 0, "gid": 0}
    assert set(process["capabilities"]["bounding"]) == set(spec.DEFAULT_CAPABILITIES)
    forbidden = {"CAP_SYS_ADMIN", "CAP_SYS_MODULE", "CAP_MKNOD", "CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_SYS_PTRACE"}
    assert not forbidden & {name for names in process["capabilities"].values() for name in names}
    assert process["capabilities"]["ambient"] == process["capabilities"]["inheritable"] == []
    assert {entry["type"] for entry in linux["namespaces"]} == {"pid", "ipc", "uts", "mount", "network", "cgroup"}
    assert not any("path" in entry for entry in linux["namespaces"])
    assert {"/proc/kcore", "/sys/firmware", "/proc/keys"} <= set(linux["maskedPaths"])
    assert "/proc/sys" in linux["readonlyPaths"]
    assert linux["seccomp"]["defaultAction"] == "SCMP_ACT_ERRNO"
    assert linux["resources"]["pids"] == {"limit": spec.DEFAULT_PIDS}
    assert linux["resources"]["devices"] == [{"allow": False, "access": "rwm"}]
    mounts = {mount["destination"]: mount for mount in document["mounts"]}
    assert "ro" in mounts["/sys"]["options"] and "ro" in mounts["/sys/fs/cgroup"]["options"]
    assert list(mounts)[:3] == ["/proc", "/dev", "/dev/pts"]  # a mount point comes before what is mounted below it


@pytest.mark.behaviour("B30a")
def test_privileged() -> None:
    document = build(privileged=True, seccomp={"defaultAction": "SCMP_ACT_KILL"}, no_new_privileges=False)
    assert set(document["process"]["capabilities"]["effective"]) == set(spec.ALL_CAPABILITIES)
    assert document["process"]["noNewPrivileges"] is False
    assert not {"seccomp", "maskedPaths", "readonlyPaths"} & set(document["linux"])
    assert document["linux"]["resources"]["devices"] == [{"allow": True, "access": "rwm"}]
    assert not any("ro" in mount["options"] for mount in document["mounts"])


def test_all_capabilities_are_those_of_the_kernel() -> None:
    assert len(set(spec.ALL_CAPABILITIES)) == 41  # CAP_LAST_CAP of Linux 6.1 is 40


def test_limits() -> None:
    resources = build(memory_bytes=64 << 20, cpus=1.5, pids_limit=10)["linux"]["resources"]
    assert resources["memory"] == {"limit": 64 << 20, "swap": 64 << 20}
    assert resources["cpu"] == {"quota": 150_000, "period": 100_000}
    assert resources["pids"] == {"limit": 10}
    assert build(cpus=0.000001)["linux"]["resources"]["cpu"]["quota"] == 1000
    assert not {"memory", "cpu"} & set(build(memory_bytes=-1, cpus=-1)["linux"]["resources"])
    limits_of = build(rlimits={"RLIMIT_CORE": (0, -1)})["process"]["rlimits"]
    assert limits_of == [
        {"type": "RLIMIT_CORE", "soft": 0, "hard": 2**64 - 1},
        {"type": "RLIMIT_NOFILE", "soft": 1024, "hard": 524288},
    ]


def test_capabilities_by_any_spelling() -> None:
    found = build(capabilities=["net_raw", "CAP_MKNOD"])["process"]["capabilities"]
    assert found["bounding"] == found["effective"] == found["permitted"] == ["CAP_MKNOD", "CAP_NET_RAW"]


def test_volumes_are_filled_tmpfs_and_mounts_come_last() -> None:
    bind = {"destination": "/data/x", "type": "bind", "source": "/src", "options": ["bind"]}
    mounts = build(mounts=[bind])["mounts"]
    assert [mount["destination"] for mount in mounts[-2:]] == ["/data", "/data/x"]
    assert mounts[-2]["type"] == "tmpfs" and "tmpcopyup" in mounts[-2]["options"]


def test_the_rest_is_passed_on() -> None:
    document = build(hostname="box", read_only=True, terminal=True, sysctl={"a": "1"}, cwd="/work")
    assert document["ociVersion"] == "1.0.2"
    assert document["root"]["readonly"] is True
    assert (document["hostname"], document["process"]["terminal"]) == ("box", True)
    assert document["linux"]["sysctl"] == {"net.ipv4.ping_group_range": "0 0", "a": "1"}
    assert document["process"]["cwd"] == "/work"
    assert build()["process"]["cwd"] == "/srv"
    assert build(config=EMPTY, args=["x"])["process"]["cwd"] == "/"


def test_users_and_stop_signals() -> None:
    assert (spec.effective_user(IMAGE, ""), spec.effective_user(IMAGE, "0:0"), spec.effective_user(None, "")) == (
        *("app", "0:0", ""),
    )
    named = {"": 15, "SIGQUIT": 3, "kill": 9, "37": 37, "SIGRTMIN+3": 37, "RTMIN": 34}
    for name, number in named.items():
        assert spec.stop_signal(ImageConfig(architecture="amd64", os="linux", stop_signal=name)) == number
    assert spec.stop_signal(None) == 15
    for name in ("SIGNONE", "SIGRTMIN+99", "SIGRTMIN+x", "-1"):
        with pytest.raises(InvalidRequest):
            spec.stop_signal(ImageConfig(architecture="amd64", os="linux", stop_signal=name))


def test_a_spec_fits_into_one_message() -> None:
    profile = seccomp.evaluate(seccomp.load_profile(), capabilities=spec.DEFAULT_CAPABILITIES)
    document = build(seccomp=profile)
    assert len(msgpack.packb(document)) < limits.MAX_CONTROL / 10
    assert _elements(document) < limits.MAX_ELEMENTS / 4


def _elements(value: object) -> int:
    if isinstance(value, dict):
        return 1 + sum(_elements(key) + _elements(inner) for key, inner in value.items())
    return 1 + sum(map(_elements, value)) if isinstance(value, list) else 1
