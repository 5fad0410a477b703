"""Keeps the layers' images in the user's cache, so that a layer is converted once and shared by every VM.

Rule: a file under its final name is whole (written aside, synced, renamed) and never changes.  Its name is what
determines its contents:

    v1/images/KEY.squashfs   KEY: hash of the layer's plan (`layers.plan_key`)
    v1/lists/DIFF_ID         the layer's entries
    v1/chains/CHAIN          the KEY of a stack's topmost layer; CHAIN: hash of the stack's diff_ids
    v1/locks/DIFF_ID         held while a layer of this diff_id is worked on: one works, the others wait for it

The locks end with their holder (`files`), so a kill -9 leaves nothing to clean up but a file in v1/new, which
the next worker on that layer replaces.  An image that is in use is leased; `eviction` removes only others.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import msgpack

from byre.errors import StorageFailed
from byre.oci import files, layers
from byre.oci.image import ContainerImage, LayerSource
from byre.oci.tarstream import Entry
from byre.oci.tree import Item, Tree

#: Attempts to take a lease on layers that another process keeps removing.
_LEASE_ATTEMPTS = 5

_log = logging.getLogger(__name__)


class LayerImage(NamedTuple):
    """A read-only squashfs image on the host.  `key` names its contents, `size` is in bytes."""

    path: Path
    key: str
    size: int


class LayerProgress(NamedTuple):
    """`done` of `total` bytes were read of layer `number` (from 1) of `layers`; a layer is read two or three
    times."""

    number: int
    layers: int
    done: int
    total: int


Progress = Callable[[LayerProgress], None]


def default_root() -> Path:
    """``$XDG_CACHE_HOME/byre/layers``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "byre" / "layers"


def chains(diff_ids: Sequence[str]) -> list[str]:
    """The names of a stack's chains: one for each layer with all those below it."""
    names = [""]
    for diff_id in diff_ids:
        names.append(hashlib.sha256(f"{names[-1]} {diff_id}".encode()).hexdigest())
    return names[1:]


class LayerStore:
    """Safe for several threads and processes at once."""

    def __init__(self, root: Path | None = None) -> None:
        self._root = (root or default_root()) / f"v{layers.VERSION}"

    def prepare(self, image: ContainerImage, progress: Progress | None = None) -> list[LayerImage]:
        """The image's layers for an overlay, lowest first; layers that change nothing are left out.

        Blocks for as long as the conversion takes: call it in a thread.  `progress` is called all along,
        and what it raises ends the work and leaves nothing half-made.  Raises ImageInvalid, ToolMissing,
        StorageFailed, MachineFailed.
        """
        try:
            for name in ("images", "lists", "chains", "locks", "new"):
                (self._root / name).mkdir(mode=0o700, parents=True, exist_ok=True)
            return _Preparation(self._root, image, progress).run()
        except OSError as error:
            if isinstance(error, StorageFailed) or not error.errno:
                raise
            raise StorageFailed(
                f"the cache of layers at {self._root} cannot be used: {error}",
                hint="make room or set XDG_CACHE_HOME to another directory",
            ) from error

    def lease(
        self, image: ContainerImage, progress: Progress | None = None
    ) -> tuple[list[LayerImage], files.Lease]:
        """As `prepare`; until the lease is closed nobody prunes these images."""
        for _ in range(_LEASE_ATTEMPTS):
            found, lease = self.prepare(image, progress), files.Lease()
            if all(lease.add(layer.path) for layer in found):
                return found, lease
            lease.close()  # some were pruned between the two steps
        raise StorageFailed(f"the cache of layers at {self._root} is being emptied again and again")


