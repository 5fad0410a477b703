"""The agent as PID 1 of a virtual machine: what a machine needs before its first process, and its end.

    early    what the channel needs: /proc, /sys, the channel's modules; then the host is greeted
    late     the rest, while the greeting is on its way: file systems, cgroups, lo, settings

Rule: a step that fails ends the VM, and the console says which.  A VM whose agent has gone must not linger.
Nothing is taken from the image that could be had from the kernel: no ip, no modprobe, no mount.
"""

from __future__ import annotations

import os
from time import monotonic

from . import linux, modules, trees
from .linux import MS_NODEV, MS_NOEXEC, MS_NOSUID

#: source, target, file system, flags, data; in this order.
EARLY_MOUNTS = (
    ("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, ""),
    ("sys", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, ""),
)
#: /run holds what containers are made of, and is theirs to fill up to a share of the memory; what is in their
#: overlays has a size of its own.
LATE_MOUNTS = (
    ("run", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755,size=25%"),
    ("tmp", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777,size=25%"),
    ("layers", "/l", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0700,size=1m"),
    ("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "gid=5,mode=620,ptmxmode=666"),
    ("shm", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777,size=50%"),
    ("mqueue", "/dev/mqueue", "mqueue", MS_NOSUID | MS_NODEV | MS_NOEXEC, ""),
    ("cgroup", "/sys/fs/cgroup", "cgroup2", MS_NOSUID | MS_NODEV | MS_NOEXEC, "nsdelegate,memory_recursiveprot"),
)
DEVICE_LINKS = {
    "/dev/fd": "/proc/self/fd",
    "/dev/stdin": "/proc/self/fd/0",
    "/dev/stdout": "/proc/self/fd/1",
    "/dev/stderr": "/proc/self/fd/2",
}

#: Grace periods by interrupt instead of waiting 10 to 40 ms each; modules, cgroups and unmounting wait for them.
#: With a few processors the interrupts cost nothing.
RCU_EXPEDITED = "/sys/kernel/rcu_expedited"

#: Settings that differ from the kernel's default, each with its reason.
SETTINGS = {
    "/proc/sys/kernel/sysrq": "1",  # the host can have stacks through the console when the agent is stuck
    "/proc/sys/kernel/panic": "-1",  # a panic ends the VM at once
    "/proc/sys/net/ipv4/ping_group_range": "0 2147483647",  # ping without privileges, as container users expect
}

CGROUPS = "/sys/fs/cgroup"
CONTROLLERS = "+cpu +memory +pids +io"

#: Memory that containers and processes together cannot have: the agent's own, its page cache, the kernel's.
RESERVE = 64 * 1024 * 1024
#: Memory of the agent that is never reclaimed: about twice what it uses.
AGENT_MINIMUM = 32 * 1024 * 1024

ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
}

#: The kernel argument that names the channel: `virtio-serial` (the default) or `vsock:CID:PORT`.
CHANNEL_ARGUMENT = "byre.channel="

#: Modules by the kind of channel.
CHANNEL_MODULES = {
    "virtio-serial": ("virtio_console",),
    "vsock": ("vmw_vsock_virtio_transport", "qemu_fw_cfg"),
}


class Timeline:
    """When each step of the boot was done, in seconds of the monotonic clock (0 is the kernel's start)."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, float]] = []

    def done(self, name: str) -> None:
        """Say that a step is done."""
        self.steps.append((name, monotonic()))


def early(timeline: Timeline) -> str:
    """Make the channel reachable; returns its name from the kernel's command line."""
    os.umask(0o022)
    os.environ.clear()
    os.environ.update(ENVIRONMENT)
    os.chdir("/")
    for arguments in EARLY_MOUNTS:
        linux.mount(*arguments)
    _write(RCU_EXPEDITED, "1")
    timeline.done("proc and sys")
    channel = channel_argument(_read("/proc/cmdline"))
    modules.load(*CHANNEL_MODULES[channel.partition(":")[0]])
    timeline.done("channel modules")
    return channel


def channel_argument(command_line: str) -> str:
    """The channel that a kernel command line names.  Raises ValueError for one that there is not."""
    named = [word[len(CHANNEL_ARGUMENT) :] for word in command_line.split() if word.startswith(CHANNEL_ARGUMENT)]
    channel = named[-1] if named else "virtio-serial"
    kind, _, address = channel.partition(":")
    parts = address.split(":")
    if kind == "vsock" and len(parts) == 2 and all(part.isdigit() for part in parts):
        return channel
    if channel != "virtio-serial":
        raise ValueError(f"the kernel argument {CHANNEL_ARGUMENT}{channel} names no channel")
    return channel


def late(timeline: Timeline) -> None:
    """The rest of the machine."""
    linux.reboot(linux.RB_DISABLE_CAD)
    for source, target, filesystem, flags, data in LATE_MOUNTS:
        if not os.path.isdir(target):
            os.mkdir(target)
        linux.mount(source, target, filesystem, flags, data)
    for link, target in DEVICE_LINKS.items():
        os.symlink(target, link)
    timeline.done("file systems")
    for path, value in SETTINGS.items():
        _write(path, value)
    set_up_cgroups()
    timeline.done("cgroups")
    linux.interface_up("lo")
    linux.sethostname("byre")
    timeline.done("settings")


def set_up_cgroups(root: str = CGROUPS) -> None:
    """The agent, the VM's processes and all containers: three cgroups, of which the first one has a reserve."""
    _write(f"{root}/cgroup.subtree_control", CONTROLLERS)
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = str(max(available - RESERVE, available // 2))
    for name in (os.path.basename(trees.VM_PROCESSES), "containers"):
        os.mkdir(f"{root}/{name}")
        _write(f"{root}/{name}/memory.max", limit)
    _write(f"{root}/containers/cgroup.subtree_control", CONTROLLERS)
    os.mkdir(f"{root}/agent")
    _write(f"{root}/agent/memory.min", str(AGENT_MINIMUM))
    _write(f"{root}/agent/cgroup.procs", "1")


def fatal(message: str) -> None:
    """Say on the console why there is no agent any more, and end the VM.  Does not return."""
    try:
        with open("/dev/console", "wb", buffering=0) as console:
            console.write(f"\r\nbyre: the agent ends: {message}\r\n".replace("\n", "\r\n").encode(errors="replace"))
    except OSError:
        pass
    # A restart ends a QEMU that runs with -no-reboot, on every machine type; power-off needs ACPI.
    linux.reboot(linux.RB_AUTOBOOT)


def _read(path: str) -> str:
    with open(path, encoding="ascii", errors="replace") as file:
        return file.read()


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}: writing {text!r}", path) from error
    finally:
        os.close(fd)
