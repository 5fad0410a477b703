"""Which VM a command runs in, and what is common to the commands that run something.

--in NAME          that one, which is up
"default" is up    it
else               a VM of the command's own, which ends with it
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import sys
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from byre import rundir
from byre.errors import InvalidRequest
from byre.machines.spawn import stoppable
from byre.parameters import ProcessParameters
from byre.timings import span
from byre.vm import UtilityVM

from . import terminal
from .status import say

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from byre.oci.registry import Registry

#: A VM of the command's own has this much memory, or what its container is allowed and this much more: for the
#: kernel, the agent, and the container's writable layer.
OWN_MEMORY_MIB = 512

MIB = 1024 * 1024


def talkative(arguments: argparse.Namespace) -> bool:
    """Whether to say what is done: to a person, or when asked for."""
    return bool(arguments.verbose or sys.stderr.isatty())


@contextlib.asynccontextmanager
async def vm_of(arguments: argparse.Namespace) -> AsyncIterator[tuple[UtilityVM, bool]]:
    """The VM for `byre run`, and whether it is the command's own."""
    up = not arguments.fresh and rundir.is_up(rundir.DEFAULT)
    name = arguments.vm_name or (rundir.DEFAULT if up or arguments.pod else "")
    if name:
        if talkative(arguments):
            say(f"in the VM {name!r}, which is up")
        if arguments.vm and (arguments.memory or arguments.cpus):
            raise InvalidRequest(
                f"the VM {name!r} has its size already", hint="leave -m and --cpus out, or --fresh"
            )
        async with await attach(name) as vm:
            yield vm, False
        return
    if talkative(arguments):
        say("in a VM of its own, which starts now")
    vm = UtilityVM(**_size(arguments))
    async with _boot(vm, arguments):
        yield vm, True


@contextlib.asynccontextmanager
async def _boot(vm: UtilityVM, arguments: argparse.Namespace) -> AsyncIterator[None]:
    """Boot, while the image's layers are made ready: one that is not there is not worth waiting for a VM."""
    booting = asyncio.create_task(_start(vm))
    tasks: set[asyncio.Task[Any]] = {booting}
    if not arguments.vm and not arguments.rootfs:
        tasks.add(asyncio.create_task(stoppable(lambda check: _prepare(arguments, check))))
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        with span("end of the VM"):
            await vm.close()


async def _start(vm: UtilityVM) -> None:
    with span("VM"):
        await vm.start(say)


def _prepare(arguments: argparse.Namespace, check: Callable[[], None]) -> None:
    """Fetch what is not here, and convert what is not in the cache.  Blocks."""
    from byre.oci.pull import PullProgress, obtained
    from byre.oci.store import LayerProgress, LayerStore

    from .progress import Progress

    with Progress() as shown:

        def tell(step: PullProgress | LayerProgress) -> None:
            check()
            shown(step)

        with obtained(arguments.target, arguments.pull or "missing", registry_of(arguments), tell) as found:
            LayerStore().prepare(found, tell)


async def attach(name: str) -> UtilityVM:
    """A VM that is up, for a command in the foreground: what it starts there ends with it, however it ends."""
    vm = await UtilityVM.attach(name)
    await vm.bridge.call("vm.tie")
    return vm


def _size(arguments: argparse.Namespace) -> dict[str, Any]:
    options: dict[str, Any] = {"template": arguments.template}
    if arguments.cpus:
        options["cpus"] = math.ceil(arguments.cpus)
    if arguments.memory:
        wanted = math.ceil(arguments.memory / MIB)
        options["memory_mib"] = wanted if arguments.vm else wanted + OWN_MEMORY_MIB
    return options


def registry_of(arguments: argparse.Namespace) -> Registry:
    """What the flags say about registries."""
    from byre.oci.registry import Registry

    return Registry(authfile=arguments.authfile or None, tls_verify=arguments.tls_verify != "false")


def variables(arguments: argparse.Namespace) -> dict[str, str]:
    """What -e says, and TERM for a terminal; a name without a value is passed on where we have it."""
    found = {"TERM": os.environ.get("TERM", "xterm")} if arguments.tty else {}
    for text in arguments.env:
        name, equals, value = text.partition("=")
        if equals:
            found[name] = value
        elif name in os.environ:
            found[name] = os.environ[name]
    return found


def check_terminal(arguments: argparse.Namespace) -> None:
    """Raises `InvalidRequest` for -it without a terminal to type at."""
    if arguments.tty and arguments.interactive and not os.isatty(0):
        raise InvalidRequest("stdin is not a terminal", hint="leave -t out")


def parameters(arguments: argparse.Namespace, args: list[str]) -> ProcessParameters:
    """The process that the flags describe."""
    width, height = terminal.size(1)
    return ProcessParameters(
        args=args,
        add_env=variables(arguments),
        cwd=arguments.workdir,
        user=arguments.user,
        terminal=arguments.tty,
        width=width,
        height=height,
        stdin=arguments.interactive,
        stdout=True,
        stderr=not arguments.tty,
    )
