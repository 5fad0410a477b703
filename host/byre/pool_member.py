"""The life of one VM of a pool, from its start to its end.

    starting ──> ready ──> in use ──> ending
                   └── dead, silent, or idle for too long: ending

Rule: the task that runs `live` owns the VM: however it ends, cancelled too, nothing of the VM is left.  It knows
nothing of other VMs, and not who uses this one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from .errors import ConnectionLost, DeadlineExceeded
from .health import UNRESPONSIVE

if TYPE_CHECKING:
    from .vm import UtilityVM

logger = logging.getLogger(__name__)

STARTING, READY, IN_USE, ENDING = "starting", "ready", "in use", "ending"

#: Run in a VM before it is ready: so it can run something, and under emulation the first command is the slowest one
#: by far, because what it needs is translated then.
TRIAL = ("true",)
TRIAL_TIMEOUT = 60.0

#: Seconds in which a VM must give a sign of life before it is handed out: a loaded guest takes some milliseconds.
CHECK_TIMEOUT = 5.0


class Member:
    """`changed` hears of every new state; `outcome` is why it ended: "" while there is nothing to say, "replaced"
    when it died or did not answer, "expired" when it was too old."""

    def __init__(
        self, vm: UtilityVM, max_idle: float, max_lifetime: float, changed: Callable[[Member], None]
    ) -> None:
        self.vm = vm
        self.state = STARTING
        self.was_ready = False
        self.outcome = ""
        self._max_idle = max_idle
        self._max_lifetime = max_lifetime
        self._changed = changed
        self._taken = asyncio.Event()
        self._returned = asyncio.Event()
        self.task = asyncio.get_running_loop().create_task(self._live())

    def take(self) -> None:
        """It is somebody's now."""
        self._taken.set()
        self._become(IN_USE)

    def give_back(self) -> None:
        """It is nobody's again, and ends."""
        self._returned.set()

    def end(self) -> None:
        """End it, whatever it does."""
        if self.state != ENDING:
            self.task.cancel()

    async def answers(self) -> bool:
        """Whether it does, now."""
        try:
            await self.vm.bridge.ping(CHECK_TIMEOUT)
        except (ConnectionLost, DeadlineExceeded) as error:
            logger.warning("! pool: the VM %s was not handed out: %s", self.vm.id, error.message)
            self.outcome = "replaced"
            return False
        return True

    def _become(self, state: str) -> None:
        self.state = state
        self._changed(self)

    async def _live(self) -> None:
        """Raises what starting it raised."""
        await self.vm.start()
        begin = asyncio.get_running_loop().time()
        why = "its pool was closed"
        try:
            await self.vm.run(TRIAL, timeout=TRIAL_TIMEOUT)
            self.was_ready = True
            self._become(READY)
            why = await self._stand_ready() or await self._serve(begin + self._max_lifetime)
        finally:
            self._become(ENDING)
            logger.debug("= pool: the VM %s ends: %s", self.vm.id, why)
            await self.vm.terminate(why)

    async def _stand_ready(self) -> str:
        """Until it is taken, or no good any longer: why."""
        sick = asyncio.ensure_future(self.vm.health.wait_for(UNRESPONSIVE))
        taken = asyncio.ensure_future(self._taken.wait())
        try:
            await asyncio.wait({sick, taken}, timeout=self._max_idle, return_when=asyncio.FIRST_COMPLETED)
        finally:
            was_sick = sick.done()
            sick.cancel()
            taken.cancel()
            await asyncio.gather(sick, taken, return_exceptions=True)
        if self.state == IN_USE:  # perhaps since a moment ago
            return ""
        self.outcome = "replaced" if was_sick else "expired"
        return "it died, or did not answer" if was_sick else f"nobody took it for {self._max_idle:g} s"

    async def _serve(self, deadline: float) -> str:
        """Until it is given back, or its time is over: why."""
        try:
            async with asyncio.timeout_at(deadline):
                await self._returned.wait()
                return "it was given back"
        except TimeoutError:
            self.outcome = "expired"
            return f"its pool lets no VM live for more than {self._max_lifetime:g} s"
