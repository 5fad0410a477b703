"""From a configuration to a machine whose agent answers, or to an error with the console's last lines.

Rule: whatever goes wrong, and on cancellation, nothing of the machine is left (B41).  The boot is raced against the
machine's end (B40) and a deadline that follows the speed of this host.
"""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from .bridge import Bridge
from .channel import Channel
from .errors import BootFailed, BootTimeout, ByreError, ConnectionLost, DeadlineExceeded
from .line_channel import LineChannel
from .machines.speed import boot_speed_scale
from .timings import span

if TYPE_CHECKING:
    from .machines.base import Machine

#: Boot deadline in seconds at speed 1 (an idle reference host with KVM, where a boot takes half a second); it is
#: multiplied by the measured speed, which is 7 and more under emulation.
BOOT_TIMEOUT = 20.0

#: A channel that ends in a boot is mostly the first sign of a machine that ends: how long its own word is awaited.
LAST_WORDS = 3.0

#: Lines of the console in an error: a panic with its stack.
CONSOLE_LINES = 60

#: Bytes of entropy that a guest is given: twice the kernel's own seed.
ENTROPY = 64

#: Deadline of the first call, in seconds at speed 1.
CONFIGURE_TIMEOUT = 10.0


class Booted(NamedTuple):
    """A machine that runs, the bridge to its agent, and what the agent says of the guest."""

    machine: Machine
    bridge: Bridge
    guest: dict[str, Any]


async def boot(machine: Machine, *, hostname: str, timeout: float | None, scale: float | None = None) -> Booted:
    """Start the machine, and wait until its agent answers and has been told who and when it is (B52).

    Raises `BootFailed`, `BootTimeout`, and what `Machine.start` raises.  `timeout` None: BOOT_TIMEOUT, scaled by
    `scale` or, without it, by the measured speed of this host.
    """
    try:
        with span("machine start"):
            await machine.start()
        scale = scale or boot_scale(machine)
        with span("first answer of the agent"):
            bridge = await _first_answer(machine, BOOT_TIMEOUT * scale if timeout is None else timeout)
        try:
            with span("identity"):
                info = await _configure(bridge, hostname, CONFIGURE_TIMEOUT * scale)
        except BaseException:
            await bridge.close("the boot failed")
            raise
    except BaseException:
        await asyncio.shield(machine.kill())
        raise
    return Booted(machine, bridge, info)


def boot_scale(machine: Machine) -> float:
    """How much longer than usual a boot of this machine takes here.  Blocks for about 10 ms."""
    accelerator = machine.explanation.get("accelerator", "kvm")
    return boot_speed_scale(accelerator.partition(":")[0])


async def _first_answer(machine: Machine, timeout: float) -> Bridge:
    """The bridge, open; or why there is none."""
    opening = asyncio.create_task(_open(machine, timeout))
    dying = asyncio.create_task(machine.wait())
    try:
        await asyncio.wait({opening, dying}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if opening.done() and opening.exception() is None:
            return opening.result()
        error = opening.exception() if opening.done() else None
        if error is None or isinstance(error, ConnectionLost):
            await asyncio.wait({dying}, timeout=LAST_WORDS if error else 0)
    finally:
        dying.cancel()
        if not opening.done():
            opening.cancel()
            await asyncio.wait({opening})
        _ = opening.cancelled() or opening.exception()  # it may have met its own deadline at the same time
    console = machine.console_tail(CONSOLE_LINES)
    if machine.exited is not None:
        raise BootFailed(
            f"{machine.exited} before its agent answered{_shown(console)}", hint=_HINT, console=console
        )
    if error is None or isinstance(error, DeadlineExceeded):
        raise BootTimeout(
            f"the guest's agent did not answer within {timeout:.0f} s{_shown(console)}",
            hint="give a longer boot_timeout, or see: byre doctor",
            console=console,
        )
    if isinstance(error, ConnectionLost):
        raise BootFailed(f"{error.message}{_shown(console)}", hint=_HINT, console=console) from error
    if isinstance(error, ByreError):
        error.data["console"] = console
    raise error


_HINT = "see: byre doctor, byre image verify"


def _shown(console: str) -> str:
    """The end of the console as part of a message."""
    lines = [line for line in console.splitlines() if line.strip()]
    return "; its console ended with:\n" + "\n".join(lines[-12:]) + "\n" if lines else "; its console is empty"


async def _open(machine: Machine, timeout: float) -> Bridge:
    sock = await machine.connect()
    channel = partial(LineChannel, noise=machine.on_noise) if machine.lossy else Channel
    redial = machine.connect if machine.redialled else None
    bridge = Bridge(sock, label=machine.id, secret=machine.secret, channel=channel, redial=redial)

    async def last_words() -> str:
        return str(await machine.wait())

    bridge.explain = last_words
    await bridge.open(timeout)
    return bridge


async def _configure(bridge: Bridge, hostname: str, timeout: float) -> dict[str, Any]:
    """Clock, entropy and identity of a VM that has just begun (B52)."""
    answer = await bridge.call(
        "system.configure",
        timeout=timeout,
        realtime_ns=time.time_ns(),
        entropy=os.urandom(ENTROPY),
        hostname=hostname,
        machine_id=uuid.uuid4().hex,
    )
    info: dict[str, Any] = answer["info"]
    return info
