"""`byre volume`: disks that outlive VMs.  All work is `byre.volumes`'s; this shows it."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import TYPE_CHECKING

from byre import disk_files, volumes

from . import table
from .status import say

if TYPE_CHECKING:
    import argparse


def create(arguments: argparse.Namespace) -> int:
    for name in arguments.names:
        print(volumes.create(name, arguments.size or disk_files.DEFAULT_BYTES).name)
    return 0


def ls(_: argparse.Namespace) -> int:
    rows: list[tuple[object, ...]] = [("VOLUME", "SIZE", "DISK", "WRITTEN", "VM")]
    for info in volumes.list_volumes():
        sizes = (f"{size / 2**20:.0f} MiB" for size in (info.size_bytes, info.disk_bytes))
        rows.append((info.name, *sizes, table.age(time.time() - info.written) + " ago", info.vm or "-"))
    table.show(rows)
    return 0


def inspect(arguments: argparse.Namespace) -> int:
    found = [dataclasses.asdict(volumes.inspect(name)) for name in arguments.names]
    print(json.dumps(found, indent=2, default=str))
    return 0


def rm(arguments: argparse.Namespace) -> int:
    for name in arguments.names:
        volumes.remove(name)
        print(name)
    return 0


def prune(arguments: argparse.Namespace) -> int:
    idle = [info.name for info in volumes.list_volumes() if not info.vm]
    if idle and not arguments.force:
        print(f"remove {', '.join(idle)}, with all that is in them? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            say("nothing is removed")
            return 1
    for info in volumes.prune(idle):
        print(info.name)
    return 0
