"""`byre up`, `byre down`, `byre ps`: VMs that stay up, each in the care of its keeper."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from byre import detached, rundir
from byre.errors import (
    AnswerInvalid,
    ByreError,
    ConnectionLost,
    DeadlineExceeded,
    VMNotFound,
    answer_of_guest,
)
from byre.machines.spawn import in_thread

from . import foreground, table
from .selection import MIB, talkative
from .status import say

if TYPE_CHECKING:
    import argparse

#: How long `ps` waits for one keeper, in seconds: longer than a keeper waits for its guest.
ANSWER_TIMEOUT = 8.0


_OPTIONS = ("accelerator", "machine", "transport", "template")


def up(arguments: argparse.Namespace) -> int:
    return foreground.run(lambda _: _up(arguments))


async def _up(arguments: argparse.Namespace) -> int:
    options: dict[str, Any] = {name: getattr(arguments, name) for name in _OPTIONS}
    if arguments.memory:
        options["memory_mib"] = max(1, arguments.memory // MIB)
    if arguments.cpus is not None:
        options["cpus"] = arguments.cpus
    if arguments.timeout:
        options["boot_timeout"] = arguments.timeout
    begin = time.monotonic()
    await bring_up(arguments.name, options)
    if arguments.publish or arguments.net != "none":
        await _give(arguments)
    if talkative(arguments):
        machine = rundir.find(arguments.name).info().get("machine", {})
        for name in _OPTIONS:
            say(f"{name} {machine.get(name, 'unknown')}")
        say(f"up after {time.monotonic() - begin:.1f} s")
    print(arguments.name)
    return 0


async def _give(arguments: argparse.Namespace) -> None:
    """A VM without the network or the ports that were asked for is not what was asked for."""
    from byre.vm import UtilityVM

    from .ports import publish

    try:
        async with await UtilityVM.attach(arguments.name) as vm:
            if arguments.net == "user":
                await vm.open_network()
            await publish(vm, arguments)
    except BaseException:
        await asyncio.shield(detached.end(arguments.name))
        raise


async def bring_up(name: str, options: dict[str, Any]) -> None:
    """Start a keeper.  The guest image is built here, where somebody sees the progress."""
    import byre_images

    if not rundir.is_up(name):
        await in_thread(lambda: byre_images.ensure(say))
    await detached.start(name, options)


def down(arguments: argparse.Namespace) -> int:
    return foreground.run(lambda _: _down(arguments))


async def _down(arguments: argparse.Namespace) -> int:
    try:
        await detached.end(arguments.name, arguments.timeout)
    except VMNotFound:
        if not rundir.sweep(arguments.name):
            raise
        say(f"{arguments.name} was dead already")
    print(arguments.name)
    return 0


def ps(_: argparse.Namespace) -> int:
    return asyncio.run(_ps())


async def _ps() -> int:
    vms: Rows = [("VM", "STATE", "KEEPER", "MEMORY", "ACCELERATOR", "UP")]
    containers: Rows = [("CONTAINER", "VM", "STATE", "PID", "CREATED", "COMMAND")]
    processes: Rows = [("PROCESS", "VM", "CONTAINER", "PID", "COMMAND")]
    for name in rundir.names():
        info = rundir.find(name).info()
        if rundir.sweep(name):
            vms.append((name, f"dead, removed: {info.get('died', 'its keeper was killed')}", "", "", "", ""))
            continue
        state, found = await _look(name, info)
        started = time.time() - info["started"] if "started" in info else 0
        age = table.age(started)
        try:
            with answer_of_guest("list of what runs in it"):
                more = _rows(name, found)
        except AnswerInvalid as error:
            vms.append((name, f"error: {error.message}", info.get("pid", ""), "", "", age))
            continue
        vms.append((name, state, info.get("pid", ""), *more[0], age))
        containers += more[1]
        processes += more[2]
    for rows in (vms, containers, processes):
        if len(rows) > 1 or rows is vms:
            table.show(rows)
    return 0


Rows = list[tuple[object, ...]]


def _rows(name: str, found: dict[str, Any]) -> tuple[tuple[str, str], Rows, Rows]:
    """Memory and accelerator of one VM, its containers, its processes."""
    accelerator = str(found.get("machine", {}).get("accelerator", "")).partition(":")[0]
    listed = found.get("processes", ())
    commands = {process["process"]: " ".join(process["args"]) for process in listed}
    containers = [_container_row(name, container, commands) for container in found.get("containers", ())]
    processes: Rows = [
        (process["process"], name, process["container"], process["pid"], commands[process["process"]])
        for process in listed
        if process["exit"] is None
    ]
    return (_memory(found.get("guest", {})), accelerator), containers, processes


async def _look(name: str, info: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The state of a VM, and what its keeper and its agent say of it."""
    if "machine" not in info:
        return "booting", {}
    found: dict[str, Any] = {}
    try:
        _, bridge = await detached.attach(name, ANSWER_TIMEOUT)
        try:
            found.update((await bridge.call("vm.info", timeout=ANSWER_TIMEOUT))["info"])
            for what in ("container", "process"):
                found.update(await bridge.call(f"{what}.list", timeout=ANSWER_TIMEOUT))
        finally:
            await bridge.close()
    except DeadlineExceeded:
        return "no answer", found
    except (ConnectionLost, VMNotFound):
        return "ending", found
    except ByreError as error:
        return f"error: {error.message}", found
    return "up", found


def _memory(guest: dict[str, Any]) -> str:
    return f"{guest['memory_bytes'] // MIB} MiB" if "memory_bytes" in guest else ""


def _container_row(vm: str, container: dict[str, Any], commands: dict[int, str]) -> tuple[object, ...]:
    state = str(container["state"])
    ended = container.get("exit")
    if isinstance(ended, dict) and "code" in ended:
        state += f" ({ended['code']})"
    created = table.age(time.time() - container["created_ns"] / 1e9) + " ago"
    return container["id"], vm, state, container["pid"], created, commands.get(container["process"], "")
