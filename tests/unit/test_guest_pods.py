"""What a container's spec becomes in a pod, and the files of names; the rest of pods needs a VM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from byre_guest import names
from byre_guest.networks import Network
from byre_guest.pods import Pod

SPEC: dict[str, Any] = {
    "hostname": "own",
    "process": {"args": ["sh"], "env": ["A=1"]},
    "mounts": [
        {"destination": "/dev/shm", "type": "tmpfs", "source": "shm"},
        {"destination": "/proc", "type": "proc", "source": "proc"},
    ],
    "linux": {"namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network", "cgroup")]},
}


@pytest.mark.parametrize("share_pid", [False, True])
def test_a_spec_joins_what_is_shared(share_pid: bool) -> None:
    joined = Pod("shop", "host", share_pid).spec(SPEC)
    kinds = {kind["type"]: kind.get("path", "") for kind in joined["linux"]["namespaces"]}
    shared = {"network", "ipc", "uts", *(["pid"] if share_pid else [])}
    assert {kind for kind, path in kinds.items() if path == f"/run/byre/p/shop/{kind}"} == shared
    assert {kind for kind, path in kinds.items() if not path} == {"pid", "mount", "cgroup"} - shared
    assert "hostname" not in joined, "the runtime would set it for all"
    assert joined["process"]["env"] == ["A=1", "HOSTNAME=host"]
    assert [mount["source"] for mount in joined["mounts"]] == ["/run/byre/p/shop/shm", "proc"]
    assert SPEC["process"]["env"] == ["A=1"], "the caller's stays as it is"


def test_a_network_that_leads_out_is_the_one_that_is_joined() -> None:
    pod = Pod("shop", "host", False)
    pod.network = Network("7", False, "10.0.2.3")
    joined = pod.spec(SPEC)["linux"]["namespaces"]
    assert {"type": "network", "path": "/run/byre/n/7/network"} in joined
    assert [kind["type"] for kind in joined].count("network") == 1


def test_what_a_container_mounts_or_sets_itself_stays() -> None:
    mine = {"destination": "/dev/shm", "type": "bind", "source": "/mine"}
    spec = {**SPEC, "mounts": [mine], "process": {"args": ["sh"], "env": ["HOSTNAME=x"]}}
    joined = Pod("shop", "host", False).spec(spec)
    assert joined["mounts"] == [mine]
    assert joined["process"]["env"] == ["HOSTNAME=x"]


def test_names(tmp_path: Path) -> None:
    etc = tmp_path / "etc"
    names.write(str(etc), ["web", "web"], "")
    names.add(str(etc), "db")
    names.add(str(etc), "db")
    lines = [line.split() for line in (etc / "hosts").read_text().splitlines()]
    assert lines[0] == ["127.0.0.1", "localhost"]
    assert lines[2:] == [["127.0.0.1", "web"], ["127.0.0.1", "db"]]
    assert ((etc / "hostname").read_text(), (etc / "resolv.conf").read_text()) == ("web\n", "")
    (etc / "hosts").write_bytes(b"\xff" * 100_000)  # by a container
    names.add(str(etc), "other")


def test_the_mounts_of_names_leave_the_callers_alone() -> None:
    spec = {"mounts": [{"destination": "/etc/hosts/"}], "root": {"readonly": True}}
    found = names.mounts("/d", spec)
    assert [mount["destination"] for mount in found] == ["/etc/hostname", "/etc/resolv.conf"]
    assert all(mount["options"][-1] == "ro" for mount in found)
