"""The page and the plot of docs/performance.md, from a canned result; the steps of a peer that hangs or lies."""

from __future__ import annotations

import datetime
import time
import xml.etree.ElementTree
from pathlib import Path

import pytest

from benchmarks import peers, performance
from benchmarks.peers import measure
from benchmarks.peers.interface import Cannot, Peer

RESULT = {
    "ratio": 0.05,
    "target": "< 1",
    "runs": 3,
    "figures": {"byre_cold_start_s": 2.1, "byre_true_s": 0.009, "crun_true_s": 0.02},
    "missing": {"crun_cold_start": "a reason", "other": "not installed", "byre_put_8m": "TimeoutError: <late>"},
    "versions": {"byre": "byre 1", "crun": "crun 2"},
    "host": {"cpus": 2, "cpu": "a CPU", "kernel": "6", "accelerator": "tcg"},
}


class Liar(Peer):
    """Its file comes back changed, and its commands hang but for the first."""

    def version(self) -> str:
        return "1"

    def start(self) -> None:
        pass

    def run(self, script: str) -> bytes:
        if script == "printf first":
            return b"first"
        time.sleep(60)
        return b""

    def put(self, data: bytes, path: str) -> None:
        raise Cannot("is read-only")

    def get(self, path: str) -> bytes:
        return b"other"

    def stop(self) -> None:
        pass


def test_page_names_what_is_missing() -> None:
    text = performance.page(RESULT, datetime.date(2026, 1, 2))
    assert "| byre | 2.1 s | - | 9 ms | - | - | - | - |" in text
    assert "| other | - | - | - | - | - | - | - |" in text
    assert "- other: all of it: not installed" in text
    assert "- crun: cold start → first output: a reason" in text


def test_plot_is_well_formed_and_has_a_bar_for_each_figure() -> None:
    root = xml.etree.ElementTree.fromstring(performance.plot(RESULT))
    bars = [bar for bar in root.iter("{http://www.w3.org/2000/svg}rect") if float(bar.attrib["width"])]
    assert len(bars) == len(RESULT["figures"])


def test_steps_end_with_figure_reason_or_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "LIMIT", 0.05)
    said: dict[str, float | str] = {}
    measure.measure(Liar(tmp_path), 1, lambda step, result: said.update({step: result}))
    assert isinstance(said["cold_start"], float)
    assert said["warm_start"] == "keeps nothing to start from"
    assert said["true"] == "TimeoutError: no end within 0.05 s"
    assert said["put_8m"] == "is read-only"
    assert "5 bytes came" in str(said["get_8m"])


def test_ratio_is_of_the_quickest_starts() -> None:
    figures = {
        "byre_cold_start_s": 2.0,
        "byre_warm_start_s": 0.5,
        "guestfs_cold_start_s": 5.0,
        "crun_cold_start_s": 0.1,
    }
    assert peers.ratio(figures) == 0.1
    assert peers.ratio({"guestfs_cold_start_s": 5.0}) is None
