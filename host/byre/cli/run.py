"""`byre run`: a command in a new container, or in the VM itself."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from typing import TYPE_CHECKING, Any

from byre import rundir
from byre.errors import ContainerNotFound
from byre.parameters import Resources
from byre.timings import Timeline, age, span

from . import foreground, terminal
from .selection import check_terminal, parameters, registry_of, talkative, variables, vm_of
from .status import say

if TYPE_CHECKING:
    import argparse

    from byre.container import GuestContainer
    from byre.ports.methods import Sockets
    from byre.vm import UtilityVM

    from .progress import Progress


def run(arguments: argparse.Namespace) -> int:
    check_terminal(arguments)
    if arguments.timings:
        return _timed(arguments)
    if arguments.detach:
        return foreground.run(lambda _: _detach(arguments))
    return foreground.run(lambda signals: _foreground(arguments, signals))


def _timed(arguments: argparse.Namespace) -> int:
    """`run`, and on stderr where the time went."""
    timeline = Timeline()
    now = time.monotonic()
    timeline.add("Python and imports", now - age(), now)
    arguments.timings = False
    try:
        return run(arguments)
    finally:
        timeline.stop()
        sys.stderr.write(f"{timeline}\n")


async def _foreground(arguments: argparse.Namespace, signals: foreground.Signals) -> int:
    async with vm_of(arguments) as (vm, own):
        if not arguments.vm:
            return await _container(arguments, signals, vm, own)
        network = await vm.open_network() if arguments.net == "user" else contextlib.nullcontext()
        async with network, _forwards(vm, arguments):
            with span("exec"):
                process = await vm.start_process(parameters(arguments, arguments.command_line))
            try:
                with span("output"):
                    return await foreground.attach(process, signals, arguments, kill=process.kill_tree)
            finally:
                if not own:
                    await process.close()


def _forwards(where: Sockets, arguments: argparse.Namespace) -> contextlib.AbstractAsyncContextManager[None]:
    """What -p says.  What only some commands need is imported for them: a tenth of the time."""
    if not arguments.publish:
        return contextlib.nullcontext()
    from .ports import forwards

    return forwards(where, arguments)


async def _container(arguments: argparse.Namespace, signals: foreground.Signals, vm: UtilityVM, own: bool) -> int:
    from .progress import Progress

    # A VM of our own booted while the image was fetched.
    with Progress() as shown:
        pull = "missing" if own and arguments.pull != "never" else arguments.pull
        with span("container"):
            container = await _create(arguments, vm, pull, shown)
    ended = False
    try:
        if arguments.rm and not own:
            await vm.bridge.call("vm.remove_at_exit", container=container.id)
        async with _forwards(container, arguments):
            with span("init"):
                init = await container.start_process(None)
            try:
                with span("output"):
                    status = await foreground.attach(
                        init, signals, arguments, kill=container.terminate, release=container.start
                    )
            finally:
                if not own:
                    await init.close()
        ended = True
        return status
    finally:
        if not own:
            # One that never ran, or whose command we gave up, is of no use to anybody.
            await asyncio.shield(_leave(container, delete=arguments.rm or not ended))


async def _leave(container: GuestContainer, *, delete: bool) -> None:
    if delete:
        with contextlib.suppress(ContainerNotFound):
            await container.delete()
    await container.close()


async def _detach(arguments: argparse.Namespace) -> int:
    """Print the id of a container that goes on without us."""
    name = arguments.vm_name or rundir.DEFAULT
    if not arguments.vm_name and not arguments.pod and not rundir.is_up(name):
        if talkative(arguments):
            say(f"bringing up the VM {name!r}; it stays up until: byre down")
        from .vms import bring_up

        await bring_up(name, {})
    from byre.vm import UtilityVM

    from .ports import publish
    from .progress import Progress

    async with await UtilityVM.attach(name) as vm:
        with Progress() as shown:
            container = await _create(arguments, vm, arguments.pull, shown)
        started = False
        try:
            if arguments.rm:
                await vm.bridge.call("vm.remove_at_exit", container=container.id)
            await publish(vm, arguments, container.id)
            await container.start()
            started = True
        finally:
            await asyncio.shield(_leave(container, delete=not started))
        print(container.id)
    return 0


async def _create(arguments: argparse.Namespace, vm: UtilityVM, pull: str, shown: Progress) -> GuestContainer:
    width, height = terminal.size(1)
    options: dict[str, Any] = {"pull": pull or "missing", "registry": registry_of(arguments), "progress": shown}
    if arguments.storage_opt is not None:
        options |= {"scratch": "disk", "scratch_bytes": arguments.storage_opt}
    if arguments.entrypoint is not None:
        options["entrypoint"] = [arguments.entrypoint] if arguments.entrypoint else []
    return await vm.create_container(
        arguments.name,
        image=arguments.target,
        rootfs=arguments.rootfs,
        args=arguments.command_line,
        env=variables(arguments),
        cwd=arguments.workdir,
        user=arguments.user,
        stdin=arguments.interactive,
        terminal=arguments.tty,
        width=width,
        height=height,
        resources=Resources(memory_bytes=arguments.memory, cpus=arguments.cpus, pids=arguments.pids_limit),
        privileged=arguments.privileged,
        cap_add=arguments.cap_add,
        cap_drop=arguments.cap_drop,
        no_new_privileges=not arguments.allow_new_privileges,
        read_only=arguments.read_only,
        tmpfs=arguments.tmpfs,
        mounts=arguments.volume,
        hostname=arguments.hostname,
        pod=arguments.pod,
        net=arguments.net,
        **options,
    )
