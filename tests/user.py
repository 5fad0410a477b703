"""`python -m tests.user [PYTEST ARGUMENTS]`: the VM tests again, everything run by an ordinary user.

Needs root, to become that user; without it the run before was this one already (see `vehicles.selected`).  The user
gets a copy of the tree, of the Python packages and of the guest image, because it may not be able to read ours.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from .conftest import RESULTS
from .nested import userland

#: nobody: no home, no groups, no permissions.
UID = GID = 65534

#: Seconds after which the run is given up.
LIMIT = 1800


def main(arguments: list[str]) -> int:
    if os.geteuid() != 0:
        print("user: this is an ordinary user; `make test` has run as one")
        return 0
    with tempfile.TemporaryDirectory(prefix="byre-user-") as folder:
        top = Path(folder)
        userland.copy_all(top)
        top.chmod(0o755)
        for directory in ("home", "results", "tmp"):
            (top / directory).mkdir()
        subprocess.run(["chown", "-R", f"{UID}:{GID}", str(top)], check=True)
        status = run(top, arguments)
        RESULTS.mkdir(parents=True, exist_ok=True)
        shutil.copytree(top / "results", RESULTS, dirs_exist_ok=True)
    return status


def run(top: Path, arguments: list[str]) -> int:
    """pytest as the user, with nothing of root's environment."""
    tree, libraries = top / userland.TREE, top / userland.LIBRARIES
    roots = [tree / name for name in ("host", "guest", "bridge_proto", "images")]
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "LANG": "C.UTF-8",
        "HOME": str(top / "home"),
        "TMPDIR": str(top / "tmp"),
        "XDG_CACHE_HOME": str(top / userland.CACHE),
        "PYTHONPATH": ":".join(map(str, [tree, *roots, libraries])),
        "BYRE_TEST_VEHICLES": "user",
        "BYRE_TEST_RESULTS": str(top / "results"),
    }
    python = f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    command = [
        "setpriv",
        f"--reuid={UID}",
        f"--regid={GID}",
        "--clear-groups",
        "--no-new-privs",
        "--bounding-set=-all",
    ]
    command += [python, "-m", "pytest", "-p", "no:cacheprovider", "-m", "vm"]
    command += [f"--basetemp={top / 't'}", *arguments]  # short: a UNIX socket's path has 107 bytes
    command += ["tests/conformance", "tests/vm"]
    return subprocess.run(command, cwd=tree, env=environment, timeout=LIMIT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
