"""`byre doctor`: what this host has, and what to do about what it lacks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import byre_images
from byre.machines.host import HostFact, describe_host
from byre_proto.errors import printable

if TYPE_CHECKING:
    import argparse


def doctor(_: argparse.Namespace) -> int:
    """0 when a VM can run here, 1 when something is missing."""
    report = describe_host()
    facts = [*report.facts, _image()]
    width = max(len(fact.name) for fact in facts)
    for fact in facts:
        print(f"{'ok' if fact.ok else 'NO':<4}{fact.name:<{width}}  {printable(fact.detail)}")
        if fact.hint:
            print(f"{'':<{width + 4}}  -> {printable(fact.hint)}")
    return 0 if report.ok else 1


def _image() -> HostFact:
    """Not fatal: the first VM builds it."""
    current = byre_images.current()
    if current is None:
        hint = "build it: byre image build, or the first VM does"
        others = f"; {count} of other versions" if (count := len(byre_images.list_images())) else ""
        return HostFact("guest image", True, f"none for this version of byre{others}", hint)
    return HostFact("guest image", True, str(current.directory))
