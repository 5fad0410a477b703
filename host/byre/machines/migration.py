"""Saving the state of a QEMU's devices, and loading it: QEMU's migration, to and from a file, without the memory.

Rule: memory is never copied.  It is a file that is shared while it is made, which `x-ignore-shared` leaves out of
the state; a clone maps it privately.  Files are handed over as descriptors: the form that would run a shell is
forbidden to QEMU, and no path is parsed.

Source: QEMU's docs/devel/migration, `migrate-set-capabilities` and MIGRATION in its QMP reference.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from byre.errors import DeadlineExceeded, MachineFailed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from byre.machines.scsi import Execute

#: A state is some 60 to 400 kB, saved or loaded in 20 ms; a loaded host may take a second.
TIMEOUT = 30.0

#: "events" tells of the end, so that nobody has to ask again and again.
_CAPABILITIES = [{"capability": name, "state": True} for name in ("x-ignore-shared", "events")]

_ENDS = ("completed", "failed", "cancelled")


class Migration:
    """Of one machine.  `load` and `save` are for once; the machine's end ends them too."""

    def __init__(self, execute: Execute) -> None:
        self._execute = execute
        self._ended = asyncio.Event()
        self._status = ""

    async def save(self, descriptor: str) -> None:
        """Stop the machine and write its state to what `getfd` named so."""
        await self._execute("stop")
        await self._migrate("migrate", f"fd:{descriptor}")

    async def load(self, fd: int) -> None:
        """Take the state from a descriptor that QEMU has inherited, and let the machine run."""
        await self._migrate("migrate-incoming", f"fd:{fd}")
        await self._execute("cont")

    def on_event(self, data: Mapping[str, Any]) -> None:
        """QEMU's MIGRATION event."""
        self._status = str(data.get("status"))
        if self._status in _ENDS:
            self._ended.set()

    async def _migrate(self, command: str, uri: str) -> None:
        await self._execute("migrate-set-capabilities", {"capabilities": _CAPABILITIES})
        await self._execute(command, {"uri": uri})
        try:
            async with asyncio.timeout(TIMEOUT):
                await self._ended.wait()
        except TimeoutError:
            raise DeadlineExceeded(f"QEMU's {command} did not end within {TIMEOUT:g} s") from None
        if self._status != "completed":
            raise MachineFailed(f"QEMU's {command} ended as {self._status}", command=command)
