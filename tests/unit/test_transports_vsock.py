"""What of vsock needs no vsock device: who is let in, how the secret is handed over, what a host without it says.

The real thing runs inside an emulated machine that has KVM and vhost-vsock (`make nested`).
"""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest

from byre.errors import TransportUnavailable
from byre.transports import choice, vsock
from byre.transports.choice import choose_transport
from byre.transports.virtio_serial import VirtioSerial
from byre.transports.vsock import Vsock


def dial(port: int, source: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), source_address=(source, 0))


def test_only_the_expected_peer_is_let_in() -> None:
    """By addresses of the loopback, which are to TCP what context ids are to vsock."""

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setblocking(False)
            port = listener.getsockname()[1]
            with dial(port, "127.0.0.2") as stranger, dial(port, "127.0.0.3") as guest:
                with await vsock.accept_from(listener, "127.0.0.3") as accepted:
                    assert accepted.getpeername() == guest.getsockname()
                    assert accepted.getblocking() is False
                assert stranger.recv(1) == b""

    asyncio.run(asyncio.wait_for(main(), 10))


def test_waiting_for_the_guest_can_be_cancelled_and_tried_again() -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setblocking(False)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(vsock.accept_from(listener, "127.0.0.3"), 0.01)
            with dial(listener.getsockname()[1], "127.0.0.3"):
                (await vsock.accept_from(listener, "127.0.0.3")).close()

    asyncio.run(asyncio.wait_for(main(), 10))


def test_the_secret_is_new_each_time_and_its_file_cannot_be_changed() -> None:
    first, second = Vsock(), Vsock()
    assert len(first.secret) == vsock.SECRET_SIZE
    assert first.secret != second.secret
    fd = vsock._sealed_file(first.secret)
    try:
        assert Path(f"/proc/self/fd/{fd}").read_bytes() == first.secret  # as QEMU reads it
        with pytest.raises(PermissionError):
            os.write(fd, b"other")
    finally:
        os.close(fd)


def test_a_host_without_it_is_told_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(vsock, "DEVICE", tmp_path / "vhost-vsock")
    assert "load the module vhost_vsock" in str(Vsock.unavailable())
    transport = Vsock()
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(TransportUnavailable):
        transport.open("pci")
    assert set(os.listdir("/proc/self/fd")) == before
    transport.close()


@pytest.mark.parametrize(
    ("wanted", "accelerator", "problem", "expected"),
    [
        ("auto", "kvm", None, Vsock),
        ("auto", "kvm", "no device", VirtioSerial),
        ("auto", "tcg", None, VirtioSerial),
        ("vsock", "tcg", None, Vsock),
        ("virtio-serial", "kvm", None, VirtioSerial),
    ],
)
def test_the_choice_and_its_reason(
    monkeypatch: pytest.MonkeyPatch, wanted: str, accelerator: str, problem: str | None, expected: type
) -> None:
    monkeypatch.setattr(choice.Vsock, "unavailable", classmethod(lambda cls: problem))
    transport, reason = choose_transport(wanted, accelerator)
    assert type(transport) is expected
    assert reason
    if problem and wanted == "auto":
        assert problem in reason


def test_what_is_required_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice.Vsock, "unavailable", classmethod(lambda cls: "no device"))
    with pytest.raises(TransportUnavailable, match="no device"):
        choose_transport("vsock", "kvm")
