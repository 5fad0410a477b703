"""The layers of a VM's containers: each attached and mounted once, however many containers use it.

Rule: the guest lets go first, then the host (B60); whatever fails half-way is taken back, by steps in reverse.  A
layer that nobody uses stays, for the next container, until its place is needed.  One that a failed create brought
goes with it (B22).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ByreError, ConnectionLost, ResourceExhausted

if TYPE_CHECKING:
    from .bridge import Bridge
    from .owner import DiskPlace, Owner


class _Layer:
    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.users = 0
        self.proven = False  # a container was made with it
        self.name = ""  # as the guest calls it; "" while it is not mounted
        self.place: DiskPlace | None = None


class Layers:
    """The layers of one VM."""

    def __init__(self, owner: Owner, bridge: Bridge) -> None:
        self._owner = owner
        self._bridge = bridge
        self._layers: dict[Path, _Layer] = {}  # in the order of their last use

    async def acquire(self, paths: Sequence[Path]) -> list[str]:
        """Attach and mount them, all at once; the guest's names in the same order.  All or none."""
        tasks = [asyncio.create_task(self._acquire(path)) for path in paths]
        try:
            return list(await asyncio.gather(*tasks))
        except BaseException:
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)
            ours = [p for p, t in zip(paths, tasks, strict=True) if not t.cancelled() and t.exception() is None]
            await self._bridge.finish(self.release(ours))
            raise

    def keep(self, paths: Sequence[Path]) -> None:
        """A container was made of these: they stay when it is gone."""
        for path in paths:
            self._layers[path].proven = True

    async def release(self, paths: Sequence[Path]) -> None:
        """A container does not, or no longer, use them."""
        for path in paths:
            layer = self._layers[path]
            layer.users -= 1
            self._layers[path] = self._layers.pop(path)  # the last to go
            if not layer.users and not layer.proven:
                with contextlib.suppress(ByreError):  # what cannot be removed now stays, unused
                    await self._remove(path, layer)

    async def _acquire(self, path: Path) -> str:
        layer = self._layers.setdefault(path, _Layer())
        layer.users += 1
        try:
            async with layer.lock:
                if not layer.name:
                    await self._mount(path, layer)
                return layer.name
        except BaseException:
            layer.users -= 1
            if not layer.users and not layer.name:
                self._layers.pop(path, None)
            raise

    async def _mount(self, path: Path, layer: _Layer) -> None:
        place = await self._attach(path)
        try:
            answer = await self._bridge.call(
                "disk.mount",
                target=place.target,
                lun=place.lun,
                undo=lambda _: self._bridge.call("disk.unmount", target=place.target, lun=place.lun),
            )
        except BaseException:
            await self._bridge.finish(_quietly(self._owner.detach_disk(place)))
            raise
        layer.place, layer.name = place, answer["layer"]

    async def _attach(self, path: Path) -> DiskPlace:
        while True:
            try:
                return await self._owner.attach_disk(path)
            except ResourceExhausted:
                idle = next((p for p, layer in self._layers.items() if layer.name and not layer.users), None)
                if idle is None:
                    raise
                await self._remove(idle, self._layers[idle])

    async def _remove(self, path: Path, layer: _Layer) -> None:
        async with layer.lock:
            if layer.users or layer.place is None:
                return
            place = layer.place
            await self._bridge.call("disk.unmount", target=place.target, lun=place.lun)
            layer.name, layer.place = "", None
            self._layers.pop(path, None)
            await self._owner.detach_disk(place)


async def _quietly(step: object) -> None:
    """One step of taking something back: the error that led to it is the one to tell."""
    with contextlib.suppress(ByreError, ConnectionLost):
        await step  # type: ignore[misc]
