"""A short run of the fuzz target, without atheris: same grammar, same checks, a fixed seed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from byre_proto.connection import Connection

from . import fuzz_connection


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
