"""The guest of those peers that are only a way in: byre's kernel and root on a bare QEMU, with OpenSSH's server and
QEMU's guest agent in it, and QEMU's user-mode network.

The two programs come from Debian's packages, unpacked beside this interpreter by `make peers`, with the libraries
that this host has for them.  Nothing of them is installed on this host.
"""

from __future__ import annotations

import io
import re
import socket
import subprocess
import sys
from pathlib import Path

import byre_images
from benchmarks import floor
from byre_images.tree import Tree

from .interface import ACCELERATOR, Cannot, output_of

#: Where `make peers` unpacks the packages.
PROGRAMS = Path(sys.prefix) / "guest"

MODULES = (*floor.MODULES, "virtio_blk", "squashfs", "overlay", "virtio_net")

#: The root of byre below, what is added to it, and a file system in memory above both; user-mode network's address.
SCRIPT = """
busybox mkdir -p /proc /lower /more /upper /root
busybox mount -t squashfs /dev/vda /lower
busybox mount -t squashfs /dev/vdb /more
busybox mount -t tmpfs upper /upper
busybox mkdir /upper/u /upper/w
busybox mount -t overlay -o lowerdir=/lower:/more,upperdir=/upper/u,workdir=/upper/w root /root
for kind in proc sysfs; do busybox mount -t $kind $kind /root/${kind%%fs}; done
busybox mount -t devtmpfs dev /root/dev
busybox mkdir -p /root/dev/pts /root/run/sshd
busybox mount -t devpts devpts /root/dev/pts
busybox mount -t tmpfs run /root/tmp
busybox ip link set lo up
busybox ip addr add 10.0.2.15/24 dev eth0
busybox ip link set eth0 up
echo sshd:x:74:74::/run/sshd:/bin/false >>/root/etc/passwd
busybox cp /root/opt/peers/key* /root/run/
busybox chmod 600 /root/run/key
busybox chroot /root %s &
echo ready >&3
while :; do busybox sleep 1000; done
"""

SSHD = "/usr/sbin/sshd -D -e -f /opt/peers/sshd_config"
AGENT = "/usr/sbin/qemu-ga -m virtio-serial -p /dev/vport0p2"

SSHD_CONFIG = """
HostKey /run/key
AuthorizedKeysFile /run/key.pub
StrictModes no
UsePAM no
PidFile none
UseDNS no
Subsystem sftp /usr/lib/openssh/sftp-server
"""


class Guest:
    """One at a time; `forwarded` is the port of this host that leads to the guest's 22, `agent` a socket's path."""

    def __init__(self, directory: Path, service: str) -> None:
        if not PROGRAMS.is_dir():
            raise Cannot(f"its guest's programs are not in {PROGRAMS.name}/ beside Python: make peers")
        self.key, self.agent = directory / "key", directory / "agent"
        output_of(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.key])
        self._image = byre_images.ensure()
        self._initrd, self._more = directory / "initrd", directory / "more.squashfs"
        self._initrd.write_bytes(floor.initramfs(self._image, SCRIPT % service, MODULES))
        packed = io.BytesIO()
        self._files().write(packed)
        output_of(["tar2sqfs", "-q", "-s", "-c", "lz4", self._more], stdin=packed.getvalue())
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    def _files(self) -> Tree:
        tree = Tree()
        programs = ("usr/sbin/sshd", "usr/sbin/qemu-ga", "usr/lib/openssh/sftp-server")
        libraries = ":".join(str(PROGRAMS / base / "x86_64-linux-gnu") for base in ("lib", "usr/lib"))
        for name in programs:
            tree.file(name, (PROGRAMS / name).read_bytes(), 0o755)
            listed = output_of(["env", f"LD_LIBRARY_PATH={libraries}", "ldd", PROGRAMS / name]).decode()
            for library in re.findall(r"=> (/\S+)", listed):
                data = Path(library).read_bytes()
                tree.file(f"usr/lib/x86_64-linux-gnu/{Path(library).name}", data, 0o755)
        tree.file("opt/peers/sshd_config", SSHD_CONFIG)
        for key in (self.key, self.key.with_suffix(".pub")):
            tree.file(f"opt/peers/{key.name}", key.read_bytes(), 0o600)
        return tree

    def start(self) -> None:
        """QEMU's start to the guest's word that its service was started."""
        ours, theirs = socket.socketpair()
        self.agent.unlink(missing_ok=True)
        self.port = free_port()
        command = floor.command_line(self._image, "pc", str(self._initrd), theirs.fileno(), ACCELERATOR)
        for number, disk in enumerate((self._image.root, self._more)):
            command += ["-drive", f"id=d{number},if=none,format=raw,readonly=on,file={disk}"]
            command += ["-device", f"virtio-blk-pci,drive=d{number}"]
        command += ["-netdev", f"user,id=n,restrict=on,hostfwd=tcp:127.0.0.1:{self.port}-:22"]
        command += ["-device", "virtio-net-pci,netdev=n,romfile="]
        command += ["-chardev", f"socket,id=a,path={self.agent},server=on,wait=off"]
        command += ["-device", "virtserialport,chardev=a,name=org.qemu.guest_agent.0"]
        with ours, theirs:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),))
            theirs.close()
            if not ours.recv(64):
                raise RuntimeError("QEMU ended while it booted")

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = None


def free_port() -> int:
    """A TCP port that nothing listens on at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
