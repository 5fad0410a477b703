"""The accelerator is chosen by what ran, against a deadline, and the reason is told."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from byre.errors import AcceleratorUnavailable
from byre.machines import accelerators, kvm_probe


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No remembered answer comes in, and none of ours goes out."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(accelerators, "cpu_flags", lambda: frozenset({"fpu", "svm"}))
    monkeypatch.setattr(kvm_probe, "DEVICE", os.devnull)  # opens, as a dead /dev/kvm does
    accelerators._remembered_run.cache_clear()
    accelerators._say_once.cache_clear()
    yield
    accelerators._remembered_run.cache_clear()
    accelerators._say_once.cache_clear()


def probe_prints(monkeypatch: pytest.MonkeyPatch, text: str) -> list[int]:
    calls: list[int] = []

    def run(argv: list[str]) -> str:
        calls.append(1)
        return text

    monkeypatch.setattr(accelerators, "run_probe", run)
    return calls


def test_a_device_that_opens_without_cpu_flags_is_not_even_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = probe_prints(monkeypatch, "ok")
    monkeypatch.setattr(accelerators, "cpu_flags", lambda: frozenset({"fpu"}))
    assert "neither vmx nor svm" in str(accelerators.kvm_problem())
    assert not calls
    monkeypatch.setattr(accelerators, "cpu_flags", frozenset)
    assert "could not be read" in str(accelerators.kvm_problem())


def test_required_and_not_there_fails_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    probe_prints(monkeypatch, "a virtual CPU computed a wrong sum")
    with pytest.raises(AcceleratorUnavailable, match="a wrong sum") as caught:
        accelerators.choose_accelerator("kvm")
    assert caught.value.hint


def test_auto_falls_back_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    probe_prints(monkeypatch, "broken")
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            chosen = accelerators.choose_accelerator("auto")
    assert chosen.name == "tcg"
    assert "broken" in chosen.reason
    assert sum("broken" in record.message for record in caplog.records) == 1


def test_a_cpu_that_ran_is_remembered_for_the_boot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = probe_prints(monkeypatch, "ok")
    assert accelerators.choose_accelerator("auto").name == "kvm"
    assert accelerators.choose_accelerator("kvm").name == "kvm"
    accelerators._remembered_run.cache_clear()  # as in another process
    assert accelerators.kvm_problem() is None
    assert len(calls) == 1
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert [path.name for path in (tmp_path / "byre").iterdir()] == [f"kvm-{boot}"]


def test_a_device_that_is_gone_counts_whatever_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    probe_prints(monkeypatch, "ok")
    assert accelerators.kvm_problem() is None
    monkeypatch.setattr(kvm_probe, "DEVICE", "/nowhere/kvm")
    assert "No such file" in str(accelerators.kvm_problem())


def test_emulation_on_request_probes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = probe_prints(monkeypatch, "ok")
    assert accelerators.choose_accelerator("tcg").name == "tcg"
    assert not calls


def test_a_probe_that_never_returns_is_killed_at_the_deadline() -> None:
    started = time.monotonic()
    said = accelerators.run_probe([sys.executable, "-c", "import signal; signal.pause()"], timeout=0.3)
    assert "did not run" in said
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("program", "said"),
    [("print('ok')", "ok"), ("raise SystemExit('oops')", "status 1: oops"), ("print('\\x1b[2J')", "\\x1b[2J")],
)
def test_what_a_probe_says_is_taken_as_data(program: str, said: str) -> None:
    assert said in accelerators.run_probe([sys.executable, "-c", program])


def test_the_probe_itself_reports_a_device_that_is_no_kvm() -> None:
    """/dev/null opens, and knows none of KVM's requests."""
    program = f"import sys; sys.path[0:0] = [{str(Path(kvm_probe.__file__).parent)!r}]\n"
    program += "import kvm_probe; kvm_probe.DEVICE = '/dev/null'; kvm_probe.main()"
    assert "/dev/null: Inappropriate ioctl" in accelerators.run_probe([sys.executable, "-c", program])
