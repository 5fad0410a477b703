"""What a machine boots, and on what; checked before anything starts, where that is cheap.

Rule: "auto" means what this host can really do; any other choice is required and never replaced in silence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from byre.errors import InvalidRequest, MachineFailed

if TYPE_CHECKING:
    from pathlib import Path

    from byre.machines.disks import Disk

#: With less, kernel, initramfs and agent do not fit and the guest panics at boot.
MIN_MEMORY_MIB = 128
#: microvm and q35 take 288; more than this on one host is a typing error.
MAX_CPUS = 64
#: The x86 kernel's COMMAND_LINE_SIZE, with its final NUL; it cuts the rest off in silence.
MAX_COMMAND_LINE = 2048

ACCELERATORS = ("auto", "kvm", "tcg")
MACHINES = ("auto", "microvm", "pc", "q35")
TRANSPORTS = ("auto", "virtio-serial", "vsock", "serial")


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What `Machine.save` wrote of a machine.  Any number of machines like it go on from there: each copies what it
    writes, page by page, and the files stay as they are.

    memory, state   the files
    disks           that it had then, and that have to be there again
    host_gone       what its guest writes to the console when it notices that the host that it was saved with is not
                    there any more, after which it takes another one; "": it was saved without a host
    """

    memory: Path
    state: Path
    disks: tuple[Disk, ...] = ()
    host_gone: str = ""


@dataclass(frozen=True, kw_only=True)
class MachineConfig:
    """What to boot and on what hardware."""

    #: An uncompressed ELF kernel with a PVH entry, a cpio archive, and a root file system (/dev/vda inside).
    kernel: Path
    initramfs: Path
    root: Path
    memory_mib: int = 512
    cpus: int = 1
    accelerator: str = "auto"
    machine: str = "auto"
    transport: str = "auto"
    #: Appended to the kernel's command line: the last one wins.
    kernel_arguments: tuple[str, ...] = ()
    #: Where the machine goes on; None: it boots.
    saved: Saved | None = None
    #: QEMU's -cpu; empty takes "host" under KVM and "max" under emulation.
    cpu: str = ""

    def check(self) -> None:
        """Raise InvalidRequest for wrong values, MachineFailed for files that cannot be read."""
        for name, known in (("accelerator", ACCELERATORS), ("machine", MACHINES), ("transport", TRANSPORTS)):
            if getattr(self, name) not in known:
                raise InvalidRequest(f"unknown {name} {getattr(self, name)!r}", hint=f"one of {', '.join(known)}")
        if self.memory_mib < MIN_MEMORY_MIB:
            raise InvalidRequest(
                f"{self.memory_mib} MiB of memory are too little to boot in",
                hint=f"give {MIN_MEMORY_MIB} MiB or more",
            )
        if not 1 <= self.cpus <= MAX_CPUS:
            raise InvalidRequest(f"{self.cpus} virtual CPUs are not possible", hint=f"between 1 and {MAX_CPUS}")
        for name in ("kernel", "initramfs", "root"):
            _check_readable(name, getattr(self, name))


def _check_readable(name: str, path: Path) -> None:
    try:
        with path.open("rb") as file:
            problem = "" if file.read(1) else "it is empty"
    except OSError as error:
        problem = error.strerror or str(error)
    if problem:
        raise MachineFailed(
            f"cannot read the guest's {name} {path}: {problem}",
            hint="build the guest image: byre image build",
            path=str(path),
        )
