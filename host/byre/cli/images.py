"""`byre image`, for containers' images: pull, import, list, inspect, remove, prune.  `image` has the guest's."""

from __future__ import annotations

import json
import tarfile
import time
import zlib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byre.errors import ImageInvalid
from byre.machines.spawn import stoppable
from byre.oci import eviction, reference
from byre.oci.images import SHORT_DIGEST, Freed, Image, ImageStore
from byre.oci.layout import parse_json
from byre.oci.pull import PullProgress, pull, take_in
from byre_images.cache import KERNEL

from . import foreground, image, table
from .progress import Progress, size
from .selection import registry_of
from .status import say

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable


def pull_(arguments: argparse.Namespace) -> int:
    async def main(_: foreground.Signals) -> int:
        for name in arguments.names:
            found = await _working("pulling", partial(pull, ImageStore(), name, registry_of(arguments)))
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
        print((await _working("importing", partial(take_in, ImageStore(), source, arguments.name))).name)
        return 0

    return foreground.run(main)


def _is_guest_image(file: Path) -> bool:
    """Whether `byre image export` wrote it: the one kind of archive that has a kernel in it."""
    try:
        with tarfile.open(file, "r|gz") as archive:
            return any(member.name == KERNEL for member in archive)
    except (OSError, tarfile.TarError, EOFError, zlib.error):
        return False


async def _working(verb: str, work: Callable[[Callable[[PullProgress], None]], Image]) -> Image:
    """Do it in a thread, with progress shown; a signal ends it."""
    shown = Progress(verb)

    def run(check: Callable[[], None]) -> Image:
        def tell(step: PullProgress) -> None:
            check()
            shown(step)

        return work(tell)

    try:
        return await stoppable(run)
    finally:
        shown.close()


def ls(arguments: argparse.Namespace) -> int:
    rows: list[tuple[str, ...]] = [("CONTAINER IMAGE", "TAG", "DIGEST", "SIZE", "PULLED")]
    for found in ImageStore().images():
        name, tag = _name_and_tag(found)
        digest = found.digest.partition(":")[2][:SHORT_DIGEST]
        age = table.age(time.time() - found.pulled) + " ago"
        rows.append((name, tag, digest, size(found.stored), age))
    table.show(rows)
    count, used = eviction.usage()
    print(f"\n{count} converted layers in the cache: {size(used)}\n")
    return image.ls(arguments)


def _name_and_tag(found: Image) -> tuple[str, str]:
    name = reference.parse(found.name)
    return name.repository, name.tag or f"@{name.digest[:20]}"


def inspect(arguments: argparse.Namespace) -> int:
    store = ImageStore()
    print(json.dumps([_described(store, store.get(name)) for name in arguments.names], indent=2))
    return 0


def _described(store: ImageStore, found: Image) -> dict[str, Any]:
    with store.open(found) as opened:
        config = parse_json(opened.config_document, "the image's configuration")
        return {
            "Name": found.name,
            "Digest": found.digest,
            "SourceDigest": found.source,
            "Pulled": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(found.pulled)),
            "Created": config.get("created"),
            "Architecture": opened.config.architecture,
            "Os": opened.config.os,
            "Config": config.get("config") or {},
            "Size": found.stored,
            "Layers": [
                {"Digest": layer.digest, "MediaType": layer.media_type, "Size": layer.size, "DiffID": layer.diff_id}
                for layer in opened.layers
            ],
        }


def rm(arguments: argparse.Namespace) -> int:
    """Names first, then what no name leads to any more."""
    store = ImageStore()
    found = {each.name: each for name in arguments.names for each in _named(store, name)}
    gone = [stack for each in found.values() if (stack := _stack(store, each))]
    for each in found.values():
        store.untag(each)
        print(each.name)
    kept = [stack for each in store.images() if (stack := _stack(store, each))]
    _tell_freed([eviction.forget(gone, kept), store.collect()])
    return 0


def _named(store: ImageStore, text: str) -> list[Image]:
    """The image of that name; all of its names where it is given by its digest."""
    found = store.get(text)
    if text.startswith("sha256:") or found.name != reference.parse(text).name:
        return [each for each in store.images() if each.digest == found.digest]
    return [found]


def _stack(store: ImageStore, found: Image) -> tuple[str, ...]:
    """Its layers' diff_ids; none of an image that is damaged."""
    try:
        with store.open(found) as opened:
            return opened.config.diff_ids
    except ImageInvalid:
        return ()


def prune(arguments: argparse.Namespace) -> int:
    freed = [eviction.evict(unused_for=arguments.older_than, keep_bytes=arguments.keep), ImageStore().collect()]
    _tell_freed(freed)
    return 0


def _tell_freed(freed: list[Freed]) -> None:
    print(f"freed {size(sum(each.size for each in freed))}")
    if any(each.in_use for each in freed):
        say("what is in use was left: byre image prune removes it later")
