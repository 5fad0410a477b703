"""A short run of the fuzz target, without atheris: same grammar, same checks, a fixed seed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from byre_proto.connection import Connection

from . import fuzz_connection, fuzz_library


@pytest.mark.behaviour("B45")
def test_frames_of_every_type_reach_each_side_in_every_state_and_escape_nowhere() -> None:
    fuzzer = fuzz_connection.run(12_000, seed=1)
    assert not fuzzer.missing(), fuzzer.table()


def test_what_was_not_reached_is_reported() -> None:
    fuzzer = fuzz_connection.run(10, seed=1)
    assert fuzzer.missing()
    assert fuzz_connection.report(fuzzer) == 1


def test_an_escaping_exception_is_found_and_names_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Connection, *_: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(Connection, "_receive_hello", broken)
    with pytest.raises(KeyError) as caught:
        fuzz_connection.run(1000, seed=1)
    assert "reproduce: seed 1, input" in caught.value.__notes__[0]


def test_it_runs_as_a_program() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.fuzz_connection", "--plain", "--runs", "3000", "--seed", "7"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=100,
    )
    assert "frames\n" in run.stdout, run.stderr
    assert ("never reached" in run.stdout) == (run.returncode == 1)


@pytest.mark.behaviour("B45")
async def test_a_guest_that_lies_ends_what_waits_for_it_and_nothing_else() -> None:
    report = await fuzz_library.to_host(1000, seed=1)
    assert not report.wrong
    assert report.ends["result"] and report.ends["ConnectionLost"]
    assert report.ends["beside"] == 7


@pytest.mark.behaviour("B45")
async def test_an_agent_outlives_hosts_that_lie() -> None:
    report = await fuzz_library.to_agent(3000, seed=1)
    assert not report.wrong
    assert report.ends["honest"] == 7
