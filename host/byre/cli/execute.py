"""`byre exec` and `byre shell`: a command where something runs already."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from byre.process import GuestProcessHost

from . import foreground
from .selection import attach, check_terminal, parameters

if TYPE_CHECKING:
    import argparse

#: bash where there is one; users' fingers expect it.
_SHELL = ["/bin/sh", "-c", 'exec "$(command -v bash || echo /bin/sh)"']


def execute(arguments: argparse.Namespace) -> int:
    check_terminal(arguments)
    return foreground.run(lambda signals: _execute(arguments, signals, arguments.command_line))


def shell(arguments: argparse.Namespace) -> int:
    arguments.vm_name, arguments.target = arguments.name, arguments.container
    arguments.interactive, arguments.tty = True, os.isatty(0)
    return foreground.run(lambda signals: _execute(arguments, signals, _SHELL))


async def _execute(arguments: argparse.Namespace, signals: foreground.Signals, args: list[str]) -> int:
    async with await attach(arguments.vm_name) as vm:
        container = await vm.open_container(arguments.target) if arguments.target else None
        host: GuestProcessHost = container or vm
        try:
            process = await host.start_process(parameters(arguments, args))
            try:
                return await foreground.attach(process, signals, arguments, kill=process.kill_tree)
            finally:
                await process.close()
        finally:
            if container is not None:
                await container.close()
