"""Makes PostgreSQL of Debian packages an OCI image layout: `python -m tests.images.make_postgres_image DIRECTORY`.

One layer.  The package makes a database cluster when it is installed, in DATA: a volume mounted above it begins
with that (`Volume(..., "/var/lib/postgresql")`), so nothing has to be initialised in the VM.

Needs no root: mmdebstrap uses a user namespace where it may.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from examples.busybox_image import write_layout

from .make_debian_image import bootstrap

#: Bookworm's.
VERSION = "15"
DATA = f"/var/lib/postgresql/{VERSION}/main"

#: Only over a UNIX socket; without its compiler (jit), which is left out: the library has 110 MB.
COMMAND = [
    "postgres",
    *("-D", DATA, "-c", f"config_file=/etc/postgresql/{VERSION}/main/postgresql.conf"),
    *("-c", "listen_addresses=", "-c", "unix_socket_directories=/tmp", "-c", "ssl=off", "-c", "jit=off"),
]


def make_postgres_image(destination: Path) -> Path:
    """The layout at `destination`, which must not exist yet.  Raises RuntimeError with mmdebstrap's words."""
    with tempfile.TemporaryDirectory(prefix="byre-postgres-") as folder:
        tar = Path(folder) / "all.tar"
        os.chmod(folder, 0o777)  # mmdebstrap writes as another user of its namespace
        bootstrap(
            tar,
            f"--include=postgresql-{VERSION}",
            "--dpkgopt=path-exclude=/usr/lib/x86_64-linux-gnu/libLLVM*",
            "--dpkgopt=path-exclude=/usr/lib/llvm-*",
        )
        config = {
            "Cmd": COMMAND,
            "User": "postgres",
            "WorkingDir": "/var/lib/postgresql",
            "StopSignal": "SIGINT",
            "Env": [f"PATH=/usr/lib/postgresql/{VERSION}/bin:/usr/bin:/bin", "LANG=C.UTF-8", "PGHOST=/tmp"],
        }
        return write_layout(destination, [tar.read_bytes()], config)


if __name__ == "__main__":
    print(make_postgres_image(Path(sys.argv[1])))
