"""Which accelerator really runs a guest on this host, and why.

Rule: /dev/kvm that opens proves nothing.  First what is cheap (architecture, CPU flags, the device), each time
anew, because it changes (a group is joined, a module loaded); then a virtual CPU that runs (`kvm_probe`) against a
deadline, whose answer is remembered: for this process, and under the cache directory until the next boot.
"""

from __future__ import annotations

import functools
import logging
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from byre.errors import AcceleratorUnavailable, NotSupported
from byre.machines import kvm_probe
from byre.machines.clock import cpu_flags
from byre_proto.errors import printable

logger = logging.getLogger(__name__)

#: Python's start and three instructions take 0.1 s; a vCPU that does not run never ends.
PROBE_TIMEOUT = 5.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
#: Intel's and AMD's.
_VIRTUALIZATION_FLAGS = {"vmx", "svm"}


@dataclass(frozen=True)
class Accelerator:
    """``name`` is "kvm" or "tcg"; ``reason`` says why it was chosen."""

    name: str
    reason: str


def choose_accelerator(wanted: str) -> Accelerator:
    """For "auto", "kvm" or "tcg".  AcceleratorUnavailable with the reason if what is required cannot run.

    May block for `PROBE_TIMEOUT`, once.
    """
    if platform.machine() != "x86_64":
        raise NotSupported(f"guests run on x86-64 hosts only, not on {platform.machine()}")
    if wanted == "tcg":
        return Accelerator("tcg", "it was asked for")
    problem = kvm_problem()
    if problem is None:
        return Accelerator("kvm", "a virtual CPU ran")
    if wanted == "kvm":
        raise AcceleratorUnavailable(
            f"KVM cannot be used: {problem}", hint="use accelerator 'auto' or 'tcg', or see: byre doctor"
        )
    _say_once(problem)
    return Accelerator("tcg", f"KVM cannot be used: {problem}")


@functools.cache
def _say_once(problem: str) -> None:
    logger.info("= no KVM, so guests are emulated, which is slow: %s", problem)


def kvm_problem() -> str | None:
    """Why KVM cannot run a guest here; None if it can."""
    flags = cpu_flags()
    if not flags:
        return "the CPU's flags could not be read from /proc/cpuinfo"
    if not flags & _VIRTUALIZATION_FLAGS:
        return (
            "the CPU shows no virtualization extension (neither vmx nor svm in /proc/cpuinfo); "
            "it is switched off in the firmware, or this is a virtual machine without nested virtualization"
        )
    try:
        os.close(os.open(kvm_probe.DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"{kvm_probe.DEVICE}: {error.strerror}{_HINTS.get(type(error), '')}"
    answer = _remembered_run()
    return None if answer == "ok" else answer


_HINTS = {
    PermissionError: "; add the user to its group (adduser $USER kvm), and log in again",
    FileNotFoundError: "; load the module kvm_intel or kvm_amd, or pass the device into this container",
}


@functools.cache
def _remembered_run() -> str:
    memory = _memory()
    try:
        if memory is not None:
            return memory.read_text()
    except (OSError, UnicodeDecodeError):
        pass
    answer = run_probe([sys.executable, "-I", kvm_probe.__file__])
    if memory is not None:
        try:
            memory.parent.mkdir(parents=True, exist_ok=True)
            temporary = memory.with_suffix(f".{os.getpid()}")
            temporary.write_text(answer)
            temporary.replace(memory)
        except OSError as error:
            logger.debug("! the probe's answer is not remembered: %s", error)
    return answer


def _memory() -> Path | None:
    """Where the answer of this boot and this user is kept; None if the host's boot has no name."""
    try:
        boot = _BOOT_ID.read_text().strip()
    except OSError:
        return None
    base = os.environ.get("XDG_CACHE_HOME", "")
    cache = Path(base) if base.startswith("/") else Path.home() / ".cache"
    return cache / "byre" / f"kvm-{boot}"


def run_probe(argv: list[str], timeout: float = PROBE_TIMEOUT) -> str:
    """What `kvm_probe` printed, or why it printed nothing."""
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)
    except OSError as error:
        return f"the probe could not be started: {error}"
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        try:
            process.communicate(timeout=1.0)
        except subprocess.TimeoutExpired:  # stuck in the kernel; not even SIGKILL ends it, so nobody waits for it
            logger.warning("! the KVM probe, process %d, cannot be killed", process.pid)
        return f"a virtual CPU did not run within {timeout:g} s"
    lines = output.strip().splitlines()
    if lines:
        return printable(lines[-1])
    return printable(f"the probe failed with status {process.returncode}: {errors.strip()[-200:]}")
