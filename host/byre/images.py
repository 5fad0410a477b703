"""Containers' images: what `byre image` does, from Python.

    image = await byre.images.pull("debian:12")
    byre.images.remove("debian:12")

Rule: what may take long is a coroutine, which can be cancelled and leaves nothing half-made; `byre.sync` has it
without `async`.  The work is `byre.oci`'s.  `create_container` pulls by itself: this is for what is to be there
before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from .errors import ImageInvalid
from .machines.spawn import stoppable
from .oci import eviction, reference
from .oci import pull as oci_pull
from .oci.images import Freed, Image, ImageStore
from .oci.layout import parse_json
from .oci.pull import PullProgress
from .oci.registry import Registry

__all__ = [
    "Freed",
    "Image",
    "PullProgress",
    "Registry",
    "import_image",
    "inspect",
    "list_images",
    "prune",
    "pull",
    "remove",
]

#: Layers that were not used for so many seconds are converted again when they are needed.
UNUSED_FOR = 30 * 86400.0

Progress = Callable[[PullProgress], object]


async def pull(name: str, *, registry: Registry | None = None, progress: Progress | None = None) -> Image:
    """Fetch what has changed of the image ``[REGISTRY[:PORT]/]NAME[:TAG][@DIGEST]``.

    `progress` is called several times a second, in another thread.  Raises InvalidRequest (no such name),
    ToolMissing, RegistryUnreachable, RegistryRefused, RegistryFailed, ImageNotFound, ImageInvalid, StorageFailed.
    """
    return await _stoppable(lambda tell: oci_pull.pull(ImageStore(), name, registry, tell), progress)


async def import_image(source: str, name: str = "", *, progress: Progress | None = None) -> Image:
    """Copy the image in an OCI or docker archive or layout into the store, under `name` or its own.

    `source` is ``PATH[:TAG]``, with ``oci:`` or the like before it or not.  Raises InvalidRequest without any name,
    ImageNotFound, ImageInvalid, StorageFailed.
    """
    return await _stoppable(lambda tell: oci_pull.take_in(ImageStore(), source, name, tell), progress)


async def _stoppable(work: Callable[[Progress], Image], progress: Progress | None) -> Image:
    def run(check: Callable[[], None]) -> Image:
        def tell(step: PullProgress) -> None:
            check()
            if progress is not None:
                progress(step)

        return work(tell)

    return await stoppable(run)


def list_images() -> list[Image]:
    """Those that were pulled or imported, by name."""
    return ImageStore().images()


def inspect(name: str) -> dict[str, Any]:
    """What the image of a name, or of the first digits of a digest, is: plain values, as JSON has them.

    Config is the image's own; sizes in bytes.  Raises ImageNotFound, ImageInvalid.
    """
    store = ImageStore()
    found = store.get(name)
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


def remove(*names: str) -> tuple[list[str], Freed]:
    """Forget names (all those of an image that is given by its digest), and remove what only they led to.

    The names in full, and what became free.  Raises ImageNotFound, before anything is removed.
    """
    store = ImageStore()
    found = {each.name: each for name in names for each in _named(store, name)}
    gone = [_stack(store, each) for each in found.values()]
    for each in found.values():
        store.untag(each)
    layers = eviction.forget(gone, [_stack(store, each) for each in store.images()])
    return list(found), layers.plus(store.collect())


def prune(*, unused_for: float = UNUSED_FOR, keep_bytes: int | None = None) -> Freed:
    """Remove what no image's name leads to, and converted layers: those that nobody used for so many seconds, then
    the oldest until `keep_bytes` are left.  What is in use stays."""
    return eviction.evict(unused_for=unused_for, keep_bytes=keep_bytes).plus(ImageStore().collect())


def _named(store: ImageStore, text: str) -> list[Image]:
    found = store.get(text)
    if text.startswith("sha256:") or found.name != reference.parse(text).name:
        return [each for each in store.images() if each.digest == found.digest]
    return [found]


def _stack(store: ImageStore, image: Image) -> Sequence[str]:
    """Its layers' diff_ids; none of an image that is damaged."""
    try:
        with store.open(image) as opened:
            return opened.config.diff_ids
    except ImageInvalid:
        return ()
