"""docs/ci.md: its commands as they stand there, in a directory with its test; its workflow has the same ones."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: Seconds for all commands, packages from the network and a guest image included.
LIMIT = 600


def blocks(language: str) -> list[str]:
    text = (ROOT / "docs" / "ci.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_workflow_has_the_commands_of_the_recipe() -> None:
    (workflow,) = blocks("yaml")
    steps = re.findall(r"- run: \|\n((?: {10}.*\n)+)", workflow)
    assert [step.replace(" " * 10, "") for step in steps] == blocks("sh")


@pytest.mark.vm
@pytest.mark.not_on("user")  # installs packages of the system
@pytest.mark.timeout(LIMIT)
def test_the_commands_of_the_recipe_do_what_it_says(tmp_path: Path) -> None:
    wheels, project = tmp_path / "wheels", tmp_path / "project"
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", wheels, ROOT]
    subprocess.run(command, check=True)
    project.mkdir()
    tests, conftest = blocks("python")
    (project / "test_example.py").write_text(tests)
    (project / "conftest.py").write_text(conftest)
    unwanted = ("PYTHON", "PYTEST", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    done = subprocess.run(
        ["sh", "-eux"],
        cwd=project,
        env={**environment, "PIP_FIND_LINKS": str(wheels), "DEBIAN_FRONTEND": "noninteractive"},
        input="".join(blocks("sh")),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "accelerator" in output
    assert re.search(r"2 workers.*^=* 2 passed", output, re.MULTILINE | re.DOTALL), output
