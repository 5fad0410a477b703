"""`byre template`: the saved machines that VMs are cloned from.  All work is `byre.templates`'s; this shows it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from byre.errors import InvalidRequest, TemplateBroken
from byre.templates import Store, Template

from . import table
from .status import say

if TYPE_CHECKING:
    import argparse

#: Digits of a key that are shown: enough to name one.
SHOWN = 12

#: Options of QEMU's command line that tell templates apart for people.
_TOLD = {"-machine": "MACHINE", "-m": "MEMORY", "-smp": "CPUS", "-accel": "ACCELERATOR"}


def ls(_: argparse.Namespace) -> int:
    rows: list[tuple[object, ...]] = [("TEMPLATE", *_TOLD.values(), "QEMU", "DISK", "MADE", "USED")]
    now = time.time()
    for template in Store().templates():
        made, used = (table.age(now - when) + " ago" for when in (template.manifest["made"], template.used))
        disk = f"{template.disk_bytes // 2**20} MiB"
        rows.append((template.key[:SHOWN], *_told(template), template.manifest["qemu"], disk, made, used))
    table.show(rows)
    return 0


def verify(_: argparse.Namespace) -> int:
    store = Store()
    broken = 0
    for template in store.templates():
        try:
            store.verify(template)
            print(f"{template.key[:SHOWN]}: as it was made")
        except TemplateBroken as error:
            store.discard(template.key, error.message)
            say(f"{error.message}; it is removed")
            broken += 1
    return 1 if broken else 0


def rm(arguments: argparse.Namespace) -> int:
    store = Store()
    for name in arguments.templates:
        store.discard(_named(store, name).key, "asked for")
        print(name)
    return 0


def prune(arguments: argparse.Namespace) -> int:
    for name in Store().prune(arguments.keep):
        print(name)
    return 0


def _named(store: Store, name: str) -> Template:
    """The one whose key begins so.  Raises `InvalidRequest` unless it is one."""
    found = [template for template in store.templates() if template.key.startswith(name)]
    if len(found) != 1:
        what = "no template's key begins" if not found else "the keys of several templates begin"
        raise InvalidRequest(f"{what} with {name!r}", hint="see: byre template ls")
    return found[0]


def _told(template: Template) -> list[str]:
    """From the command line that it is keyed by: the first word of each option's value."""
    command: list[str] = template.manifest["facts"].get("command", [])
    told = []
    for option in _TOLD:
        value = command[command.index(option) + 1] if option in command[:-1] else ""
        told.append(value.partition(",")[0])
    return told
