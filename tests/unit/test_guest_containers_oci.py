"""The process objects and specs that the agent writes for the OCI runtime."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from byre_guest import oci
from byre_proto import messages
from byre_proto.errors import InvalidRequest

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)

BASE = {
    "args": ["server"],
    "env": ["PATH=/bin", "HOME=/srv", "LANG=C"],
    "cwd": "/srv",
    "user": {"uid": 5, "gid": 6, "additionalGids": [7], "umask": 0o27},
    "capabilities": {"bounding": ["CAP_CHOWN"], "effective": ["CAP_CHOWN"]},
    "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 1, "hard": 2}, {"type": "RLIMIT_CORE", "soft": 0, "hard": 0}],
    "noNewPrivileges": True,
    "oomScoreAdj": 0,
    "terminal": False,
}
USER = {"uid": 1000, "gid": 100, "gids": [10, 50], "home": "/home/web"}


def arguments(**given: Any) -> dict[str, Any]:
    return messages.check_arguments("process.create", {"container": "c", **given})


@given(JSON)
def test_json_is_what_json_reads(value: Any) -> None:
    assert json.loads(oci.to_json(value)) == value


def test_what_is_no_json_is_refused() -> None:
    deep: Any = 0
    for _ in range(oci.MAX_DEPTH + 2):
        deep = [deep]
    for value in (deep, b"bytes", {"a": {1, 2}}):
        with pytest.raises(InvalidRequest):
            oci.to_json(value)


@pytest.mark.behaviour("B21")
def test_an_exec_is_the_container_s_process_with_what_was_asked_for() -> None:
    assert oci.exec_process(BASE, arguments(args=["ls"]), None) == {**BASE, "args": ["ls"]}
    assert oci.exec_process(BASE, arguments(command_line="ls | wc"), None)["args"] == ["/bin/sh", "-c", "ls | wc"]
    process = oci.exec_process(
        BASE,
        arguments(
            args=["ls"],
            env={"A": "b"},
            cwd="/tmp",
            additional_gids=[9],
            rlimits=[["RLIMIT_NOFILE", 10, -1]],
            capabilities=["net_admin", "CAP_CHOWN"],
            terminal=True,
            width=99,
        ),
        USER,
    )
    assert process["env"] == ["A=b"]
    assert process["cwd"] == "/tmp"
    assert process["user"] == {"uid": 1000, "gid": 100, "additionalGids": [9, 10, 50], "umask": 0o27}
    assert process["rlimits"][0] == {"type": "RLIMIT_NOFILE", "soft": 10, "hard": (1 << 64) - 1}
    assert process["rlimits"][1] == BASE["rlimits"][1]
    assert process["capabilities"]["ambient"] == ["CAP_NET_ADMIN", "CAP_CHOWN"], "or an exec would take them away"
    assert (process["terminal"], process["consoleSize"]) == (True, {"height": 24, "width": 99})
    assert process["noNewPrivileges"] is True, "what the container has not, an exec does not get back"


def test_capabilities_of_root_are_not_ambient() -> None:
    process = oci.exec_process(
        {**BASE, "user": {"uid": 0, "gid": 0}}, arguments(args=["ls"], capabilities=[]), None
    )
    assert process["capabilities"] == {"bounding": [], "effective": [], "permitted": []}


def test_another_user_s_home_is_not_the_container_s() -> None:
    process = oci.exec_process(BASE, arguments(args=["ls"]), USER)
    assert oci.variable(process, "HOME") == ""
    oci.with_home(process, "/home/web")
    assert process["env"][-1] == "HOME=/home/web"
    oci.with_home(process, "/other")
    assert oci.variable(process, "HOME") == "/home/web"
    assert BASE["env"] == ["PATH=/bin", "HOME=/srv", "LANG=C"], "the container's own process is not touched"


@pytest.mark.behaviour("B21")
def test_an_oci_process_replaces_everything_but_the_terminal() -> None:
    given = {"args": ["id"], "terminal": True, "consoleSize": {"height": 1, "width": 1}, "noNewPrivileges": False}
    process = oci.exec_process(BASE, arguments(oci=given), None)
    assert process == {
        "args": ["id"],
        "cwd": "/",
        "user": {"uid": 0, "gid": 0},
        "oomScoreAdj": 0,
        "terminal": False,
        "noNewPrivileges": False,
    }


@pytest.mark.parametrize(
    "given",
    [
        *({}, {"args": ["a"], "command_line": "b"}, {"args": [""]}, {"args": ["a"], "cwd": "relative"}),
        *(
            {"args": ["a\0b"]},
            {"args": ["a"], "env": {"": "x"}},
            {"args": ["a"], "rlimits": [["RLIMIT_CORE", "1"]]},
        ),
        *({"oci": {}}, {"oci": "text"}, {"oci": {"args": "text"}}, {"oci": {"args": ["a"], "env": {"A": "b"}}}),
        *({"oci": {"args": ["a"], "user": 5}}, {"oci": {"args": ["a"], "cwd": 5}}),
    ],
)
def test_what_is_no_process_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        oci.exec_process(BASE, arguments(**given), None)


@pytest.mark.parametrize(
    "spec",
    [
        *({}, {"process": []}, {"process": {"args": []}}, {"process": {"args": ["a"]}, "linux": []}),
        *({"process": {"args": ["a"]}, "mounts": [{}]}, {"process": {"args": ["a"]}, "root": "/"}),
    ],
)
def test_what_is_no_spec_is_refused(spec: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        oci.check_spec(spec)


def test_the_agent_decides_where_a_container_is() -> None:
    given = {
        "ociVersion": "1.0.0",
        "hostname": "box",
        "root": {"path": "/etc", "readonly": True},
        "linux": {"cgroupsPath": "/elsewhere", "maskedPaths": ["/proc/kcore"]},
        "process": {"args": ["a"]},
    }
    process = oci.init_process(
        {"args": ["a"], "user": {"uid": 1, "gid": 1, "additionalGids": [3]}, "terminal": True, "consoleSize": {}},
        USER,
    )
    assert process["user"] == {"uid": 1000, "gid": 100, "additionalGids": [3, 10, 50]}
    assert (process["terminal"], process["oomScoreAdj"], "consoleSize" in process) == (False, 0, False)
    spec = oci.container_spec(given, "/run/root", "/containers/c", process)
    assert spec["root"] == {"path": "/run/root", "readonly": True}
    assert spec["linux"] == {"cgroupsPath": "/containers/c", "maskedPaths": ["/proc/kcore"]}
    assert (spec["hostname"], spec["process"]) == ("box", process)
