"""The host report says what is missing and what to do, and asks the same functions as a start."""

from __future__ import annotations

import pytest

from byre.machines import host
from byre.machines.host import HostFact, describe_host
from byre.machines.speed import boot_speed_scale
from byre.transports.vsock import Vsock


def facts() -> dict[str, HostFact]:
    return {fact.name: fact for fact in describe_host().facts}


def test_this_host_is_described() -> None:
    found = facts()
    assert {"qemu-system-x86_64", "setpriv", "accelerator", "machine", "transport", "vsock", "memory"} <= set(found)
    assert {"unshare", "namespaces", "sandbox", "user"} <= set(found)
    assert all(fact.detail for fact in found.values())
    assert "version" in found["qemu-system-x86_64"].detail


def test_missing_tools_name_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    report = describe_host()
    assert not report.ok
    assert facts()["qemu-system-x86_64"] == HostFact(
        "qemu-system-x86_64", False, "not installed", "apt install qemu-system-x86"
    )


@pytest.mark.parametrize(("version", "ok"), [((7, 1, 0), False), ((7, 2, 0), True), (None, False)])
def test_qemus_version(monkeypatch: pytest.MonkeyPatch, version: tuple[int, int, int] | None, ok: bool) -> None:
    monkeypatch.setattr(host, "qemu_version", lambda: version)
    assert facts()["qemu-system-x86_64"].ok is ok


def test_accelerator_and_transport_with_their_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "kvm_problem", lambda: "it is Tuesday")
    assert "it is Tuesday" in facts()["accelerator"].detail
    monkeypatch.setattr(host, "kvm_problem", lambda: None)
    monkeypatch.setattr(Vsock, "unavailable", classmethod(lambda cls: None))
    found = facts()
    assert found["accelerator"].detail.startswith("kvm")
    assert found["transport"].detail.startswith("vsock")
    assert found["vsock"].detail == "available"


def test_boots_under_emulation_are_given_more_time() -> None:
    assert 1.0 <= boot_speed_scale("kvm") <= boot_speed_scale("tcg") * 60
    assert boot_speed_scale("tcg") >= 7.0
