"""The keeper: the small process that a detached VM belongs to (`detached.start` runs `python -m byre.keeper`).

It holds the name's lock, the VM with all its sockets, and the socket where clients attach.  The VM ends with it,
however it dies (the machine sees to that); it ends with the VM.

    stdin    a life line: its end before the VM is ready means that the starter is gone, and the boot is given up
    stdout   one line of JSON to the starter, {"ready": ...} or {"error": ...}; closed at once after "ready", and
             after "error" only when nothing is left of the boot

Rule: everything else that it has to say goes to its log.  It changes nothing outside its run directory.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import logging.handlers
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from byre_proto.errors import to_wire

from . import events, rundir
from .errors import ByreError, Cancelled, InvalidRequest
from .relay import Handler, Relay

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from .bridge import Bridge
    from .container_disks import ContainerDisks
    from .journal import Events
    from .machines.balloon import Reclaimed
    from .networks.network import Network
    from .owner import DiskPlace
    from .ports.address import Address
    from .ports.registry import PublishedPort
    from .shares.share import Share

log = logging.getLogger(__name__)

Arguments = dict[str, Any]

#: keeper.log lies in memory on most hosts; with its predecessor it takes twice this, in bytes.
MAX_LOG = 1024 * 1024

#: Clients that wait to be accepted while the VM boots.
BACKLOG = 128

#: How long the guest may take to end in order when nobody said how long, in seconds.
SHUTDOWN_TIMEOUT = 10.0


class Kept(Protocol):
    """What a keeper keeps: a `UtilityVM` that has booted.  Tests keep something else."""

    @property
    def bridge(self) -> Bridge: ...
    @property
    def container_disks(self) -> ContainerDisks: ...
    @property
    def journal(self) -> Events: ...
    async def info(self) -> dict[str, Any]: ...
    async def attach_disk(self, path: str) -> DiskPlace: ...
    async def detach_disk(self, disk: DiskPlace) -> None: ...
    async def console(self, lines: int) -> str: ...
    async def pause(self) -> None: ...
    async def resume(self) -> None: ...
    async def reclaim(self, memory_mib: int) -> Reclaimed: ...
    async def publish(self, host: str, guest: str, *, container: str) -> Address: ...
    async def unpublish(self, host: str) -> None: ...
    async def published(self) -> list[PublishedPort]: ...
    async def open_network(self, *, own: bool) -> Network: ...
    async def share(self, directory: str, *, read_only: bool, cache: str) -> Share: ...
    async def shutdown(self, timeout: float) -> None: ...
    async def wait(self) -> str: ...


#: Boots what is to be kept; leaving the context ends it.  Takes the name and the options of `detached.start`.
Boot = Callable[[str, dict[str, Any]], "AbstractAsyncContextManager[Kept]"]


def main(boot: Boot | None = None) -> None:
    """The process: NAME and OPTIONS (JSON) are its arguments."""
    name, options = sys.argv[1], json.loads(sys.argv[2])
    report, lifeline = os.dup(1), os.dup(0)
    if os.fork():
        os._exit(0)  # so the keeper is nobody's child, and nobody has to wait for it
    try:
        claim = rundir.claim(name)
    except ByreError as error:
        _report(report, {"error": to_wire(error)})
        return
    os.umask(0o077)
    os.chdir("/")
    _log_to(claim.run)
    tempfile.tempdir = os.fspath(claim.run.tmp)  # what the VM needs on disk goes when the directory goes
    keeper = Keeper(claim, report, lifeline)
    try:
        asyncio.run(keeper.run(boot or _boot_vm, options))
    except ByreError as error:
        log.error("! %s", error)
        _fail(claim, report, error)
    except BaseException as error:
        log.exception("! the keeper failed")
        _fail(claim, report, ByreError(f"the keeper failed: {error!r}"))
    finally:
        os.close(report)


class Keeper:
    """One keeper's life.  `report` and `lifeline` are descriptors, see the module's text."""

    def __init__(self, claim: rundir.Claim, report: int, lifeline: int) -> None:
        self._claim = claim
        self._report = report
        self._lifeline = lifeline
        self._ending = ""  # why it ends on purpose
        self._told = asyncio.Event()

    async def run(self, boot: Boot, options: dict[str, Any]) -> None:
        """Boot, serve, end.  Raises what the boot raised; then nothing of it is left."""
        run = self._claim.run
        run.write_info(pid=os.getpid(), started=time.time())
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as listener:
            listener.setblocking(False)
            listener.bind(os.fspath(run.socket))
            listener.listen(BACKLOG)  # a client that comes while the VM boots waits here
            async with self._until_ready(boot, options) as kept:
                relay = Relay(kept.bridge, Methods(kept, self._end_on_purpose).table())
                accepting = asyncio.create_task(relay.accept(listener))
                try:
                    reason = await self._until_end(kept, accepting)
                finally:
                    accepting.cancel()
                    await asyncio.wait((accepting,))
        log.info("= %s", reason)
        if self._ending:
            self._claim.release()
        else:
            self._claim.abandon(reason)
        await relay.close(reason)

    def _close_report(self) -> None:
        """The starter reads to the end; the number stays taken, so that `main` can close it in any case."""
        with open(os.devnull) as null:
            os.dup2(null.fileno(), self._report)

    def _end_on_purpose(self, reason: str) -> None:
        self._ending = self._ending or reason

    @contextlib.asynccontextmanager
    async def _until_ready(self, boot: Boot, options: dict[str, Any]) -> AsyncIterator[Kept]:
        """The booted VM; reported to the starter, whose going away until then ends the boot."""
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None

        def end(reason: str) -> None:
            loop.remove_reader(self._lifeline)
            self._end_on_purpose(reason)
            self._told.set()
            if not ready:
                task.cancel()

        ready = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, end, f"the keeper was ended by {number.name}")
        loop.add_reader(self._lifeline, end, "the starter was gone before the VM was ready")
        try:
            async with boot(self._claim.run.name, options) as kept:
                ready = True
                loop.remove_reader(self._lifeline)
                self._claim.run.write_info(pid=os.getpid(), started=time.time(), **(await kept.info()))
                _report(self._report, {"ready": True})
                self._close_report()
                log.info("= ready")
                yield kept
        except asyncio.CancelledError:
            raise Cancelled(self._ending or "the keeper was cancelled") from None

    async def _until_end(self, kept: Kept, accepting: asyncio.Task[None]) -> str:
        """Wait for the VM's end, or for ours; how it ended."""
        ended, told = asyncio.create_task(kept.wait()), asyncio.create_task(self._told.wait())
        tasks: set[asyncio.Task[Any]] = {ended, told, accepting}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if accepting in done:
                accepting.result()  # raises: the socket failed
            if ended not in done:
                await kept.shutdown(SHUTDOWN_TIMEOUT)
            return self._ending or await ended
        finally:
            for task in (ended, told):
                task.cancel()


