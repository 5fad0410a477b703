"""`byre image`, for containers' images: `byre.images` does the work.  `image` has the guest's."""

from __future__ import annotations

import json
import tarfile
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from byre import images
from byre.oci import eviction, reference
from byre.oci.images import SHORT_DIGEST
from byre_images.cache import KERNEL

from . import foreground, image, table
from .progress import Progress, size
from .selection import registry_of
from .status import say

if TYPE_CHECKING:
    import argparse


def pull(arguments: argparse.Namespace) -> int:
    async def main(_: foreground.Signals) -> int:
        for name in arguments.names:
            with Progress() as shown:
                found = await images.pull(name, registry=registry_of(arguments), progress=shown)
            print(f"{found.name.partition('@')[0]}@{found.source}")
        return 0

    return foreground.run(main)


def import_(arguments: argparse.Namespace) -> int:
    """What the file is, it says itself."""
    if _is_guest_image(Path(arguments.file)):
        if arguments.name:
            say("it is a guest image: the name does not matter")
        return image.import_(arguments)
    source = arguments.file if reference.is_path(arguments.file) else f"./{arguments.file}"

    async def main(_: foreground.Signals) -> int:
        with Progress("importing") as shown:
            found = await images.import_image(source, arguments.name, progress=shown)
        print(found.name)
        return 0

    return foreground.run(main)


def _is_guest_image(file: Path) -> bool:
    """Whether `byre image export` wrote it: the one kind of archive that has a kernel in it."""
    try:
        with tarfile.open(file, "r|gz") as archive:
            return any(member.name == KERNEL for member in archive)
    except (OSError, tarfile.TarError, EOFError, zlib.error):
        return False


def ls(arguments: argparse.Namespace) -> int:
    rows: list[tuple[str, ...]] = [("CONTAINER IMAGE", "TAG", "DIGEST", "SIZE", "PULLED")]
    for found in images.list_images():
        name = reference.parse(found.name)
        tag = name.tag or f"@{name.digest[:20]}"
        digest = found.digest.partition(":")[2][:SHORT_DIGEST]
        age = table.age(time.time() - found.pulled) + " ago"
        rows.append((name.repository, tag, digest, size(found.stored), age))
    table.show(rows)
    count, used = eviction.usage()
    print(f"\n{count} converted layers in the cache: {size(used)}\n")
    return image.ls(arguments)


def inspect(arguments: argparse.Namespace) -> int:
    print(json.dumps([images.inspect(name) for name in arguments.names], indent=2))
    return 0


def rm(arguments: argparse.Namespace) -> int:
    names, freed = images.remove(*arguments.names)
    for name in names:
        print(name)
    return _tell(freed)


def prune(arguments: argparse.Namespace) -> int:
    return _tell(images.prune(unused_for=arguments.older_than, keep_bytes=arguments.keep))


def _tell(freed: images.Freed) -> int:
    print(f"freed {size(freed.size)}")
    if freed.in_use:
        say("what is in use was left: byre image prune removes it later")
    return 0
