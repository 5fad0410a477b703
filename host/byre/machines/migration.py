"""Saving the state of a QEMU's devices, and loading it, without the memory (`guest_memory` has that).

Rule: files are handed over as descriptors: the form of QEMU's migration that would run a shell is forbidden to it,
and no path is parsed.

QEMU's own migration would write all of a private memory, and stop the guest for as long.  So the state is saved by
the command that Xen has for it, "of all devices, not of the RAM", and loaded as a migration without a RAM section,
for which both sides leave out the configuration and the description (`command_line`).  What QEMU has besides the
guest's memory is the firmware and its tables, which no guest needs after its boot: a restart ends the machine.

Source: `xen-save-devices-state`, `migrate-incoming`, `add-fd` and MIGRATION in QEMU's QMP reference.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, BinaryIO

from byre.errors import DeadlineExceeded, MachineFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from byre.machines.scsi import Execute

#: A state is some 17 to 60 kB, loaded in 10 ms; a loaded host may take a second.
TIMEOUT = 30.0

#: Tells of the end, so that nobody has to ask again and again.
_CAPABILITIES = [{"capability": "events", "state": True}]

_ENDS = ("completed", "failed", "cancelled")


class Migration:
    """Of one machine.  `load` is for once; the machine's end ends it too."""

    def __init__(self, execute: Execute) -> None:
        self._execute = execute
        self._ended = asyncio.Event()
        self._status = ""

    async def save(self, send_fd: Callable[[int], None], state: BinaryIO) -> None:
        """Stop the machine and write its state to a file that is open for writing only."""
        await self._execute("stop")
        send_fd(state.fileno())
        number = (await self._execute("add-fd"))["fdset-id"]
        try:
            # live: a machine that is stopped already is not to give its disks up.
            arguments = {"filename": f"/dev/fdset/{number}", "live": False}
            await self._execute("xen-save-devices-state", arguments)
        finally:
            await self._execute("remove-fd", {"fdset-id": number})

    async def load(self, fd: int) -> None:
        """Take the state from a descriptor that QEMU has inherited, and let the machine run."""
        await self._execute("migrate-set-capabilities", {"capabilities": _CAPABILITIES})
        await self._execute("migrate-incoming", {"uri": f"fd:{fd}"})
        try:
            async with asyncio.timeout(TIMEOUT):
                await self._ended.wait()
        except TimeoutError:
            raise DeadlineExceeded(f"QEMU did not load the state within {TIMEOUT:g} s") from None
        if self._status != "completed":
            raise MachineFailed(f"QEMU does not take the state: it ended as {self._status}")
        await self._execute("cont")

    def on_event(self, data: Mapping[str, Any]) -> None:
        """QEMU's MIGRATION event."""
        self._status = str(data.get("status"))
        if self._status in _ENDS:
            self._ended.set()