class Methods:
    """The methods that the keeper itself serves; see the table in `byre_proto.messages`."""

    def __init__(self, kept: Kept, ending: Callable[[str], None]) -> None:
        self._kept = kept
        self._ending = ending
        self._disks: dict[str, DiskPlace] = {}

    def table(self) -> dict[str, Handler]:
        return {
            "vm.info": self._info,
            "vm.attach_disk": self._attach_disk,
            "vm.detach_disk": self._detach_disk,
            "vm.hold_disk": self._hold_disk,
            "vm.drop_disks": self._drop_disks,
            "vm.console": self._console,
            "vm.events": self._events,
            "vm.pause": self._pause,
            "vm.resume": self._resume,
            "vm.reclaim": self._reclaim,
            "vm.publish": self._publish,
            "vm.unpublish": self._unpublish,
            "vm.ports": self._ports,
            "vm.share": self._share,
            "vm.network": self._network,
            "vm.shutdown": self._shutdown,
        }

    async def _info(self, _: Arguments) -> Arguments:
        return {"info": await self._kept.info()}

    async def _attach_disk(self, arguments: Arguments) -> Arguments:
        path = _absolute(arguments["path"])
        place = self._disks[path] = await self._kept.attach_disk(path)
        return {"target": place.target, "lun": place.lun}

    async def _hold_disk(self, arguments: Arguments) -> Arguments:
        lease, container, path = arguments["lease"], arguments["container"], arguments["path"]
        volume = Path(_absolute(path)) if path else None
        return {"disk": await self._kept.container_disks.hold(lease, container, volume, arguments["size"])}

    async def _drop_disks(self, arguments: Arguments) -> Arguments:
        await self._kept.container_disks.drop(arguments["lease"])
        return {}

    async def _detach_disk(self, arguments: Arguments) -> Arguments:
        place = self._disks.get(arguments["path"])
        if place is None:
            raise InvalidRequest(f"the disk {arguments['path']!r} is not attached")
        await self._kept.detach_disk(place)
        return {}

    async def _console(self, arguments: Arguments) -> Arguments:
        return {"text": await self._kept.console(arguments["lines"])}

    async def _events(self, arguments: Arguments) -> Arguments:
        journal, after = self._kept.journal, arguments["after"]
        found = await journal.after(after) if after >= 0 else []
        return {"events": [events.to_wire(event) for event in found], "last": await journal.now()}

    async def _pause(self, _: Arguments) -> Arguments:
        await self._kept.pause()
        return {}

    async def _resume(self, _: Arguments) -> Arguments:
        await self._kept.resume()
        return {}

    async def _reclaim(self, arguments: Arguments) -> Arguments:
        return (await self._kept.reclaim(arguments["memory_mib"]))._asdict()

    async def _publish(self, arguments: Arguments) -> Arguments:
        return {"host": str(await self._kept.publish(**arguments))}

    async def _unpublish(self, arguments: Arguments) -> Arguments:
        await self._kept.unpublish(arguments["host"])
        return {}

    async def _ports(self, _: Arguments) -> Arguments:
        found = await self._kept.published()
        return {"ports": [[str(p.host), str(p.guest), p.container, p.connections] for p in found]}

    async def _share(self, arguments: Arguments) -> Arguments:
        share = await self._kept.share(**arguments)
        return {"share": share.name, "path": share.path}

    async def _network(self, arguments: Arguments) -> Arguments:
        return {"network": (await self._kept.open_network(**arguments)).name}

    async def _shutdown(self, arguments: Arguments) -> Arguments:
        self._ending("the VM was shut down")
        patience = arguments["patience_ms"]
        await self._kept.shutdown(SHUTDOWN_TIMEOUT if patience is None else max(0, patience) / 1000)
        return {}


