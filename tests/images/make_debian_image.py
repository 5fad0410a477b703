"""Makes a Debian userland as an OCI image layout: `python -m tests.images.make_debian_image DIRECTORY`.

    layer 1   Debian, minimal, with Python            (mmdebstrap)
    layer 2   what gcc and libc6-dev add to it         (the difference of two tars)
    layer 3   by hand: whiteouts, an opaque directory, file capabilities, a setuid program, hard links within the
              layer and to a lower one, a path through /lib, a file whose parent directory the layer does not have

Needs no root: mmdebstrap uses a user namespace where it may.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from examples.busybox_image import BUSYBOX, Layer, write_layout

SUITE = "bookworm"
PYTHON = "python3"
COMPILER = ("gcc", "libc6-dev")
#: security.capability, version 2: cap_net_raw permitted and effective (linux/capability.h, struct vfs_cap_data).
NET_RAW = bytes.fromhex("0100000200200000000000000000000000000000")
#: Seconds for the packages to be fetched and unpacked.
TIMEOUT = 1200


def make_debian_image(destination: Path) -> Path:
    """The layout at `destination`, which must not exist yet.  Raises RuntimeError with mmdebstrap's words."""
    with tempfile.TemporaryDirectory(prefix="byre-debian-") as folder:
        base, full = Path(folder) / "base.tar", Path(folder) / "full.tar"
        os.chmod(folder, 0o777)  # mmdebstrap writes as another user of its namespace
        _bootstrap(base, full)
        layers = [base.read_bytes(), _difference(base, full), _special()]
    config = {"Cmd": ["bash"], "Env": ["PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "LANG=C.UTF-8"]}
    return write_layout(destination, layers, config)


def _bootstrap(base: Path, full: Path) -> None:
    # --one-file-system leaves out what mmdebstrap has mounted for the packages' scripts: /proc, /sys, …
    save = (
        "tar --one-file-system --numeric-owner --xattrs --xattrs-include='*' --format=pax --sort=name "
        "--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime "
        "--exclude='./dev/*' --exclude='./var/lib/apt/lists/*' --exclude='./var/cache/apt/*' "
        f'--exclude=./etc/resolv.conf --directory="$1" --create --file={base} .'
    )
    install = f'chroot "$1" apt-get install -y --no-install-recommends {" ".join(COMPILER)}'
    clean = 'rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/* "$1"/var/log/*.log "$1"/var/log/apt'
    hooks = [f"--customize-hook={hook}" for hook in (save, install, clean)]
    bootstrap(full, f"--include={PYTHON}", "--skip=cleanup/apt/lists", *hooks)


def bootstrap(target: Path, *options: str) -> None:
    """A minimal Debian as the tar `target`, whose directory mmdebstrap can write to.  Raises RuntimeError."""
    if shutil.which("mmdebstrap") is None:
        raise RuntimeError("there is no mmdebstrap: install the package mmdebstrap")
    command = [
        "mmdebstrap",
        "--variant=minbase",
        '--aptopt=Acquire::Languages "none"',
        "--dpkgopt=path-exclude=/usr/share/doc/*",
        "--dpkgopt=path-exclude=/usr/share/locale/*",
        "--dpkgopt=force-unsafe-io",
        *options,
        SUITE,
        str(target),
    ]
    if os.geteuid() == 0:  # its mounts end with it, however it ends; a chroot cannot change the propagation
        command = ["unshare", "--mount", "--propagation=unchanged", *command]
    environment = {**os.environ, "TMPDIR": str(target.parent)}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment) as process:
        try:
            said = process.communicate(timeout=TIMEOUT)[1].decode("utf-8", "replace")
        except BaseException:
            process.terminate()  # it cleans up
            raise
    if process.returncode != 0:
        raise RuntimeError(f"mmdebstrap failed with status {process.returncode}:\n{said[-2000:]}")


def _difference(lower: Path, upper: Path) -> bytes:
    """The layer that turns the tree of one tar into that of the other."""
    with tempfile.TemporaryFile() as out, tarfile.open(lower) as old, tarfile.open(upper) as new:
        before = {_name(entry): entry for entry in old}
        after = {_name(entry): entry for entry in new if not _name(entry).startswith("dev/")}
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as layer:
            for name in sorted(set(before) - set(after)):
                folder, _, base = name.rpartition("/")
                if folder in after or not folder:
                    layer.addfile(tarfile.TarInfo(f"{folder}/.wh.{base}" if folder else f".wh.{base}"))
            for name, entry in after.items():
                if name not in before or _changed(before[name], entry):
                    layer.addfile(entry, new.extractfile(entry) if entry.isreg() else None)
        out.seek(0)
        return out.read()


def _name(entry: tarfile.TarInfo) -> str:
    return entry.name.removeprefix("./").rstrip("/")


def _changed(old: tarfile.TarInfo, new: tarfile.TarInfo) -> bool:
    fields = ("type", "mode", "uid", "gid", "size", "mtime", "linkname", "devmajor", "devminor")
    return any(getattr(old, field) != getattr(new, field) for field in fields)


def _special() -> bytes:
    layer = Layer()
    layer.add("usr/share/.wh.info")
    layer.add("etc/.wh.motd")
    layer.directory("usr/share/common-licenses")
    layer.add("usr/share/common-licenses/.wh..wh..opq")
    layer.add("usr/share/common-licenses/ONLY", b"all that an opaque directory shows\n")
    layer.directory("opt/byre", 0o2750, owner=(0, 50))
    program = BUSYBOX.read_bytes()
    layer.add("opt/byre/setuid", program, mode=0o4755)
    layer.add("opt/byre/capable", program, mode=0o755, xattrs={"security.capability": NET_RAW})
    layer.add("opt/byre/linked", kind=tarfile.LNKTYPE, target="opt/byre/capable")
    layer.add("opt/byre/release", kind=tarfile.LNKTYPE, target="usr/lib/os-release")
    layer.add("opt/byre/fifo", kind=tarfile.FIFOTYPE)
    layer.add("opt/byre/null", kind=tarfile.CHRTYPE, mode=0o666, device=(1, 3))
    layer.add("lib/byre-through-a-link", b"this is in /usr/lib\n")
    layer.add("tmp/byre-orphan", b"/tmp stays 1777\n")
    return layer.data()


if __name__ == "__main__":
    print(make_debian_image(Path(sys.argv[1])))
