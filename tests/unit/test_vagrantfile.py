"""The Vagrantfile is one that Vagrant takes.  That its machine comes up needs a provider, which CI has not."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_vagrant_validates_it(tmp_path: Path) -> None:
    if shutil.which("vagrant") is None:
        assert not os.environ.get("CI"), "vagrant is not installed"
        pytest.skip("vagrant is not installed: the package vagrant")
    result = subprocess.run(
        ["vagrant", "validate", "--ignore-provider"],
        cwd=ROOT,
        env={**os.environ, "VAGRANT_HOME": str(tmp_path), "VAGRANT_DOTFILE_PATH": str(tmp_path / "dot")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