def _absolute(path: str) -> str:
    """A path from a client, whose directory is not ours.  Raises `InvalidRequest`."""
    if not os.path.isabs(path):
        raise InvalidRequest(f"the path of a disk must be absolute: {path!r}")
    return path


@contextlib.asynccontextmanager
async def _boot_vm(name: str, options: dict[str, Any]) -> AsyncIterator[Kept]:
    from .vm import UtilityVM

    async with UtilityVM(name=name, **options) as vm:
        yield vm


def _log_to(run: rundir.RunDir) -> None:
    """Our log, and whatever else this process and its children write, into keeper.log."""
    handler = logging.handlers.RotatingFileHandler(run.log, maxBytes=MAX_LOG, backupCount=1)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    with open(os.devnull) as null, open(run.log, "ab", buffering=0) as out:
        os.dup2(null.fileno(), 0)
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)


def _fail(claim: rundir.Claim, report: int, error: ByreError) -> None:
    """What it fails of may also keep it from tidying: a full disk, say."""
    try:
        claim.release()
    except ByreError as left:
        log.error("! %s", left)
    _report(report, {"error": to_wire(error)})


def _report(fd: int, answer: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # nobody listens any more
        os.write(fd, json.dumps(answer, default=str).encode() + b"\n")


if __name__ == "__main__":
    main()
