"""`Helper`: a program beside a VM, such as a server of its shares: how it ends, and its last words."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from .machines.spawn import OwnedProcess

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .machines.namespaces import Apart

#: Of what it says, in bytes.
MAX_WORDS = 1024


class Helper:
    """It dies with this process, and is killed, not asked.  Arguments as `OwnedProcess` has them."""

    def __init__(self, argv: Sequence[str], *, handed: Sequence[int] = (), apart: Apart | None = None) -> None:
        self._process = OwnedProcess(argv, output=self._said, handed=handed, apart=apart)
        self._words = b""
        self.killed = False  # by us

    def start(self) -> None:
        """Spawn it; whether it could be shows in `wait`."""
        self._process.start()

    def _said(self, data: bytes) -> None:
        """In the watching thread."""
        self._words = (self._words + data)[-MAX_WORDS:]

    @property
    def last_words(self) -> str:
        """After a colon; "" where there are none."""
        words = self._words.decode(errors="replace").strip()
        return f": {words}" if words else ""

    @property
    def pid(self) -> int:
        """0 while there is none."""
        return self._process.pid or 0

    @property
    def ended(self) -> bool:
        return self._process.exit.done()

    def kill(self) -> None:
        """Harmless when repeated."""
        self.killed = True
        self._process.kill()

    async def wait(self) -> str:
        """Wait for its end: how it ended, and its last words."""
        try:
            code = await asyncio.shield(asyncio.wrap_future(self._process.exit))
        except OSError as error:
            return str(error)
        how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        return how + self.last_words
