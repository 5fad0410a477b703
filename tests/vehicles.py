"""The vehicles over which the behaviours are shown: one way each to get a `ProcessHost`.

    local   LocalHost: the agent as a child process, no VM
    sync    the same through byre.sync, driven from an event loop by threads
    line    SerialHost: the agent as a program at the end of a tty whose line damages bytes
    cut     SocketHost: the agent on a UNIX socket, the way to it cut again and again
    vm      a VM over virtio-serial, under the emulator
    serial  a VM over its 16550                                (a second run: BYRE_TEST_VEHICLES=serial)
    user    the VM of `vm`, everything run by an ordinary user (a second run: python -m tests.user)
    kvm     a KVM VM over vsock, inside an emulated machine    (a second run: python -m tests.nested)

A run takes its vehicles from BYRE_TEST_VEHICLES; local, sync, line, cut and vm are the default, with `user` in the
place of `vm` where the tests are run by an ordinary user.
"""

from __future__ import annotations

import os

#: Every vehicle, in the order of the table's columns.
ALL = ("local", "sync", "line", "cut", "vm", "serial", "user", "kvm")

#: Vehicles that are a virtual machine, so that containers and the VM's own behaviours can be shown on them.
MACHINES = ("vm", "serial", "user", "kvm")

_NEEDS_VM = "needs a VM"
_NEEDS_CGROUP = "containers need cgroup v2 and a kernel of their own: a VM"

#: What cannot be shown on a vehicle, and why.  Everything else must be shown.
NOT_SHOWN: dict[str, dict[str, str]] = {"local": {}, "sync": {}, "line": {}, "cut": {}}
for _vehicle in NOT_SHOWN:
    NOT_SHOWN[_vehicle]["B13"] = _NEEDS_VM
    NOT_SHOWN[_vehicle].update({f"B{n}": _NEEDS_CGROUP for n in range(20, 31)})
    NOT_SHOWN[_vehicle].update({"B30a": _NEEDS_CGROUP, "B31": _NEEDS_CGROUP})
    NOT_SHOWN[_vehicle].update({f"B{n}": _NEEDS_VM for n in (40, 41, 43, 48, 49, 52, 60, 64)})
NOT_SHOWN["serial"] = {"B64": "filling a scratch takes minutes through a line, and is no affair of the channel"}


def selected() -> tuple[str, ...]:
    """The vehicles of this run."""
    default = "local,sync,line,cut," + ("vm" if os.geteuid() == 0 else "user")
    names = os.environ.get("BYRE_TEST_VEHICLES", default).split(",")
    unknown = set(names) - set(ALL)
    if unknown:
        raise ValueError(f"BYRE_TEST_VEHICLES names {', '.join(sorted(unknown))}; known are {', '.join(ALL)}")
    return tuple(names)


def machine() -> str:
    """The vehicle of this run that is a virtual machine."""
    return next((name for name in selected() if name in MACHINES), "vm")


def places() -> list[str]:
    """Where processes are made in this run: each vehicle itself, and a container in those that are machines."""
    return [p for v in selected() for p in ([v, f"{v}/container"] if v in MACHINES else [v])]
