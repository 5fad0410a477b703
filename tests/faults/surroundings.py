"""Where a program of faults runs: mounts of its own, and a small disk for run directories and temporary files."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

#: Set in the process that has mounts of its own.
MARK = "BYRE_FAULTS_MOUNTS"

#: Size of the disk that can be filled: run directories, logs and temporary files need less.
DISK = "16m"


def with_own_mounts(module: str) -> None:
    """Run `python -m module` again where it may mount: an ordinary user in a user namespace of its own."""
    if MARK not in os.environ:
        namespaces = ["--mount"] if os.geteuid() == 0 else ["--user", "--map-root-user", "--mount"]
        os.environ[MARK] = "1"
        os.execvp("unshare", ["unshare", *namespaces, sys.executable, "-m", module, *sys.argv[1:]])


@contextlib.contextmanager
def small_disk() -> Iterator[None]:
    """TMPDIR and XDG_RUNTIME_DIR are on it."""
    with tempfile.TemporaryDirectory(prefix="byre-faults-") as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK},mode=700", "faults", folder], check=True)
        for variable in ("TMPDIR", "XDG_RUNTIME_DIR"):
            os.environ[variable] = os.path.join(folder, variable)
            os.mkdir(os.environ[variable], 0o700)
        tempfile.tempdir = None  # it is looked up once
        try:
            yield
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)
