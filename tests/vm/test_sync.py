"""byre.sync with a real VM: what only a VM has, from ordinary code."""

from __future__ import annotations

from pathlib import Path

import pytest

from byre import events, sync
from tests.conftest import machine_options
from tests.namespaces import needs_user_namespaces

pytestmark = pytest.mark.vm


@needs_user_namespaces
def test_events_shares_and_snapshots(tmp_path: Path, busybox: str) -> None:
    (tmp_path / "file").write_text("of the host\n")
    with sync.UtilityVM(**machine_options()) as vm:
        told = iter(vm.events())
        with vm.share(tmp_path) as share:
            assert vm.run(["cat", f"{share.path}/file"], capture_output=True).stdout == b"of the host\n"
        with vm.create_container("c", image=busybox, args=["sh", "-c", "exit 3"]) as container:
            container.start()
            assert container.wait().code == 3
        assert any(isinstance(event, events.ContainerExited) and event.code == 3 for event in told)
        with vm.snapshot() as snap, snap.clone() as clone:
            assert clone.run(["echo", "on"], capture_output=True).stdout == b"on\n"
