"""What a user gets: the wheel's top level, the public names, and an import that costs little."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import byre

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(180)
def test_the_wheel_holds_the_four_packages_and_nothing_else(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT], check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    packages = {"byre", "byre_guest", "byre_proto", "byre_images"}
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == packages
    for package in packages:
        assert f"{package}/py.typed" in names
    (entry_points,) = (name for name in names if name.endswith(".dist-info/entry_points.txt"))
    assert "[pytest11]\nbyre = byre.pytest_plugin" in zipfile.ZipFile(wheel).read(entry_points).decode()
    assert "byre_proto/WIRE.md" in names, "another implementation needs the specification"
    assert "byre_images/init.c" in names, "the guest image cannot be built without it"


def test_public_names_exist_once() -> None:
    assert len(set(byre.__all__)) == len(byre.__all__)
    for name in byre.__all__:
        assert getattr(byre, name) is not None


def test_importing_byre_is_cheap() -> None:
    """The command line starts with this; what a command needs is imported when it is needed."""
    code = "import sys, byre; print(*sorted(sys.modules))"
    modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    heavy = {"asyncio", "qemu", "msgpack", "tarfile", "subprocess", "logging", "byre_images"}
    assert not heavy & set(modules)
