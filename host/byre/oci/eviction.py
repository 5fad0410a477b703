"""Makes room in the cache of layers: by age, by size, and for images that are no more.

Rule: only what can be made again is removed, and nothing that is leased (`files.Lease`): by whoever has just
prepared it, and by a machine for as long as it is attached.  When an image was used last is its file's mtime.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from byre.oci import files, layers
from byre.oci.images import Freed
from byre.oci.store import chains, default_root


def usage(root: Path | None = None) -> tuple[int, int]:
    """How many layers are in the cache, and how many bytes of the disk they take."""
    found = _aged(_top(root), "images")
    return len(found), sum(size for _, size, _ in found)


def evict(*, unused_for: float = 0.0, keep_bytes: int | None = None, root: Path | None = None) -> Freed:
    """Remove the images of layers that nobody used for so many seconds; then those used longest ago, until the
    rest take at most `keep_bytes`; then what led to them."""
    top = _top(root)
    aged = _aged(top, "images")
    total = sum(size for _, size, _ in aged)
    oldest, freed = time.time() - unused_for, Freed(0, 0, False)
    for used, _, path in aged:
        if used <= oldest or (keep_bytes is not None and total > keep_bytes):
            gone = _remove([path])
            total -= gone.size
            freed = freed.plus(gone)
    lists = [path for used, _, path in _aged(top, "lists") if used <= oldest]
    return freed.plus(_remove([*lists, *_dangling(top)]))


def forget(gone: Iterable[Sequence[str]], kept: Iterable[Sequence[str]], root: Path | None = None) -> Freed:
    """Remove the layers that only the stacks `gone` have, each given by its diff_ids, and no stack of `kept`."""
    top = _top(root)
    held = {chain for stack in kept for chain in chains(stack)}
    keys = {key for chain in held if (key := _key(top, chain))}
    unused = {chain for stack in gone for chain in chains(stack)} - held
    unused_keys = {key for chain in unused if (key := _key(top, chain))} - keys
    freed = _remove(top / "images" / f"{key}.squashfs" for key in sorted(unused_keys))
    return freed.plus(_remove(_dangling(top)))


def _top(root: Path | None) -> Path:
    return (root or default_root()) / f"v{layers.VERSION}"


def _key(top: Path, chain: str) -> str:
    try:
        return (top / "chains" / chain).read_text()
    except FileNotFoundError:
        return ""


def _dangling(top: Path) -> list[Path]:
    """Chains that lead to an image that is not there."""
    there = {path.stem for path in _paths(top, "images")}
    return [path for path in _paths(top, "chains") if (key := _key(top, path.name)) and key not in there]


def _aged(top: Path, folder: str) -> list[tuple[float, int, Path]]:
    """Last use, bytes on the disk and path of each file, the one used longest ago first."""
    found = []
    for path in _paths(top, folder):
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            found.append((status.st_mtime, status.st_blocks * 512, path))
    return sorted(found)


def _paths(top: Path, folder: str) -> list[Path]:
    try:
        return list((top / folder).iterdir())
    except FileNotFoundError:
        return []


def _remove(paths: Iterable[Path]) -> Freed:
    sizes = [files.remove_unless_leased(path) for path in paths]
    freed = [size for size in sizes if size is not None]
    return Freed(len(freed), sum(freed), len(freed) < len(sizes))
