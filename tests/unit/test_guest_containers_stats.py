"""Limits and statistics of cgroup v2, from sample files as the kernel writes them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from byre_guest import cgroups, stats
from byre_proto.errors import InvalidRequest, NotSupported, StorageFailed

SAMPLE = {
    "memory.current": "155648\n",
    "memory.max": "max\n",
    "memory.swap.max": "0\n",
    "pids.current": "2\n",
    "pids.max": "50\n",
    "cpu.max": "max 100000\n",
    "cpu.stat": "usage_usec 44977\nuser_usec 16355\nsystem_usec 28622\nnr_throttled 0\n",
    "memory.stat": "anon 4096\nfile 8192\n",
    "memory.events": "low 0\nhigh 0\nmax 3\noom 1\noom_kill 2\noom_group_kill 0\n",
    "cgroup.events": "populated 1\nfrozen 0\n",
    "io.stat": "8:0 rbytes=4096 wbytes=0 rios=1 wios=0 dbytes=0 dios=0\n259:1 rbytes=7\n",
    "cgroup.procs": "7\n",
}


@pytest.fixture
def cgroup(tmp_path: Path) -> str:
    for name, text in SAMPLE.items():
        (tmp_path / name).write_text(text)
    return str(tmp_path)


@pytest.mark.behaviour("B27")
def test_statistics_are_what_the_files_say(cgroup: str) -> None:
    found = stats.statistics(cgroup)
    assert found.pop("timestamp_ns") > 1_600_000_000 * 10**9
    assert found == {
        "memory.current": 155648,
        "memory.max": None,
        "memory.swap.max": 0,
        "pids.current": 2,
        "pids.max": 50,
        "cpu.max.quota_usec": None,
        "cpu.max.period_usec": 100000,
        "cpu.stat.usage_usec": 44977,
        "cpu.stat.user_usec": 16355,
        "cpu.stat.system_usec": 28622,
        "cpu.stat.nr_throttled": 0,
        "memory.stat.anon": 4096,
        "memory.stat.file": 8192,
        "memory.events.low": 0,
        "memory.events.high": 0,
        "memory.events.max": 3,
        "memory.events.oom": 1,
        "memory.events.oom_kill": 2,
        "memory.events.oom_group_kill": 0,
        "cgroup.events.populated": 1,
        "cgroup.events.frozen": 0,
        "io.stat.8:0.rbytes": 4096,
        "io.stat.8:0.wbytes": 0,
        "io.stat.8:0.rios": 1,
        "io.stat.8:0.wios": 0,
        "io.stat.8:0.dbytes": 0,
        "io.stat.8:0.dios": 0,
        "io.stat.259:1.rbytes": 7,
    }
    assert cgroups.populated(cgroup)
    assert cgroups.oom_kills(cgroup) == 2


@pytest.mark.behaviour("B27")
def test_what_is_not_there_is_left_out(tmp_path: Path) -> None:
    assert set(stats.statistics(str(tmp_path / "gone"))) == {"timestamp_ns"}
    assert stats.processes(str(tmp_path / "gone")) == []
    assert not cgroups.populated(str(tmp_path / "gone"))
    cgroups.kill(str(tmp_path / "gone"))
    assert cgroups.remove(str(tmp_path / "gone"))


@pytest.mark.behaviour("B27")
def test_processes_of_a_cgroup_and_below(cgroup: str, tmp_path: Path) -> None:
    leaf = tmp_path / "byre-1"
    leaf.mkdir()
    (leaf / "cgroup.procs").write_text("9\n10\n")
    proc = tmp_path / "proc"
    tail = "S 1 7 7 0 -1 4194560 1 0 0 0 150 25 0 0 20 0 1 0 1000 4096 3 18446744073709551615" + " 0" * 27
    for pid, name in ((7, "sh"), (9, ") evil (x")):
        (proc / str(pid)).mkdir(parents=True)
        (proc / str(pid) / "stat").write_text(f"{pid} ({name}) {tail}\n")
    found = stats.processes(cgroup, str(proc))  # 10 has ended meanwhile
    assert {(p["pid"], p["command"]) for p in found} == {(7, "sh"), (9, ") evil (x")}
    assert found[0]["user_us"] == 150 * 1_000_000 // stats.TICKS
    assert found[0]["system_us"] == 25 * 1_000_000 // stats.TICKS
    assert found[0]["rss_bytes"] == 3 * stats.PAGE


def test_a_real_process_is_read() -> None:
    text = Path("/proc/self/stat").read_text()
    found = stats._process(text, 0)
    assert found["pid"] == os.getpid()
    assert found["rss_bytes"] > 1 << 20


@pytest.mark.behaviour("B28")
@pytest.mark.parametrize(
    ("resources", "files"),
    [
        ({}, {}),
        ({"memory_bytes": None, "cpus": None, "pids": None}, {}),
        ({"memory_bytes": 65536}, {"memory.max": "65536", "memory.swap.max": "0"}),
        ({"memory_bytes": -1}, {"memory.max": "max", "memory.swap.max": "max"}),
        ({"cpus": 0.5, "pids": 33}, {"cpu.max": "50000 100000", "pids.max": "33"}),
        ({"cpus": 2}, {"cpu.max": "200000 100000"}),
        ({"cpus": 0.000001}, {"cpu.max": "1000 100000"}),
        ({"cpus": -1, "pids": -1}, {"cpu.max": "max 100000", "pids.max": "max"}),
    ],
)
def test_limits_as_the_kernel_takes_them(resources: dict[str, Any], files: dict[str, str]) -> None:
    assert cgroups.files_of_resources(resources) == files


@pytest.mark.behaviour("B28")
def test_limits_that_are_none() -> None:
    with pytest.raises(NotSupported, match="hugepages"):
        cgroups.files_of_resources({"pids": 5, "hugepages": 3})
    for bad in ({"pids": 0}, {"pids": -2}, {"pids": 1.5}, {"pids": True}, {"memory_bytes": "1"}, {"cpus": 1e30}):
        with pytest.raises(InvalidRequest):
            cgroups.files_of_resources(bad)


@pytest.mark.behaviour("B28")
def test_one_limit_that_fails_takes_the_others_back(cgroup: str) -> None:
    with pytest.raises(StorageFailed, match=r"cpu\.weight"):
        cgroups.apply(cgroup, {"pids.max": "9", "memory.max": "4096", "cpu.weight": "1"})
    assert Path(cgroup, "pids.max").read_text().split()[0] == "50"
    assert Path(cgroup, "memory.max").read_text().startswith("max")


def test_swap_limits_are_left_out_where_there_is_no_accounting(cgroup: str) -> None:
    os.unlink(f"{cgroup}/memory.swap.max")
    cgroups.apply(cgroup, {"memory.max": "4096", "memory.swap.max": "0"})
    assert not os.path.exists(f"{cgroup}/memory.swap.max")


@pytest.mark.behaviour("B27")
def test_the_agent_sets_the_limits_of_a_spec() -> None:
    resources = {
        "memory": {"limit": 4096, "swap": 4096, "reservation": 1024},
        "cpu": {"quota": 5000, "period": 20000, "shares": 512},
        "pids": {"limit": 50},
        "devices": [{"allow": False}],
    }
    files, spec = cgroups.take_limits({"hostname": "box", "linux": {"resources": resources}})
    assert files == {
        "memory.max": "4096",
        "memory.swap.max": "0",
        "pids.max": "50",
        "cpu.max": "5000 20000",
    }
    assert spec == {
        "hostname": "box",
        "linux": {
            "resources": {"memory": {"reservation": 1024}, "cpu": {"shares": 512}, "devices": [{"allow": False}]}
        },
    }
    assert cgroups.take_limits({}) == ({}, {"linux": {"resources": {}}})
    unlimited, _ = cgroups.take_limits({"linux": {"resources": {"pids": {"limit": 0}, "memory": {"limit": -1}}}})
    assert unlimited["pids.max"] == unlimited["memory.max"] == "max"
    with pytest.raises(InvalidRequest):
        cgroups.take_limits({"linux": {"resources": {"pids": {"limit": "many"}}}})
