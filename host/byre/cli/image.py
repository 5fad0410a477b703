"""`byre image`, for the guest image that VMs boot from.  All work is `byre_images`'s; `images` has containers'."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import byre_images
from byre.errors import ByreError

from . import table
from .status import say

if TYPE_CHECKING:
    import argparse


def build(_: argparse.Namespace) -> int:
    image = byre_images.build(say)
    print(image.directory)
    return 0


def ls(_: argparse.Namespace) -> int:
    current = byre_images.current()
    rows = [("GUEST IMAGE", "KERNEL", "SIZE", "USED", "FOR")]
    for image in byre_images.list_images():
        rows.append(
            (
                image.directory.name,
                image.manifest.get("kernel", ""),
                f"{_bytes(image) / 2**20:.0f} MiB",
                table.age(time.time() - image.directory.stat().st_mtime) + " ago",
                "this byre" if current and image.digest == current.digest else "another version",
            )
        )
    table.show(rows)
    return 0


def verify(_: argparse.Namespace) -> int:
    images = byre_images.list_images()
    if not images:
        raise _no_image()
    for image in images:
        byre_images.verify(image)
        print(f"{image.directory.name}: what its manifest says")
    return 0


def export(arguments: argparse.Namespace) -> int:
    image = byre_images.ensure(say)
    byre_images.export(image, Path(arguments.file))
    print(f"{image.directory.name} is in {arguments.file}")
    return 0


def import_(arguments: argparse.Namespace) -> int:
    image = byre_images.import_image(Path(arguments.file))
    print(image.directory)
    current = byre_images.current()
    if current is None or current.digest != image.digest:
        say("it was made by another version of byre: this one does not use it")
    return 0


def _bytes(image: byre_images.Image) -> int:
    return sum(path.stat().st_size for path in (image.kernel, image.initramfs, image.root))


def _no_image() -> ByreError:
    return ByreError("no guest image is built", hint="build one: byre image build")
