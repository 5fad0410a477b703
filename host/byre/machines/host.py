"""What this host has for running machines, and what to do about what it lacks: the facts behind `byre doctor`.

Rule: it asks the same functions as a start does, so that the report and the behaviour cannot differ.  It only
looks; it changes nothing.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from byre.machines import namespaces
from byre.machines.accelerators import kvm_problem
from byre.machines.clock import tsc_khz
from byre.machines.command_line import QEMU, choose_machine
from byre.machines.config import MachineConfig
from byre.machines.qemu import OLDEST_QEMU, TOOLS
from byre.networks.slirp import SLIRP
from byre.shares.server import DIOD
from byre.transports.choice import choose_transport
from byre.transports.vsock import Vsock
from byre_images.tools import PACKAGE_OF, SEARCH

#: Asking QEMU for its version takes 0.1 s.
_VERSION_TIMEOUT = 20.0

#: There where the kernel knows filters (seccomp(2)).
_SECCOMP = Path("/proc/sys/kernel/seccomp/actions_avail")


@dataclass(frozen=True)
class HostFact:
    """One line of the report: ``ok`` is False only for what keeps byre from working."""

    name: str
    ok: bool
    detail: str
    hint: str = ""


@dataclass(frozen=True)
class HostReport:
    """All facts, in the order in which they matter."""

    facts: tuple[HostFact, ...]

    @property
    def ok(self) -> bool:
        """Whether a machine can run here."""
        return all(fact.ok for fact in self.facts)


def describe_host() -> HostReport:
    """Look at everything.  Blocks: up to some seconds the first time after a boot."""
    return HostReport(
        (
            *(*_tools(), _accelerator(), _machine(), *_transports()),
            *(_namespaces(), _sandbox(), _user(), _memory()),
            *(*_optional(), *_builder_tools()),
        )
    )


def qemu_version() -> tuple[int, int, int] | None:
    """Of the QEMU that would be used; None if there is none, or if it does not say."""
    try:
        done = subprocess.run(
            [QEMU, "--version"],
            check=False,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_VERSION_TIMEOUT,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"version (\d+)\.(\d+)\.(\d+)", done.stdout)
    return (int(found[1]), int(found[2]), int(found[3])) if found else None


def _tools() -> list[HostFact]:
    facts = []
    for tool, package in TOOLS.items():
        path = shutil.which(tool)
        hint = "" if path else f"apt install {package}"
        detail = path or "not installed"
        ok = path is not None
        if tool == QEMU and ok:
            version = qemu_version()
            oldest = ".".join(map(str, OLDEST_QEMU))
            detail = f"{path}, version {'.'.join(map(str, version)) if version else 'unknown'} ({oldest} or later)"
            ok = version is not None and version >= OLDEST_QEMU
            hint = "" if ok else f"install QEMU {oldest} or later"
        facts.append(HostFact(tool, ok, detail, hint))
    return facts


def _accelerator() -> HostFact:
    if platform.machine() != "x86_64":
        return HostFact("accelerator", False, f"{platform.machine()} is not supported", "use an x86-64 host")
    problem = kvm_problem()
    if problem is None:
        return HostFact("accelerator", True, "kvm: a virtual CPU ran")
    return HostFact("accelerator", True, f"tcg, slow; KVM cannot be used: {problem}")


def _machine() -> HostFact:
    accelerator = "kvm" if kvm_problem() is None else "tcg"
    choices, reason = choose_machine("auto", accelerator, tsc_khz())
    return HostFact("machine", True, f"{choices.machine}: {reason}")


def _transports() -> list[HostFact]:
    transport, reason = choose_transport("auto", "kvm" if kvm_problem() is None else "tcg")
    vsock = Vsock.unavailable()
    return [
        HostFact("transport", True, f"{transport.name}: {reason}"),
        HostFact("vsock", True, "available" if vsock is None else f"not available: {vsock}"),
    ]


def _namespaces() -> HostFact:
    """Not fatal: without them QEMU runs in those of its user."""
    refused = namespaces.problem()
    if refused is None:
        return HostFact("namespaces", True, "QEMU has its own: users, network, IPC, host name")
    return HostFact("namespaces", True, f"QEMU has its user's: {refused}", namespaces.HINT)


def _sandbox() -> HostFact:
    """QEMU does not start without: it is always told to."""
    ok = _SECCOMP.exists()
    hint = "" if ok else "use a kernel with CONFIG_SECCOMP_FILTER"
    return HostFact(
        "sandbox", ok, "seccomp filters are there" if ok else "this kernel has no seccomp filters", hint
    )


def _user() -> HostFact:
    if os.geteuid() == 0:
        hint = "files that are root's own are QEMU's to open; an ordinary user can run byre too"
        return HostFact("user", True, "QEMU runs as root", hint)
    return HostFact("user", True, f"QEMU runs as you, user {os.geteuid()}")


def _memory() -> HostFact:
    needed = MachineConfig.memory_mib
    try:
        text = Path("/proc/meminfo").read_text()
        available = int(text.partition("MemAvailable:")[2].split()[0]) // 1024
    except (OSError, ValueError, IndexError):
        return HostFact("memory", True, "unknown")
    ok = available >= needed
    hint = "" if ok else f"a machine takes up to {needed} MiB unless told otherwise"
    return HostFact("memory", ok, f"{available} MiB available, {os.cpu_count()} CPUs", hint)


def _optional() -> list[HostFact]:
    """Not fatal: images can be imported from archives, and most VMs share no directory and have no network."""
    facts = []
    for tool, search, use in (  # None: the user's own PATH, as where it is used
        ("skopeo", None, "to pull images"),
        (DIOD, SEARCH, "to share directories (-v)"),
        (SLIRP, None, "for networks that lead out (--net user)"),
    ):
        path = shutil.which(tool, path=search)
        facts.append(HostFact(tool, True, path or "not installed", "" if path else f"apt install {tool}, {use}"))
    return facts


def _builder_tools() -> list[HostFact]:
    """Not fatal: a host without them imports an image that was exported elsewhere."""
    facts = []
    for tool, package in PACKAGE_OF.items():
        path = shutil.which(tool, path=SEARCH)
        hint = "" if path else f"apt install {package}, to build the guest image here"
        facts.append(HostFact(tool, True, path or "not installed", hint))
    return facts
