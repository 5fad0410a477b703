"""Changes of a container that runs: planned, carried out step by step, taken back when one fails (B28).

    plan       what each change would take, without doing anything
    Changes    those of one container; what they need of the VM (disks, ports) it lends

Rule: all of it or nothing.  Each step says how it is taken back before the next one begins; a disk is given up only
when all steps are done.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ByreError, NotSupported
from .parameters import (
    AddDisk,
    AddMount,
    AddPort,
    ModifyRequest,
    Plan,
    RemoveMount,
    RemovePort,
    Resources,
    Step,
    UpdateResources,
)

if TYPE_CHECKING:
    from .bridge import Bridge
    from .disks import Layers
    from .ports.registry import Ports, PublishedPort

#: For all that was done to be taken back, in seconds: some calls of milliseconds each.
ROLLBACK_TIMEOUT = 60.0

#: How a step is taken back.
Undo = Callable[[], Awaitable[object]]


def plan(changes: Sequence[object], state: str) -> Plan:
    """What they would take of a container in this state (created, running, stopped)."""
    return tuple(_step(change, state) for change in changes)


def _step(change: object, state: str) -> Step:
    if not isinstance(change, ModifyRequest):
        kind = type(change).__name__
        return Step(change, "unsupported", f"a container cannot be modified by {kind}")
    if state == "stopped":
        return Step(change, "unsupported", "the container has ended")
    if isinstance(change, AddMount | AddDisk | RemoveMount) and state != "running":
        return Step(change, "restart", "its mounts can be changed once it runs")
    return Step(change, "live")


def check(steps: Plan) -> None:
    """Raises `NotSupported` when one cannot be done live: nothing is changed then."""
    for number, step in enumerate(steps, 1):
        if step.how != "live":
            raise NotSupported(
                f"change {number} of {len(steps)} ({type(step.change).__name__}): {step.reason}; nothing changed",
                hint="modify(..., dry_run=True) gives the whole plan",
                plan=[[type(each.change).__name__, each.how, each.reason] for each in steps],
            )


class Changes:
    """See the module."""

    def __init__(self, bridge: Bridge, container: str) -> None:
        self._bridge = bridge
        self._container = container
        self._layers: Layers | None = None
        self._ports: Ports | None = None
        self._disks: dict[str, Path] = {}  # by where they are mounted
        self._removed: list[Path] = []  # until all that was asked for with it is done
        self._one_at_a_time = asyncio.Lock()

    def lend(self, layers: Layers, ports: Ports) -> None:
        """What is the VM's."""
        self._layers, self._ports = layers, ports

    async def carry_out(self, changes: Sequence[ModifyRequest]) -> None:
        """All of them, in this order.  When one fails, those before it are taken back, the last first; the error's
        data says which failed, and ``not_rolled_back`` what could not be taken back."""
        undo: list[Undo] = []
        async with self._one_at_a_time:
            for change in changes:
                try:
                    undo.append(await self._DO[type(change)](self, change))
                except BaseException as error:
                    lost = await self._bridge.finish(_take_back(undo), ROLLBACK_TIMEOUT) or []
                    if isinstance(error, ByreError):
                        error.data |= {"failed": repr(change), "not_rolled_back": lost}
                    raise
            removed, self._removed = self._removed, []
            await self._release(removed)

    async def forget(self) -> None:
        """The container is deleted: its disks are free."""
        paths, self._disks = list(self._disks.values()), {}
        await self._release(paths)

    async def _release(self, paths: Sequence[Path]) -> None:
        if self._layers is not None and paths:
            await self._layers.release(paths)

    # -- one step each: do it, and say how to take it back -------------------------------------------------

    async def _update(self, change: UpdateResources) -> Undo:
        before = await self._limits()
        wanted = {name: v for name, v in dataclasses.asdict(change.resources).items() if v is not None}
        await self._call("container.update", resources=wanted)
        return lambda: self._call("container.update", resources={name: before[name] for name in wanted})

    async def _limits(self) -> dict[str, Any]:
        stats = (await self._call("container.stats"))["stats"]
        quota, period = stats.get("cpu.max.quota_usec"), stats.get("cpu.max.period_usec")
        limits = Resources(
            memory_bytes=stats.get("memory.max") or -1,
            cpus=quota / period if quota and period else -1,
            pids=stats.get("pids.max") or -1,
        )
        return dataclasses.asdict(limits)

    async def _add_mount(self, change: AddMount) -> Undo:
        return await self._mount(**dataclasses.asdict(change))

    async def _add_disk(self, change: AddDisk) -> Undo:
        layers, path = self._layers, _local(change.path)
        if layers is None:
            raise NotSupported("a disk is added by way of a UtilityVM", hint="await vm.open_container(ID)")
        (layer,) = await layers.acquire([path])
        try:
            unmount = await self._mount(destination=change.destination, layer=layer)
        except BaseException:
            await self._bridge.finish(layers.release([path]))
            raise
        self._disks[change.destination] = path

        async def undo() -> None:
            await unmount()
            await self._release([self._disks.pop(change.destination)])

        return undo

    async def _mount(self, *, destination: str, **how: Any) -> Undo:
        async def unmount(_: object = None) -> None:
            await self._call("container.unmount", destination=destination)

        await self._call("container.mount", undo=unmount, destination=destination, **how)
        return unmount

    async def _remove_mount(self, change: RemoveMount) -> Undo:
        was = await self._call("container.unmount", destination=change.destination)
        path = self._disks.pop(change.destination, None)
        if path is not None:
            self._removed.append(path)

        async def undo() -> None:  # a tmpfs comes back empty
            await self._mount(destination=change.destination, **was)
            if path is not None:
                self._removed.remove(path)
                self._disks[change.destination] = path

        return undo

    async def _add_port(self, change: AddPort) -> Undo:
        ports = self._lent_ports()
        address = await ports.publish(self._container, change.host, change.guest)
        return lambda: ports.unpublish(address)

    async def _remove_port(self, change: RemovePort) -> Undo:
        ports = self._lent_ports()
        was: list[PublishedPort] = [port for port in await ports.published() if str(port.host) == change.host]
        await ports.unpublish(change.host)
        return lambda: ports.publish(was[0].container, was[0].host, was[0].guest)

    def _lent_ports(self) -> Ports:
        if self._ports is None:
            raise NotSupported("a port is published by way of a UtilityVM", hint="await vm.open_container(ID)")
        return self._ports

    async def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        return await self._bridge.call(method, container=self._container, **arguments)

    _DO: dict[type, Callable[[Changes, Any], Awaitable[Undo]]] = {  # noqa: RUF012
        UpdateResources: _update,
        AddMount: _add_mount,
        AddDisk: _add_disk,
        RemoveMount: _remove_mount,
        AddPort: _add_port,
        RemovePort: _remove_port,
    }


def _local(path: str) -> Path:
    """A path of this host that means the same to a keeper."""
    return Path(path).absolute()


async def _take_back(undo: list[Undo]) -> list[str]:
    """The last first, each of them whatever becomes of the others; why some could not be."""
    lost: list[str] = []
    for step in reversed(undo):
        try:
            await step()
        except ByreError as error:
            lost.append(error.message)
    return lost
