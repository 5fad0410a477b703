"""`byre events`, `byre stats`, `byre top`: what happens in a VM that is up, and what its containers use."""

from __future__ import annotations

import asyncio
import datetime
import json
import logging
import sys
import time
from typing import TYPE_CHECKING, Any

from byre.errors import ContainerNotFound
from byre.events import ContainerEvent, Event, LogLine, VMEnded
from byre.vm import UtilityVM
from byre_proto.errors import printable

from . import foreground, table
from .progress import size

if TYPE_CHECKING:
    import argparse

    from byre.stats import ContainerStats

#: Seconds between two looks of `byre stats`.
INTERVAL = 2.0

#: A rate needs two looks; the first ones are this far apart, in seconds.
FIRST_INTERVAL = 0.5

_HOME_AND_CLEAR = "\033[H\033[J"


def events(arguments: argparse.Namespace) -> int:
    return foreground.run(lambda _: _events(arguments))


async def _events(arguments: argparse.Namespace) -> int:
    async with await UtilityVM.attach(arguments.vm_name) as vm:
        everything = arguments.no_follow or arguments.since is not None
        begin = time.time() - arguments.since if arguments.since is not None else 0.0
        last = await vm.journal.now() if arguments.no_follow else sys.maxsize
        if not last:
            return 0
        async for event in vm.events(after=0 if everything else None):
            if event.number > last:
                break
            if event.time >= begin or isinstance(event, VMEnded):
                print(_as_json(event) if arguments.format == "json" else _as_text(event), flush=True)
            if event.number == last:
                break
    return 0


def _as_json(event: Event) -> str:
    return json.dumps({"number": event.number, "time": event.time, "kind": event.kind, **event.details()})


def _as_text(event: Event) -> str:
    moment = datetime.datetime.fromtimestamp(event.time).astimezone().isoformat(timespec="milliseconds")
    details = event.details()
    if isinstance(event, LogLine):
        about = f"{logging.getLevelName(event.level).lower()} {event.source}: {event.message}"
    else:
        subject = [details.pop("container")] if isinstance(event, ContainerEvent) else []
        about = " ".join([*subject, *(f"{name}={value}" for name, value in details.items())])
    return printable(f"{moment} {event.kind} {about}").replace("\n", " ")


def stats(arguments: argparse.Namespace) -> int:
    return foreground.run(lambda _: _stats(arguments))


async def _stats(arguments: argparse.Namespace) -> int:
    """A table again and again; without a terminal, or with --no-stream, lines once."""
    async with await UtilityVM.attach(arguments.vm_name) as vm:
        before = await _look(vm, arguments.containers)
        await asyncio.sleep(FIRST_INTERVAL)
        while True:
            now = await _look(vm, arguments.containers)
            _show(arguments, before, now)
            if arguments.no_stream or not sys.stdout.isatty():
                return 0
            before = now
            await asyncio.sleep(INTERVAL)


async def _look(vm: UtilityVM, wanted: list[str]) -> dict[str, ContainerStats]:
    found = {each.container: each for each in await vm.stats()}
    for name in wanted:
        if name not in found:
            raise ContainerNotFound(f"there is no container {name!r}", hint="byre ps lists them", container=name)
    return {name: each for name, each in found.items() if not wanted or name in wanted}


def _show(arguments: argparse.Namespace, before: dict[str, ContainerStats], now: dict[str, ContainerStats]) -> None:
    if arguments.format == "json":
        for each in now.values():
            print(json.dumps({**vars(each), "cpus": round(_processors(before, each), 4)}))
    else:
        if sys.stdout.isatty() and not arguments.no_stream:
            print(_HOME_AND_CLEAR, end="")
        heads = ("CONTAINER", "CPU %", "MEM USAGE / LIMIT", "MEM %", "PIDS / LIMIT", "BLOCK I/O", "OOM KILLS")
        table.show([heads, *(_row(each, _processors(before, each)) for each in now.values())])
    sys.stdout.flush()


def _processors(before: dict[str, ContainerStats], now: ContainerStats) -> float:
    return now.processors_since(before.get(now.container, now))


def _row(stats: ContainerStats, processors: float) -> tuple[object, ...]:
    limit, pids = stats.memory_limit, stats.pids_limit
    return (
        stats.container,
        f"{100 * processors:.2f}",
        f"{size(stats.memory_bytes)} / {'-' if limit is None else size(limit)}",
        "-" if not limit else f"{100 * stats.memory_bytes / limit:.2f}",
        f"{stats.pids} / {'-' if pids is None else pids}",
        f"{size(stats.read_bytes)} / {size(stats.written_bytes)}",
        stats.oom_kills,
    )


def top(arguments: argparse.Namespace) -> int:
    return foreground.run(lambda _: _top(arguments))


async def _top(arguments: argparse.Namespace) -> int:
    rows: list[tuple[Any, ...]] = [("PID", "UID", "STATE", "TIME", "RSS", "COMMAND")]
    async with await UtilityVM.attach(arguments.vm_name) as vm:
        container = await vm.open_container(arguments.container)
        try:
            for each in await container.processes():
                command = each.arguments or f"[{each.command}]"
                rows.append(
                    (each.pid, each.uid, each.state, _cpu_time(each.cpu_seconds), size(each.memory_bytes), command)
                )
        finally:
            await container.close()
    table.show(rows)
    return 0


def _cpu_time(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"{minutes:.0f}:{rest:05.2f}"
