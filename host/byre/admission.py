"""How many VMs a pool may have: what they may come to use against what there is (`capacity`).

Rule: memory is taken by every VM from its start to its end, and is counted as what it may use at most.  Processors
are taken by VMs in use only: one that is idle sleeps.
"""

from __future__ import annotations

from collections.abc import Sequence

from . import capacity
from .errors import InvalidRequest

#: What a VM's emulator takes beside the guest's memory, in MiB: 32 of translated code, and its own.
EMULATOR_MIB = 64


class Admission:
    """For VMs of one size.  The limits are those of `Pool`; None: what this host has."""

    def __init__(self, memory_mib: int, cpus: int, max_memory_mib: float | None, max_cpus: float | None) -> None:
        """Raises `InvalidRequest` when the limits let no VM in."""
        self._need = memory_mib + EMULATOR_MIB
        self._cpus = cpus
        self._max_memory = max_memory_mib
        self._max_cpus = max(capacity.usable_cpus(), cpus) if max_cpus is None else max_cpus
        if cpus > self._max_cpus or (max_memory_mib is not None and self._need > max_memory_mib):
            raise InvalidRequest(
                f"one VM may use {cpus} CPUs and {self._need} MiB, and the pool may not",
                hint="raise max_cpus and max_memory_mib, or lower cpus and memory_mib",
            )

    def memory_problem(self, pids: Sequence[int]) -> str:
        """Why there is no memory for one more VM beside those with these emulators (0: not known yet); "" if there
        is."""
        all_of_them = self._need * (len(pids) + 1)
        if self._max_memory is not None:
            left, counted = self._max_memory, "the pool may use"
        else:
            left = capacity.free_memory_mib() + sum(capacity.own_memory_mib(pid) for pid in pids if pid)
            counted = "this host has"
        if all_of_them <= left:
            return ""
        return f"{len(pids)} VMs and another one may use {all_of_them} MiB, and {counted} {left:.0f} MiB"

    def cpu_problem(self, in_use: int) -> str:
        """Why no further VM may be in use beside so many; "" if it may."""
        if (in_use + 1) * self._cpus <= self._max_cpus:
            return ""
        return f"{in_use} VMs of {self._cpus} CPUs are in use, and {self._max_cpus:g} CPUs may be"
