"""A VM as a clone of its template, made at the first time; or booted, where there can be no template.

    first time     boot, warm up, let the agent fall quiet, save, end        `_make`
    every time     a private copy of the saved memory, the saved devices, an identity of its own

Rule: whoever comes first gets a clone too, so that the first VM is like all others.  A clone is handed out when its
clock, random numbers and identity are its own, and not before (`boot`, B52).  What stands in a template's way makes
a VM slower to start and nothing else: it is booted, and `explanation["template"]` says why.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from byre_proto.messages import QUIET

from . import templates
from .boot import BOOT_TIMEOUT, Booted, boot, boot_scale
from .errors import BootFailed, ByreError, DeadlineExceeded, InvalidRequest, MachineFailed, NotSupported
from .machines.config import Saved
from .machines.spawn import in_thread
from .process import GuestProcessHost
from .timings import span

if TYPE_CHECKING:
    from pathlib import Path

    from .bridge import Bridge
    from .machines.base import Identity, Machine
    from .machines.config import MachineConfig
    from .templates import Template

logger = logging.getLogger(__name__)

MODES = ("auto", "off")

#: A clone's agent answers in 0.1 s, a loaded host's in a few seconds: the deadlines of a boot are more than enough.
CLONE_SCALE = 2.0

#: How long each step of falling quiet may take, in seconds; usually some milliseconds.
QUIESCE_TIMEOUT = 30.0

#: Run in the guest before it is saved: what most first commands need is then in its memory and not on its disk.
WARM = ("sh", "-c", "echo warm | cat; true; ls /; env; id; uname -a")

#: The kernel tidies up behind the agent (freed memory, timers): what is done before the state is saved no clone has
#: to do.  In seconds.
CALM = 0.2

#: Between two looks whether another process has finished the template.  In seconds.
LOOK_AGAIN = 0.05

Make = Callable[["MachineConfig"], "Machine"]


class Origin(NamedTuple):
    """What a VM's machine is made by, and of."""

    make: Make
    config: MachineConfig


class _NoTemplate(Exception):
    """There can be none; the reason is the text."""


async def start(origin: Origin, *, template: str, hostname: str, timeout: float | None) -> Booted:
    """A running machine of this configuration; after an error or a cancellation nothing is left (B41).

    `template` is "auto" or "off".  Raises what booting raises.
    """
    if template not in MODES:
        raise InvalidRequest(f"unknown template {template!r}", hint=f"one of {', '.join(MODES)}")
    machine = origin.make(origin.config)
    reason = "it was not wanted"
    if template == "auto":
        try:
            return await _Clone(origin, hostname, timeout).start(machine)
        except _NoTemplate as error:
            reason = str(error)
            logger.info("= vm %s no template: %s", machine.id, reason)
    booted = await boot(machine, hostname=hostname, timeout=timeout)
    machine.explanation["template"] = f"none: {reason}"
    return booted


class _Clone:
    """One clone, and its template where there is none yet."""

    def __init__(self, origin: Origin, hostname: str, timeout: float | None) -> None:
        self._make, self._config = origin
        self._hostname = hostname
        self._timeout = timeout
        self._store: templates.Store
        self._identity: Identity

    async def start(self, like: Machine) -> Booted:
        """A clone of the template for machines `like` this one.  Raises `_NoTemplate`, and what booting raises."""
        try:
            with span("identity of the machine"):
                self._identity = await like.identity()
            self._store = templates.Store()
        except (NotSupported, OSError) as error:
            raise _NoTemplate(str(error)) from error
        for _ in range(2):
            with span("template"):
                template = self._store.find(self._identity)
                how = "it was there"
                if template is None:
                    template, how = await self._make_or_wait(boot_scale(like))
            try:
                return await self._boot(template, how)
            except BootFailed as error:  # it ran, and was no good
                self._store.discard(template.key, error.message)
                raise
            except MachineFailed as error:  # QEMU does not take it
                self._store.discard(template.key, error.message)
        raise _NoTemplate("a clone of a template that was just made does not start")

    async def _boot(self, template: Template, how: str) -> Booted:
        saved = Saved(memory=template.memory, state=template.state)
        machine = self._make(dataclasses.replace(self._config, saved=saved))
        booted = await boot(machine, hostname=self._hostname, timeout=self._timeout, scale=CLONE_SCALE)
        machine.explanation["template"] = f"{template.key}: {how}"
        return booted

    async def _make_or_wait(self, scale: float) -> tuple[Template, str]:
        """The template: made here, or by another process meanwhile."""
        now = asyncio.get_running_loop().time
        deadline = now() + (self._timeout or BOOT_TIMEOUT * scale)
        while True:
            claim = self._claim()
            if claim is not None:
                with claim:
                    found = self._store.find(self._identity)
                    if found is None:
                        return await self._make_in(claim), "it was made for this"
                    return found, "it was there"
            if now() > deadline:
                raise _NoTemplate("another process is making it, and does not come to an end")
            await asyncio.sleep(LOOK_AGAIN)

    def _claim(self) -> templates.Claim | None:
        try:
            problem = templates.room_problem(self._store.root)
            if problem:
                raise _NoTemplate(problem)
            return self._store.claim(self._identity)
        except OSError as error:
            raise _NoTemplate(f"{self._store.root}: {error.strerror}") from error

    async def _make_in(self, claim: templates.Claim) -> Template:
        """Boot, save, end.  Raises what booting raises, and `_NoTemplate` for what goes wrong after that."""
        machine = self._make(self._config)
        booted = await boot(machine, hostname=self._hostname, timeout=self._timeout)
        try:
            await _save(booted, claim.new / "memory", claim.new / "state")
        except ByreError as error:
            raise _NoTemplate(f"the machine could not be saved: {error.message}") from error
        finally:
            try:
                await booted.bridge.close()
            finally:
                await asyncio.shield(machine.kill())
        qemu = machine.explanation.get("qemu", "")
        finishing = asyncio.ensure_future(in_thread(lambda: self._store.finish(claim, self._identity, qemu)))
        try:
            return await asyncio.shield(finishing)
        except asyncio.CancelledError:
            await asyncio.wait({finishing})
            raise
        except OSError as error:
            raise _NoTemplate(f"the template could not be written: {error.strerror}") from error


async def _save(booted: Booted, memory: Path, state: Path) -> None:
    """Warm the guest up, have its agent let go of this host, and save it."""
    machine, bridge, _ = booted
    await bridge.call("container.list", timeout=QUIESCE_TIMEOUT)  # with it the agent loads the disks' drivers
    await Guest(bridge).run(list(WARM), timeout=QUIESCE_TIMEOUT, capture_output=True)
    await bridge.call("system.quiesce", timeout=QUIESCE_TIMEOUT)
    await bridge.close("the machine is being saved")
    await machine.hang_up()
    try:
        async with asyncio.timeout(QUIESCE_TIMEOUT):
            await machine.wait_console(QUIET)
    except TimeoutError:
        raise DeadlineExceeded(f"the agent did not fall quiet within {QUIESCE_TIMEOUT:g} s") from None
    await asyncio.sleep(CALM)
    await machine.save(memory, state)


class Guest(GuestProcessHost):
    """The processes behind a bridge."""

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge

    @property
    def bridge(self) -> Bridge:
        return self._bridge
