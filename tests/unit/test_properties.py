"""The shapes of properties, from numbers as the agent gives them."""

from __future__ import annotations

import pytest

from byre import properties
from byre.errors import InvalidRequest

STATS = {
    "timestamp_ns": 1_700_000_000_500_000_000,
    "memory.current": 5000,
    "memory.peak": 6000,
    "memory.max": 65536,
    "memory.swap.current": 7,
    "memory.swap.max": 0,
    "pids.current": 3,
    "pids.max": 40,
    "memory.stat.anon": 1000,
    "memory.stat.file": 2000,
    "memory.stat.kernel": 300,
    "memory.stat.pgfault": 11,
    "memory.events.max": 4,
    "memory.events.oom_kill": 1,
    "cpu.stat.usage_usec": 30,
    "cpu.stat.user_usec": 20,
    "cpu.stat.system_usec": 10,
    "cpu.stat.nr_periods": 8,
    "cpu.stat.nr_throttled": 2,
    "cpu.stat.throttled_usec": 9,
    "io.stat.8:0.rbytes": 100,
    "io.stat.8:16.rbytes": 20,
    "io.stat.8:0.wbytes": 3,
    "io.stat.8:0.rios": 5,
    "io.stat.8:0.wios": 1,
    "io.stat.8:0.dbytes": 77,
}


@pytest.mark.behaviour("B27")
def test_metrics_have_the_shape_of_cgroup_v1() -> None:
    found = properties.metrics(STATS)
    assert found["pids"] == {"current": 3, "limit": 40}
    assert found["cpu"]["usage"] == {"total": 30_000, "kernel": 10_000, "user": 20_000}
    assert found["cpu"]["throttling"] == {"periods": 8, "throttled_periods": 2, "throttled_time": 9000}
    memory = found["memory"]
    assert memory["usage"] == {"limit": 65536, "usage": 5000, "max": 6000, "failcnt": 4}
    assert memory["swap"] == {"limit": 65536, "usage": 5007}, "v1 counts memory and swap together"
    assert (memory["cache"], memory["total_rss"], memory["pg_fault"]) == (2000, 1000, 11)
    assert memory["kernel"] == {"usage": 300}
    assert found["memory_oom_control"] == {"oom_kill": 1}
    assert found["blkio"]["io_service_bytes_recursive"] == [
        {"op": "Read", "major": 8, "minor": 0, "value": 100},
        {"op": "Read", "major": 8, "minor": 16, "value": 20},
        {"op": "Write", "major": 8, "minor": 0, "value": 3},
    ]


@pytest.mark.behaviour("B27")
def test_no_limit_is_what_v1_shows_for_it() -> None:
    found = properties.metrics({**STATS, "memory.max": None, "pids.max": None, "memory.swap.max": None})
    assert found["pids"]["limit"] == 0
    assert found["memory"]["usage"]["limit"] == found["memory"]["swap"]["limit"] == properties.NO_LIMIT


@pytest.mark.behaviour("B27")
def test_nothing_is_invented_for_a_container_just_created() -> None:
    found = properties.metrics({"timestamp_ns": 1})
    assert found["cpu"] == {"usage": {}, "throttling": {}}
    assert "swap" not in found["memory"]
    assert "rss" not in found["memory"]
    shown = properties.statistics({"timestamp_ns": 1})
    assert shown["Memory"] == {}
    assert shown["Processor"] == {}
    assert "Uptime100ns" not in shown


@pytest.mark.behaviour("B27")
def test_statistics() -> None:
    shown = properties.statistics(STATS, started_ns=1_700_000_000_000_000_000)
    assert shown["Timestamp"] == "2023-11-14T22:13:20.500000Z"
    assert shown["ContainerStartTime"] == "2023-11-14T22:13:20Z"
    assert shown["Uptime100ns"] == 5_000_000
    assert shown["Memory"]["MemoryUsageCommitBytes"] == 5000
    assert shown["Processor"] == {"TotalRuntime100ns": 300, "RuntimeUser100ns": 200, "RuntimeKernel100ns": 100}
    assert shown["Storage"] == {
        "ReadCountNormalized": 5,
        "ReadSizeBytes": 120,
        "WriteCountNormalized": 1,
        "WriteSizeBytes": 3,
    }


@pytest.mark.behaviour("B27")
def test_processes() -> None:
    entry = {"pid": 9, "command": "sh", "user_us": 5, "system_us": 6, "rss_bytes": 4096, "created_ns": 10**18}
    assert properties.process_list([entry]) == [
        {
            "ProcessId": 9,
            "ImageName": "sh",
            "CreateTimestamp": "2001-09-09T01:46:40Z",
            "UserTime100ns": 50,
            "KernelTime100ns": 60,
            "MemoryCommitBytes": 4096,
        }
    ]


@pytest.mark.parametrize(
    ("state", "shown", "stopped"),
    [("created", "Created", False), ("running", "Running", False), ("stopped", "Stopped", True)],
)
def test_basic(state: str, shown: str, stopped: bool) -> None:
    found = properties.basic("c1", state)
    assert (found["Id"], found["State"], found["Stopped"]) == ("c1", shown, stopped)


def test_unknown_types_are_refused() -> None:
    properties.check_types(["Statistics", "ProcessList"])
    with pytest.raises(InvalidRequest, match="GuestConnection"):
        properties.check_types(["GuestConnection"])
