"""`byre pod`: what containers of a VM that is up share (`byre run --pod NAME` puts one in)."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from byre.parameters import Resources
from byre.vm import UtilityVM

from . import foreground, table

if TYPE_CHECKING:
    import argparse


def create(arguments: argparse.Namespace) -> int:
    return foreground.run(lambda _: _create(arguments))


async def _create(arguments: argparse.Namespace) -> int:
    limits = Resources(memory_bytes=arguments.memory, cpus=arguments.cpus, pids=arguments.pids_limit)
    async with await UtilityVM.attach(arguments.vm_name) as vm:
        pod = await vm.create_pod(
            arguments.name,
            hostname=arguments.hostname,
            resources=limits,
            share_pid=arguments.share_pid,
            net=arguments.net,
        )
    print(pod.name)
    return 0


def ls(arguments: argparse.Namespace) -> int:
    return foreground.run(lambda _: _ls(arguments))


async def _ls(arguments: argparse.Namespace) -> int:
    rows: list[tuple[object, ...]] = [("POD", "STATE", "HOSTNAME", "PROCESSES", "CREATED", "CONTAINERS")]
    async with await UtilityVM.attach(arguments.vm_name) as vm:
        for pod in await vm.pods():
            created = table.age(time.time() - pod["created_ns"] / 1e9) + " ago"
            processes = "shared" if pod["share_pid"] else "own"
            rows.append((pod["id"], pod["state"], pod["hostname"], processes, created, " ".join(pod["containers"])))
    table.show(rows)
    return 0


def rm(arguments: argparse.Namespace) -> int:
    return foreground.run(lambda _: _rm(arguments))


async def _rm(arguments: argparse.Namespace) -> int:
    async with await UtilityVM.attach(arguments.vm_name) as vm:
        for name in arguments.pods:
            await (await vm.open_pod(name)).delete(force=arguments.force)
            print(name)
    return 0
