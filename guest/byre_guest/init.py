"""The agent as PID 1 of a virtual machine: where its host is, and the machine's end.

What a machine needs before its first process (file systems, cgroups, settings, the drivers of a virtio-serial port)
is there when Python starts: the initramfs's `init.c` has made it.

Rule: a step that fails ends the VM, and the console says which.  A VM whose agent has gone must not linger.
"""

from __future__ import annotations

import os
from time import monotonic

from . import linux

CGROUPS = "/sys/fs/cgroup"

#: The kernel argument that names the channel: `virtio-serial` (the default), `vsock:CID:PORT`, `serial:TTY[:BAUD]`.
CHANNEL_ARGUMENT = "byre.channel="

#: Modules by the kind of channel, besides what the initramfs has loaded.
CHANNEL_MODULES: dict[str, tuple[str, ...]] = {
    "virtio-serial": (),
    "vsock": ("vmw_vsock_virtio_transport", "qemu_fw_cfg"),
    "serial": (),  # Debian's kernel has the 16550's driver in it
}


class Timeline:
    """When each step of the boot was done, in seconds of the monotonic clock (0 is the kernel's start)."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, float]] = []

    def done(self, name: str) -> None:
        """Say that a step is done."""
        self.steps.append((name, monotonic()))


def set_environment() -> None:
    """What programs get.  Python itself was started without a locale, to read no files of one."""
    del os.environ["LC_ALL"]
    os.environ["LANG"] = "C.UTF-8"


def channel(timeline: Timeline) -> str:
    """The name of the channel, from the kernel's command line; its drivers are loaded."""
    with open("/proc/cmdline", "rb", buffering=0) as file:
        name = channel_argument(file.read().decode("ascii", "replace"))
    drivers = CHANNEL_MODULES[name.partition(":")[0]]
    if drivers:
        from . import modules

        modules.load(*drivers)
    timeline.done("channel modules")
    return name


def channel_argument(command_line: str) -> str:
    """The channel that a kernel command line names.  Raises ValueError for one that there is not."""
    named = [word[len(CHANNEL_ARGUMENT) :] for word in command_line.split() if word.startswith(CHANNEL_ARGUMENT)]
    channel = named[-1] if named else "virtio-serial"
    kind, _, address = channel.partition(":")
    parts = address.split(":")
    if kind == "vsock" and len(parts) == 2 and all(part.isdigit() for part in parts):
        return channel
    if kind == "serial" and len(parts) <= 2 and parts[0].isalnum() and all(p.isdigit() for p in parts[1:]):
        return channel
    if channel != "virtio-serial":
        raise ValueError(f"the kernel argument {CHANNEL_ARGUMENT}{channel} names no channel")
    return channel


def say(message: str) -> None:
    """Write to the console."""
    try:
        with open("/dev/console", "wb", buffering=0) as console:
            console.write(f"\r\n{message}\r\n".replace("\n", "\r\n").encode(errors="replace"))
    except OSError:
        pass


def fatal(message: str) -> None:
    """Say on the console why there is no agent any more, and end the VM.  Does not return."""
    say(f"byre: the agent ends: {message}")
    # A restart ends a QEMU that runs with -no-reboot, on every machine type; power-off needs ACPI.
    linux.reboot(linux.RB_AUTOBOOT)
