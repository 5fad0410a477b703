"""What a saved state depends on: the whole command line, the files and programs in it, and this host's processor.

Rule: better a state that is made anew than one that does not fit.  What is not sure to make no difference is in
here.  Contents are known by their files' inodes, times and sizes, because reading them would take longer than a
clone; nothing is started (QEMU's own word on its version takes 0.1 s).
"""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byre.machines.base import Identity
from byre.machines.command_line import QEMU, Choices, qemu_command

if TYPE_CHECKING:
    from byre.machines.config import MachineConfig

#: Of /proc/cpuinfo: what "host" as the guest's CPU follows, microcode with it.
_CPU_FIELDS = ("vendor_id", "cpu family", "model", "model name", "stepping", "microcode", "flags")


def identity(config: MachineConfig, choices: Choices, transport: str, rough_khz: int | None) -> Identity:
    """Of the machine that a cold boot would make of these.  Raises OSError for files that are not there."""
    plain = dataclasses.replace(config, saved=None)
    timeless = dataclasses.replace(choices, tsc_khz=None)
    command = qemu_command(plain, timeless, name="", qmp_fd=0, console_fd=0, transport=(), channel=transport)
    program = shutil.which(QEMU)
    facts = {
        "command": command,
        "files": [file_identity(path) for path in (config.kernel, config.initramfs, config.root)],
        "qemu": file_identity(Path(program)) if program else None,
        "host": [platform.machine(), os.uname().release, cpu()],
    }
    return Identity(facts=facts, tsc_khz=rough_khz if choices.accelerator == "tcg" else None)


def file_identity(path: Path) -> list[Any]:
    """What changes when the file, or what a link leads to, is written or replaced."""
    path = path.resolve()
    status = path.stat()
    return [str(path), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def cpu() -> dict[str, str]:
    """The first processor of /proc/cpuinfo, as far as guests see it; {} where it cannot be read."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            first = file.read().partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    found = {name.strip(): value.strip() for name, _, value in pairs}
    return {name: found[name] for name in _CPU_FIELDS if name in found}
