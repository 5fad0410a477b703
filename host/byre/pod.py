"""`Pod`: containers of one VM that share network, IPC and host name, and processes where that is wanted.

    async with await vm.create_pod("shop", resources=Resources(memory_bytes=512 << 20)) as pod:
        async with await pod.create_container("web", image="nginx") as web: ...

Rule: the pod is the agent's; a container's end does not end it, and leaving it takes all of its containers down,
whoever made them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import secrets
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from .container import LEAVE_TIMEOUT
from .creation import CREATE_TIMEOUT, check_id
from .errors import ConnectionLost, InvalidRequest, PodNotFound
from .parameters import Resources

if TYPE_CHECKING:
    from .container import GuestContainer
    from .vm import UtilityVM

#: As hostname(7) has it, in the 64 bytes that the kernel takes.
_HOSTNAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,62}[A-Za-z0-9])?")


class Pod:
    """See the module.  Made by `UtilityVM.create_pod` and `open_pod`."""

    def __init__(self, vm: UtilityVM, name: str) -> None:
        self.name = name
        self._vm = vm
        self._containers: list[GuestContainer] = []

    async def create_container(self, id: str = "", *, image: str, **options: Any) -> GuestContainer:
        """As `UtilityVM.create_container`, in this pod: network, /dev/shm, host name and /etc/hosts are the pod's.

        Its own limits hold beneath the pod's.  Raises `PodNotFound` when the pod was deleted meanwhile, and what
        `UtilityVM.create_container` raises.
        """
        container = await self._vm.create_container(id, image=image, pod=self.name, **options)
        self._containers.append(container)
        return container

    async def info(self) -> dict[str, Any]:
        """What the agent knows of it: ``state``, ``hostname``, ``share_pid``, ``containers`` (their ids), ...

        Raises `PodNotFound`.
        """
        for found in await self._vm.pods():
            if found.get("id") == self.name:
                return found
        raise PodNotFound(f"there is no pod {self.name!r}", pod=self.name)

    async def delete(self, *, force: bool = True) -> None:
        """Kill and delete its containers, and remove it for good.  Harmless when it is gone.

        Without `force` raises `ContainerNotReady` while a container of it has not ended.
        """
        await self._vm.bridge.call("pod.delete", timeout=LEAVE_TIMEOUT, pod=self.name, force=force)
        containers, self._containers = self._containers, []
        for container in containers:  # this host's side of them: their layers are free
            await container.delete()
            await container.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Delete it; to the end, even when the task is cancelled meanwhile."""
        await self._vm.bridge.finish(self._leave(), 2 * LEAVE_TIMEOUT)

    async def _leave(self) -> None:
        with contextlib.suppress(ConnectionLost):  # the VM is gone, and the pod with it
            await self.delete()

    def __repr__(self) -> str:
        return f"<Pod {self.name!r} of {self._vm!r}>"


async def create(
    vm: UtilityVM, name: str, hostname: str, resources: Resources | None, share_pid: bool, network: str
) -> Pod:
    """See `UtilityVM.create_pod`."""
    name = name or secrets.token_hex(6)
    check_id(name, "a pod")
    if hostname and not _HOSTNAME.fullmatch(hostname):
        raise InvalidRequest(f"{hostname!r} is not a host name", hint="letters, digits, . and -; 64 at most")
    limits = {
        key: value for key, value in dataclasses.asdict(resources or Resources()).items() if value is not None
    }
    bridge = vm.bridge
    await bridge.call(
        "pod.create",
        timeout=CREATE_TIMEOUT,
        undo=lambda _: bridge.call("pod.delete", pod=name, force=True),
        pod=name,
        hostname=hostname,
        share_pid=share_pid,
        resources=limits,
        network=network,
    )
    return Pod(vm, name)
