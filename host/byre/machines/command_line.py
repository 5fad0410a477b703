"""QEMU's command line: a pure function of what was chosen.  Nothing here looks at the host or starts anything.

Rule: every value that is not ours (a path) goes in as JSON or as an argument of its own, because QEMU's older
syntax splits at commas.  No device that is not listed, no configuration of the user's, no monitor but QMP, and a
seccomp filter that lets QEMU start no program.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from byre.errors import InvalidRequest
from byre.machines.config import MAX_COMMAND_LINE
from byre.machines.scsi import CONTROLLER, device, node

if TYPE_CHECKING:
    from collections.abc import Sequence

    from byre.machines.config import MachineConfig

QEMU = "qemu-system-x86_64"

#: Translated code under emulation, in MiB.  32 costs 5 % of a boot, 128 gains nothing; the default takes up
#: to 1 GiB of the host's memory for each machine.
_TB_SIZE_MIB = 64

#: All that the emulator knows but "fast" string instructions: with them libc and the kernel copy by `rep movsb`,
#: which the emulator does byte by byte: 64 KiB take 120 to 230 us instead of 20 to 33.
EMULATED_CPU = "max,-erms,-fsrm"

_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

#: Without rtc, pit and pic an emulated microvm hangs at boot, calibrating its clocks (see `clock`).
_MICROVM = "microvm,rtc=on,pit=on,pic=on"

#: quiet: the emulated serial line is slow.  panic=-1 with -no-reboot: a panic ends the machine at once, its text
#: being on the console.  reboot=t: by triple fault, which every machine type understands.
_KERNEL = ("console=ttyS0", "quiet", "panic=-1", "reboot=t", "root=/dev/vda", "ro")

#: For a counter whose rate is known.  The kernel's watchdog compares it with timer interrupts, of which a busy host
#: delivers too few; it then takes the counter for broken and counts those interrupts instead, and time runs slow.
_KERNEL_EMULATED = ("tsc=reliable",)

#: Options and their values for a disk that is there from the start.
_DISK = (("-blockdev", node), ("-device", device))

#: microvm has no PCI.  The kernel would look for it at every place of 256 buses, by 33,000 port accesses.
_KERNEL_MICROVM = ("pci=off",)


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What `choose_machine` and its like have settled."""

    accelerator: str
    machine: str
    #: The rate of the host's counter, for an emulated guest; None: the guest has to find out (never on microvm).
    tsc_khz: int | None = None

    @property
    def bus(self) -> str:
        """The last part of the virtio devices' names."""
        return "device" if self.machine == "microvm" else "pci"


def choose_machine(wanted: str, accelerator: str, tsc_khz: int | None) -> tuple[Choices, str]:
    """The machine type and why.  `tsc_khz` is the measured rate of the host's counter, None if there is none."""
    reason = "it was asked for"
    if wanted == "auto":
        if accelerator == "kvm" or tsc_khz is not None:
            wanted, reason = "microvm", "it boots fastest"
        else:
            wanted, reason = "pc", "the host's time-stamp counter could not be measured"
    if wanted == "microvm" and accelerator == "tcg" and tsc_khz is None:
        raise InvalidRequest(
            "an emulated microvm needs the rate of the host's time-stamp counter, and it could not be measured",
            hint="use machine 'auto' or 'pc'",
        )
    return Choices(
        accelerator=accelerator, machine=wanted, tsc_khz=tsc_khz if accelerator == "tcg" else None
    ), reason


def kernel_command_line(config: MachineConfig, choices: Choices, channel: str) -> str:
    """What the guest's kernel is told."""
    words = [*_KERNEL, channel]
    if choices.tsc_khz is not None:
        words += [f"tsc_early_khz={choices.tsc_khz}", *_KERNEL_EMULATED]
    if choices.machine == "microvm":
        words += _KERNEL_MICROVM
    line = " ".join((*words, *config.kernel_arguments))
    if len(line.encode()) >= MAX_COMMAND_LINE:
        raise InvalidRequest(f"the kernel's command line is longer than {MAX_COMMAND_LINE - 1} bytes")
    return line


