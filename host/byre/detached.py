"""Detached VMs as their clients see them: start one, attach to one, end one (`keeper` is the other side).

Rule: a client holds nothing of the VM.  It may die at any time, and harms only what it is in the middle of (B43).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byre_proto.errors import from_wire, printable

from . import errors, peer, rundir
from .bridge import Bridge
from .errors import (
    ByreError,
    ConnectionLost,
    DeadlineExceeded,
    MachineFailed,
    PermissionRefused,
    VMNotFound,
    host_failed,
)
from .journal import Events, KeeperJournal
from .machines.balloon import Reclaimed
from .owner import DiskPlace, Owner

if TYPE_CHECKING:
    from collections.abc import Callable

    from .calls import Result
    from .container_disks import ContainerDisks
    from .events import Event
    from .networks.registry import Networks
    from .ports.registry import Ports
    from .shares.registry import Shares

#: Name of the VM that is meant when none is given.
DEFAULT = rundir.DEFAULT

#: The keeper ends by itself when the boot's deadline passes; this only bounds the wait for one that hangs, in
#: seconds: the longest boot that was seen under emulation on a loaded machine, ten times over.
START_LIMIT = 600.0

#: How long a keeper may take to give a boot up, in seconds: it kills its machine.  One that takes longer hangs.
CANCEL_LIMIT = 4.0

#: A client that comes while the VM boots waits this long for it, in seconds.
ATTACH_TIMEOUT = 120.0

#: Beyond the VM's own patience: for the keeper to kill its machine, tidy up and end, in seconds.  One that takes
#: longer hangs.
END_MARGIN = 4.0

#: What may be read of a keeper's report: an error with its console.
MAX_REPORT = 1024 * 1024


async def start(name: str = DEFAULT, options: dict[str, Any] | None = None, *, keeper: str = "byre.keeper") -> None:
    """Boot a detached VM and wait until it is ready; `options` are those of `UtilityVM`, as JSON can carry them.

    Raises `VMExists`, and what booting raises.  Cancelled, it ends the boot: nothing is left (B41).  `keeper` is
    the module that is run (tests play one).
    """
    rundir.find(name)
    with host_failed("a keeper cannot be started"):
        process = await _spawn(name, options or {}, keeper)
    assert process.stdin is not None and process.stdout is not None
    report = asyncio.create_task(_read(process.stdout))
    try:
        done, _ = await asyncio.wait((report,), timeout=START_LIMIT)
        if not done:
            raise DeadlineExceeded(f"the keeper of {name!r} did not say within {START_LIMIT:g} s how the boot went")
    finally:
        process.stdin.close()  # unless it is ready, this ends the keeper
        await asyncio.shield(_finish(name, process, report))
    _understand(name, report.result())


async def _spawn(name: str, options: dict[str, Any], keeper: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", keeper, name, json.dumps(options)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": _search_path()},
    )


async def _read(pipe: asyncio.StreamReader) -> bytes:
    """All that the keeper says until it lets go of the pipe; what is beyond MAX_REPORT is dropped."""
    said = bytearray()
    while piece := await pipe.read(65536):
        said += piece[: MAX_REPORT - len(said)]
    return bytes(said)


def _search_path() -> str:
    """The keeper finds the packages where this program found them, from whatever directory."""
    return os.pathsep.join(os.path.abspath(path) for path in sys.path if path)


async def _finish(name: str, process: asyncio.subprocess.Process, report: asyncio.Task[bytes]) -> None:
    """Until the keeper has let go of our pipes, so that what it tidies is tidied; one that hangs is killed."""
    await asyncio.wait((report,), timeout=CANCEL_LIMIT)
    if not report.done():
        with contextlib.suppress(VMNotFound):
            keeper = _open_keeper(name)
            try:
                await _kill(keeper)
            finally:
                os.close(keeper)
        rundir.sweep(name)
    report.cancel()
    await process.wait()


def _understand(name: str, report: bytes) -> None:
    """Nothing when the keeper said that it is ready; raises what it said otherwise."""
    text = report.decode("utf-8", "replace").strip()
    try:
        answer = json.loads(text.rpartition("\n")[2])
    except ValueError:
        answer = {}
    if "error" in answer:
        code, message, hint, data = answer["error"]
        raise _error(code, message, hint, data)
    if "ready" not in answer:
        said = f": {printable(text[-1000:])}" if text else ""
        raise MachineFailed(f"the keeper of {name!r} ended without a word of the VM{said}")


def _error(code: str, message: str, hint: str, data: dict[str, Any]) -> ByreError:
    """The keeper's error as its class: also one of those that never cross the wire."""
    classes = (getattr(errors, each) for each in errors.__all__)
    cls = next((cls for cls in classes if cls.code == code), None)
    return from_wire(code, message, hint, data) if cls is None else cls(message, hint=hint, **data)


