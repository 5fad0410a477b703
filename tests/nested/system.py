"""The outer machine's Debian with QEMU as an OCI layout, made once, in the cache of test images."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from examples.busybox_image import write_layout
from tests import images

SUITE = "bookworm"
#: What byre needs of a host, as the Makefile has it.
PACKAGES = (
    *("python3", "qemu-system-x86", "squashfs-tools-ng", "golang-github-containers-common"),
    *("util-linux", "kmod", "zstd", "e2fsprogs", "diod", "slirp4netns", "iproute2"),
)
#: Seconds for the packages to be fetched and unpacked.
TIMEOUT = 1800


def system_image() -> Path:
    """The layout; made first where the cache does not have it.  RuntimeError with mmdebstrap's words."""
    return images._made("nested", _make, Path(__file__))


def _make(destination: Path) -> Path:
    with tempfile.TemporaryDirectory(prefix="byre-nested-") as folder:
        tar = Path(folder) / "system.tar"
        Path(folder).chmod(0o777)  # mmdebstrap writes as another user of its namespace
        command = [
            *("mmdebstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}"),
            *('--aptopt=Acquire::Languages "none"', '--aptopt=APT::Install-Recommends "false"'),
            *(f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "locale", "man")),
            *("--dpkgopt=force-unsafe-io", SUITE, str(tar)),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
        if done.returncode != 0:
            raise RuntimeError(f"mmdebstrap failed with status {done.returncode}:\n{done.stderr[-2000:]}")
        return write_layout(destination, [tar.read_bytes()], {"Cmd": ["bash"]}, compress=False)