def qemu_command(
    config: MachineConfig,
    choices: Choices,
    *,
    name: str,
    qmp_fd: int,
    console_fd: int,
    transport: Sequence[str],
    channel: str,
) -> list[str]:
    """The whole command.  `transport` and `channel` are a `Wiring`'s arguments and kernel argument."""
    bus = choices.bus
    root = {
        "driver": "raw",
        "node-name": "root",
        "read-only": True,
        "file": {"driver": "file", "filename": str(config.root)},
    }
    root_device = {
        "driver": f"virtio-blk-{bus}",
        "drive": "root",
        "serial": "root",
        "werror": "report",
        "rerror": "report",
    }
    return [
        *(QEMU, "-name", f"byre-{name}", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-sandbox", _SANDBOX),
        *("-machine", f"{_machine(choices)},memory-backend=memory0,dump-guest-core=off,suppress-vmdesc=on"),
        *("-global", "migration.send-configuration=off"),
        *("-accel", _accel(config, choices)),
        *("-cpu", config.cpu or ("host" if choices.accelerator == "kvm" else EMULATED_CPU)),
        *("-smp", str(config.cpus), "-object", json.dumps(_memory(config)), "-m", f"{config.memory_mib}M"),
        *("-kernel", str(config.kernel), "-initrd", str(config.initramfs)),
        *("-append", kernel_command_line(config, choices, channel)),
        *("-chardev", f"socket,id=qmp,fd={qmp_fd}", "-mon", "chardev=qmp,mode=control"),
        *("-chardev", f"socket,id=console,fd={console_fd}", "-serial", "chardev:console"),
        *("-blockdev", json.dumps(root), "-device", json.dumps(root_device)),
        *("-device", f"virtio-scsi-{bus},id={CONTROLLER}", "-device", f"virtio-rng-{bus}"),
        *_balloon(choices),
        *transport,
        *_saved(config),
    ]


def _saved(config: MachineConfig) -> list[str]:
    """What a machine needs to go on from where another one was saved: its disks, at their places.  The descriptors
    of those that are open files are QEMU's, under the same numbers."""
    if config.saved is None:
        return []
    files = [f"fd={disk.file},set={disk.target}" for disk in config.saved.disks if disk.file is not None]
    parts = [(option, make(disk)) for disk in config.saved.disks for option, make in _DISK]
    options = [*(("-add-fd", file) for file in files), *((option, json.dumps(part)) for option, part in parts)]
    return ["-incoming", "defer", *(word for option in options for word in option)]


def _memory(config: MachineConfig) -> dict[str, object]:
    """Anonymous memory, or a private copy of a file, page by page on write.

    A private copy must give nothing back (balloon, page reporting): QEMU would punch the holes into the file.
    """
    memory: dict[str, object] = {"id": "memory0", "size": config.memory_mib * 1024 * 1024}
    if config.saved is None:
        return {"qom-type": "memory-backend-ram", **memory}
    return {"qom-type": "memory-backend-file", **memory, "mem-path": str(config.saved.memory), "share": False}


def _balloon(choices: Choices) -> tuple[str, ...]:
    """The guest takes memory back before it kills for want of it.  A clone has it because it was saved with it."""
    return ("-device", f"virtio-balloon-{choices.bus},id=balloon0,deflate-on-oom=on")


def _machine(choices: Choices) -> str:
    return _MICROVM if choices.machine == "microvm" else choices.machine


def _accel(config: MachineConfig, choices: Choices) -> str:
    if choices.accelerator == "kvm":
        return "kvm"
    return f"tcg,thread={'multi' if config.cpus > 1 else 'single'},tb-size={_TB_SIZE_MIB}"