class _Preparation:
    """One call of `prepare`.  The tree of the layers is built only when the first one is not in the cache."""

    def __init__(self, root: Path, image: ContainerImage, progress: Progress | None) -> None:
        self._root = root
        self._layers = image.layers
        self._diff_ids = [layer.diff_id for layer in image.layers]
        self._progress = progress
        self._tree = Tree()
        self._lists: list[list[Entry]] = []  # those of the layers that the tree has
        self._found: list[LayerImage | None] = []
        self._started = 0  # bytes done of the layer at work

    def run(self) -> list[LayerImage]:
        for number, chain in enumerate(chains(self._diff_ids)):
            if not self._cached(chain):
                with self._lock(number):
                    if not self._cached(chain):  # another worker may have made it meanwhile
                        self._make(number, chain)
        return [found for found in self._found if found is not None]

    # -- the cache -----------------------------------------------------------------------------------------

    def _cached(self, chain: str) -> bool:
        """Take the topmost layer of this stack from the cache; an empty key is a layer that changes
        nothing."""
        try:
            key = (self._root / "chains" / chain).read_text()
        except FileNotFoundError:
            return False
        found = self._image(key) if key else None
        if found is None and key:
            return False
        self._found.append(found)
        return True

    def _image(self, key: str) -> LayerImage | None:
        path = self._root / "images" / f"{key}.squashfs"
        with contextlib.suppress(OSError):  # a cache that somebody else keeps for us
            os.utime(path)  # when it was used last, for `eviction`
        try:
            return LayerImage(path, key, path.stat().st_size)
        except FileNotFoundError:
            return None

    def _keep(self, name: str, data: bytes) -> None:
        files.write(self._new(name.replace("/", "-")), data, self._root / name)

    def _new(self, name: str) -> Path:
        """A name for a file that is being made; what a killed worker left there goes.  The caller has the
        lock."""
        path = self._root / "new" / name
        path.unlink(missing_ok=True)
        return path

    def _lock(self, number: int) -> contextlib.AbstractContextManager[None]:
        # Reporting lets the caller cancel.
        return files.locked(self._root / "locks" / _file(self._diff_ids[number]), lambda: self._report(number, 0))

    def _report(self, number: int, count: int) -> None:
        self._started += count
        if self._progress is not None:
            layer = self._layers[number]
            self._progress(LayerProgress(number + 1, len(self._layers), self._started, layer.size))

    # -- the work ------------------------------------------------------------------------------------------

    def _make(self, number: int, chain: str) -> None:
        """Convert the layer, unless its image exists for another stack; the caller has its lock."""
        self._started = 0
        while len(self._lists) < number:
            self._apply(len(self._lists))
        before = next(self._tree.items())
        self._apply(number)
        plan = list(self._tree.items())
        if number and plan == [before]:
            self._found.append(None)
            self._keep(f"chains/{chain}", b"")
            return
        found = self._convert(number, plan)
        self._found.append(found)
        self._keep(f"chains/{chain}", found.key.encode())

    def _apply(self, number: int) -> None:
        layer = self._layers[number]
        listed = self._load_list(layer)
        if listed is None:
            listed = layers.scan(layer, lambda count: self._report(number, count))
            self._keep_list(layer, listed)
        self._tree.apply(listed)
        self._lists.append(listed)
        if self._tree.dropped:
            _log.warning("layer %d has extended attributes that its image cannot hold: %s",
                         number + 1, ascii(sorted(self._tree.dropped)[:9]))  # fmt: skip

    def _convert(self, number: int, plan: Sequence[Item]) -> LayerImage:
        taken = {image.key for image in self._found if image}
        copy = 0
        while (key := layers.plan_key(plan, self._diff_ids, copy)) in taken:
            copy += 1
        # Layers of different diff_ids give one image where none of its data is theirs: so a lock for the key too.
        with files.locked(self._root / "locks" / key, lambda: self._report(number, 0)):
            return self._image(key) or self._made(number, plan, key)

    def _made(self, number: int, plan: Sequence[Item], key: str) -> LayerImage:
        new = self._new(f"{key}.squashfs")
        final = self._root / "images" / new.name
        try:
            layers.convert(plan, self._layers, self._lists, new, lambda count: self._report(number, count))
            size = new.stat().st_size
            files.publish(new, final)
        finally:
            new.unlink(missing_ok=True)
        return LayerImage(final, key, size)

    # -- lists of entries ----------------------------------------------------------------------------------

    def _load_list(self, layer: LayerSource) -> list[Entry] | None:
        try:
            data = zlib.decompress((self._root / "lists" / _file(layer.diff_id)).read_bytes())
        except FileNotFoundError:
            return None
        rows = msgpack.unpackb(data, use_list=False, unicode_errors="surrogateescape")
        return [Entry(*row) for row in rows]

    def _keep_list(self, layer: LayerSource, listed: Sequence[Entry]) -> None:
        packed = msgpack.packb(listed, use_bin_type=True, unicode_errors="surrogateescape")
        self._keep(f"lists/{_file(layer.diff_id)}", zlib.compress(cast(bytes, packed), 1))


def _file(diff_id: str) -> str:
    return diff_id.replace(":", "-")
