"""What a VM, and the process of its emulator, can reach: read from the kernel, not from the command line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.namespaces import needs_user_namespaces

pytestmark = pytest.mark.vm


async def test_the_vm_has_no_network_but_itself(vm: Any) -> None:
    done = await vm.run(["ls", "/sys/class/net"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["lo"]


async def test_the_emulator_is_confined_by_seccomp_and_gains_no_privileges(vm: Any) -> None:
    for task in Path(f"/proc/{vm.machine_pid}/task").iterdir():
        status = (task / "status").read_text()
        assert "Seccomp:\t2" in status
        assert "NoNewPrivs:\t1" in status


@needs_user_namespaces
async def test_the_emulator_has_namespaces_of_its_own_and_no_capability(vm: Any) -> None:
    pid = vm.machine_pid
    for kind in ("user", "net", "ipc", "uts"):
        assert os.readlink(f"/proc/{pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}"), kind
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    assert {status[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    devices = Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]
    assert [line.split(":")[0].strip() for line in devices] == ["lo"]


async def test_the_emulator_writes_to_no_file_but_the_template_and_holds_no_network_socket(vm: Any) -> None:
    inodes = set()
    for entry in Path(f"/proc/{vm.machine_pid}/fd").iterdir():
        target = os.readlink(entry)
        if target.startswith("socket:["):
            inodes.add(target[len("socket:[") : -1])
        flags = int(
            Path(f"/proc/{vm.machine_pid}/fdinfo/{entry.name}").read_text().split("flags:")[1].split()[0], 8
        )
        # /memfd: is what it was handed, sealed: the secret of a VM on vsock.
        if (
            target.startswith("/")
            and not target.startswith(("/dev/", "/memfd:"))
            and flags & os.O_ACCMODE != os.O_RDONLY
        ):
            # QEMU 7.2: SPECIFICATION.md, S27.  The template may have been made anew since.
            assert target.removesuffix(" (deleted)").endswith("/memory"), target
    for family in ("tcp", "tcp6", "udp", "udp6", "raw", "raw6", "packet"):
        table = Path(f"/proc/{vm.machine_pid}/net/{family}")
        used = (
            {word for line in table.read_text().splitlines() for word in line.split()} if table.exists() else set()
        )
        assert not inodes & used, family