async def attach(name: str = DEFAULT, timeout: float = ATTACH_TIMEOUT) -> tuple[KeeperClient, Bridge]:
    """A connection to the keeper of a VM that is up, or is booting.  Raises `VMNotFound`, `DeadlineExceeded`.

    The caller closes the bridge; that is all that detaching takes.
    """
    sock = rundir.connect(name)
    keeper_pid = _peer(sock)
    sock.setblocking(False)

    async def redial() -> socket.socket:
        try:
            again = rundir.connect(name)
        except VMNotFound as error:
            raise ConnectionLost(f"the keeper of {name!r} has ended") from error
        _peer(again)
        again.setblocking(False)
        return again

    bridge = Bridge(sock, label=name, redial=redial)
    try:
        await bridge.open(timeout)
    except ConnectionLost as error:
        raise VMNotFound(f"no VM named {name!r} is up: its keeper ended as it was asked") from error
    try:
        return KeeperClient(name, keeper_pid, bridge), bridge
    except BaseException:
        await bridge.close()
        raise


async def end(name: str = DEFAULT, timeout: float = 10.0) -> None:
    """End a detached VM and its keeper, and wait until nothing of them is left.

    The guest has `timeout` seconds to end in order.  A keeper that does not answer is killed, and its VM dies with
    it.  Raises `VMNotFound`.
    """
    keeper = _open_keeper(name)
    try:
        async with asyncio.timeout(timeout + END_MARGIN):
            with contextlib.suppress(ConnectionLost):
                client, bridge = await attach(name)
                try:
                    await client.shutdown(timeout)
                finally:
                    await bridge.close()
            await peer.ended(keeper)
    except TimeoutError:  # of the asking, or of the end: either hangs
        await _kill(keeper)
    finally:
        os.close(keeper)
    rundir.sweep(name)


def _open_keeper(name: str) -> int:
    """A descriptor of the keeper, so that it is this process and no later one that is waited for, or killed."""
    with rundir.connect(name) as probe:
        return os.pidfd_open(_peer(probe))


async def _kill(keeper: int) -> None:
    signal.pidfd_send_signal(keeper, signal.SIGKILL)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(END_MARGIN):
            await peer.ended(keeper)


def _peer(sock: socket.socket) -> int:
    """The pid behind a UNIX socket.  Raises `PermissionRefused` unless it is this user's."""
    try:
        return peer.process_id(sock)
    except PermissionRefused:
        sock.close()
        raise


class KeeperClient(Owner):
    """The owner of a detached VM, seen from a client: its keeper serves the calls."""

    def __init__(self, name: str, keeper_pid: int, bridge: Bridge) -> None:
        self.id = name
        self.keeper_pid = keeper_pid
        self._bridge = bridge
        self._reason = ""
        bridge.subscribe("vm.exit", None, self._on_exit)

    def _on_exit(self, event: Result | ConnectionLost) -> None:
        if not isinstance(event, ConnectionLost):
            self._reason = event["reason"]
            self._bridge.fail(self._reason)

    async def attach_disk(self, path: Path) -> DiskPlace:
        place = await self._bridge.call("vm.attach_disk", path=os.fspath(path))  # absolute: vm.py resolves it
        return DiskPlace(path, place["target"], place["lun"])

    async def detach_disk(self, place: DiskPlace) -> None:
        await self._bridge.call("vm.detach_disk", path=os.fspath(place.path))

    async def console(self, lines: int) -> str:
        text: str = (await self._bridge.call("vm.console", lines=lines))["text"]
        return text

    async def pause(self) -> None:
        await self._bridge.call("vm.pause")

    async def resume(self) -> None:
        await self._bridge.call("vm.resume")

    async def reclaim(self, memory_mib: int) -> Reclaimed:
        found = await self._bridge.call("vm.reclaim", memory_mib=memory_mib)
        return Reclaimed(found["memory"], found["resident_before"], found["resident_after"])

    async def shutdown(self, timeout: float) -> None:
        """End the VM, for all its clients."""
        with contextlib.suppress(ConnectionLost):  # it ended faster than it could answer, or had ended before
            await self._bridge.call("vm.shutdown", timeout=timeout + END_MARGIN, patience_ms=round(timeout * 1000))
            await self._bridge.wait_lost()

    async def kill(self) -> None:
        await self.shutdown(0)

    async def wait(self) -> str:
        loss = await self._bridge.wait_lost()
        return self._reason or loss.message

    async def info(self) -> dict[str, Any]:
        info: dict[str, Any] = (await self._bridge.call("vm.info"))["info"]
        return info

    def ports(self, bridge: Bridge) -> Ports:
        from .ports.registry import KeeperPorts

        return KeeperPorts(bridge)

    def container_disks(self, bridge: Bridge, name: str) -> ContainerDisks:
        from .container_disks import KeeperDisks

        return KeeperDisks(bridge)

    def shares(self, bridge: Bridge) -> Shares:
        from .shares.registry import KeeperShares

        return KeeperShares(bridge)

    def networks(self, bridge: Bridge) -> Networks:
        from .networks.registry import KeeperNetworks

        return KeeperNetworks(bridge)

    def events(self, bridge: Bridge) -> Events:
        return KeeperJournal(bridge, lambda: self._reason)

    def note(self, make: Callable[..., Event], **details: Any) -> None:
        """Nothing: the keeper sees for itself."""

    async def release(self) -> None:
        """Nothing: the VM goes on, and so does what this client started in it."""
