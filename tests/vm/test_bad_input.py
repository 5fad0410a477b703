"""Bad input: each a typed error that says what to do next, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import byre
from byre import errors
from byre.machines.accelerators import kvm_problem
from byre.transports.vsock import Vsock
from tests.conftest import machine_options
from tests.images import busybox_layout
from tests.vm.test_vm import descriptors, qemus_of

pytestmark = pytest.mark.vm


@pytest.fixture
async def nothing_left() -> AsyncIterator[None]:
    """No process, descriptor or temporary file more than before (async, so that the loop was there before)."""

    def state() -> tuple[list[int], set[str], set[str]]:
        files = {name for name in os.listdir(tempfile.gettempdir()) if name.startswith(("byre", ".byre"))}
        return qemus_of(os.getpid()), descriptors(), files

    before = state()
    yield
    after = state()
    assert after[0] == before[0]
    assert after[1] <= before[1]
    assert after[2] <= before[2]


def explains(error: BaseException) -> bool:
    return isinstance(error, errors.ByreError) and bool(error.hint) and error.hint in str(error)


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """A copy of a good layout, to be spoiled."""
    return Path(shutil.copytree(busybox_layout(), tmp_path / "layout"))


async def refused(vm: Any, image: str, error: type[Exception]) -> errors.ByreError:
    before = [c.id for c in await vm.containers()]
    with pytest.raises(error) as caught:
        await vm.create_container("refused", image=image, args=["true"])
    assert isinstance(caught.value, errors.ByreError)
    assert [c.id for c in await vm.containers()] == before
    return caught.value


async def test_an_unknown_image(vm: Any, nothing_left: None) -> None:
    assert explains(await refused(vm, "oci:/no/such/place", errors.ImageNotFound))


async def test_an_unknown_tag_names_those_that_there_are(vm: Any, layout: Path, nothing_left: None) -> None:
    error = await refused(vm, f"oci:{layout}:nosuchtag", errors.ImageNotFound)
    assert "latest" in str(error)


async def test_a_broken_layout(vm: Any, layout: Path, nothing_left: None) -> None:
    (layout / "index.json").write_text('{"schemaVersion": 2, "manifests": [')
    assert "index.json" in str(await refused(vm, f"oci:{layout}", errors.ImageInvalid))


async def test_a_wrong_digest(vm: Any, layout: Path, nothing_left: None) -> None:
    index = json.loads((layout / "index.json").read_text())
    manifest = layout / "blobs" / index["manifests"][0]["digest"].replace(":", "/")
    config = json.loads(manifest.read_text())["config"]["digest"]
    file = layout / "blobs" / config.replace(":", "/")
    file.write_bytes(file.read_bytes().replace(b"amd64", b"amd46"))
    assert config[7:19] in str(await refused(vm, f"oci:{layout}", errors.ImageInvalid))


async def test_a_missing_tool(nothing_left: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(errors.ToolMissing) as caught:
        await byre.UtilityVM(**machine_options()).start()
    assert explains(caught.value)
    assert "qemu" in str(caught.value)


async def test_too_little_memory(nothing_left: None) -> None:
    with pytest.raises((errors.InvalidRequest, errors.BootFailed)) as caught:
        await byre.UtilityVM(**machine_options(), memory_mib=24).start()
    assert explains(caught.value)
    assert "memory" in str(caught.value)


async def test_an_accelerator_that_is_required_and_not_there(nothing_left: None) -> None:
    if kvm_problem() is None:
        pytest.skip("KVM works on this host")
    with pytest.raises(errors.AcceleratorUnavailable) as caught:
        await byre.UtilityVM(accelerator="kvm").start()
    assert explains(caught.value)


async def test_a_transport_that_is_required_and_not_there(nothing_left: None) -> None:
    if Vsock.unavailable() is None:
        pytest.skip("vsock works on this host")
    with pytest.raises(errors.TransportUnavailable) as caught:
        await byre.UtilityVM(accelerator="tcg", transport="vsock").start()
    assert explains(caught.value)
