"""The images that were pulled or imported: names for manifests, and blobs under their digests.

    $XDG_DATA_HOME/byre/images/v1/
        names/HASH           one name: `Image` as JSON; HASH: of the name
        blobs/sha256/HEX     manifests, configurations and layers, as the registry has them
        locks/HASH           held while this name is pulled
        lock                 shared by all who add or read blobs, alone by who removes them
        new/HASH/            what is under way for this name

Rule: a file under its final name is whole and never changes (`files`), and a blob is removed only when no name
leads to it and nobody holds the lock.  Contents are not trusted for all that: documents are checked against their
digests whenever they are read, layers when they are converted.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from byre.errors import ByreError, ImageInvalid, ImageNotFound, StorageFailed
from byre.oci import blobs, files, reference
from byre.oci.image import MAX_DOCUMENT, ContainerImage, check_digest, get
from byre.oci.layout import from_manifest
from byre.oci.tarstream import show

#: So many hex digits of an image's digest may stand for its name; `byre image ls` shows as many.
SHORT_DIGEST = 12

_VERSION = "v1"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"


@dataclass(frozen=True)
class Image:
    """An image under one of its names.

    name     in full, as ``docker.io/library/debian:latest``
    digest   of its manifest, for the guest's platform
    size     of that manifest, in bytes
    source   digest of what the name led to: this manifest, or an index that has it; "" for an imported archive
    indexes  digests of the indexes on the way
    pulled   when, in seconds since the epoch
    stored   bytes of its layers, as they are stored
    """

    name: str
    digest: str
    size: int
    source: str
    indexes: tuple[str, ...]
    pulled: float
    stored: int

    @property
    def descriptor(self) -> dict[str, Any]:
        return {"mediaType": _MANIFEST, "digest": self.digest, "size": self.size}


class Freed(NamedTuple):
    """`files` were removed, which had so many bytes of the disk; `in_use`: some were left, for they are at work."""

    files: int
    size: int
    in_use: bool

    def plus(self, other: Freed) -> Freed:
        return Freed(self.files + other.files, self.size + other.size, self.in_use or other.in_use)


def default_root() -> Path:
    """``$XDG_DATA_HOME/byre/images``: an imported image may exist nowhere else, so it is no cache."""
    base = os.environ.get("XDG_DATA_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".local/share") / "byre" / "images"


class ImageStore:
    """Safe for several threads and processes at once.  What the disk refuses raises StorageFailed."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = (root or default_root()) / _VERSION
        self.blobs = self.root / "blobs"

    # -- looking -------------------------------------------------------------------------------------------

    def images(self) -> list[Image]:
        """All images, by name."""
        found = [self._load(path) for path in self._paths("names")]
        return sorted((image for image in found if image is not None), key=lambda image: image.name)

    def find(self, text: str) -> Image | None:
        """The image of this name, short or full, or of these first SHORT_DIGEST or more digits of its digest."""
        digits = text.removeprefix("sha256:")
        if re.fullmatch(rf"[0-9a-f]{{{SHORT_DIGEST},64}}", digits):
            fitting = [image for image in self.images() if image.digest.startswith(f"sha256:{digits}")]
            if len({image.digest for image in fitting}) == 1:
                return fitting[0]
            if digits != text or len(digits) == 64:
                return None
        return self._load(self.root / "names" / _hash(reference.parse(text).name))

    def get(self, text: str) -> Image:
        """As `find`; raises ImageNotFound."""
        image = self.find(text)
        if image is None:
            raise ImageNotFound(
                f"there is no image {show(text)} here", hint=f"fetch it: byre image pull {text}", reference=text
            )
        return image

    @contextmanager
    def open(self, image: Image, waiting: Callable[[], object] = lambda: None) -> Iterator[ContainerImage]:
        """The image to be read; its blobs stay for as long.  Raises ImageInvalid when one is damaged or missing."""
        with self.working(waiting):
            try:
                yield from_manifest(blobs.Directory(self.root), image.name, image.descriptor)
            except ImageInvalid as error:
                error.hint = error.hint and f"fetch it again, which repairs it: byre image pull {image.name}"
                raise

    # -- adding --------------------------------------------------------------------------------------------

    @contextmanager
    def working(self, waiting: Callable[[], object]) -> Iterator[None]:
        """Nobody removes blobs meanwhile."""
        with self._disk():
            for name in ("names", "blobs/sha256", "blobs/sha512", "locks", "new"):
                (self.root / name).mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = files.locked(self.root / "lock", waiting, shared=True)
        with lock:
            yield

    @contextmanager
    def adding(self, name: str, waiting: Callable[[], object]) -> Iterator[Path]:
        """One process at a time works on a name; gives it an empty directory, which goes at the end."""
        with self._disk(), self.working(waiting), files.locked(self.root / "locks" / _hash(name), waiting):
            scratch = self.root / "new" / _hash(name)
            _remove(scratch)  # of somebody who was killed: we have the lock
            scratch.mkdir(mode=0o700)
            try:
                yield scratch
            finally:
                _remove(scratch)

    def blob(self, digest: str) -> Path:
        """Where the blob is or would be."""
        algorithm, _, encoded = check_digest(digest, "a blob").partition(":")
        return self.blobs / algorithm / encoded

    def put(self, scratch: Path, data: bytes) -> str:
        """Keep a document; its digest."""
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        files.write(scratch / "document", data, self.blob(digest))
        return digest

    def name(self, scratch: Path, image: Image) -> None:
        """Give the image, all of whose blobs are there, its name."""
        files.write(scratch / "name", json.dumps(asdict(image)).encode(), self.root / "names" / _hash(image.name))

    # -- removing ------------------------------------------------------------------------------------------

    def untag(self, image: Image) -> None:
        """Forget the name.  The blobs stay until `collect`."""
        (self.root / "names" / _hash(image.name)).unlink(missing_ok=True)

    def collect(self) -> Freed:
        """Remove the blobs to which no name leads, unless an image is being added or read at this moment."""
        if not self.root.is_dir():
            return Freed(0, 0, False)
        with files.locked_now(self.root / "lock") as alone:
            if not alone:
                return Freed(0, 0, True)
            used = {self.blob(digest) for image in self.images() for digest in self.digests(image)}
            count = size = 0
            for path in (*self._paths("blobs/sha256"), *self._paths("blobs/sha512"), *self._paths("new")):
                if path not in used:
                    count, size = count + 1, size + _remove(path)
            return Freed(count, size, False)

    def digests(self, image: Image) -> set[str]:
        """Of all blobs that the image is made of, as far as its manifest can be read."""
        found = {image.digest, *image.indexes}
        try:
            with open(self.blob(image.digest), "rb") as file:
                manifest = json.loads(file.read(MAX_DOCUMENT))
            described = [get(manifest, "config", dict, ""), *get(manifest, "layers", list, "")]
            return found | {check_digest(get(d, "digest", str, ""), "") for d in described}
        except (OSError, ValueError):  # damaged: what it led to cannot be used
            return found

    # -- files ---------------------------------------------------------------------------------------------

    def _paths(self, folder: str) -> list[Path]:
        try:
            return list((self.root / folder).iterdir())
        except FileNotFoundError:
            return []

    def _load(self, path: Path) -> Image | None:
        try:
            with self._disk():
                fields = json.loads(path.read_bytes())
            image = Image(**{**fields, "indexes": tuple(fields["indexes"])})
            check_digest(image.digest, "an image")
            return image
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            raise StorageFailed(f"{path} is damaged: {error}", hint="remove this file") from error

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """What the disk refuses here is StorageFailed, but for a file that is not there."""
        try:
            yield
        except OSError as error:
            if not error.errno or isinstance(error, (ByreError, FileNotFoundError)):
                raise
            raise StorageFailed(
                f"the images at {self.root} cannot be used: {error}",
                hint="make room: byre image prune; or set XDG_DATA_HOME to another directory",
            ) from error


def now() -> float:
    """The time that `Image.pulled` has."""
    return time.time()


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _remove(path: Path) -> int:
    """Remove the file or directory; the bytes that it had on the disk."""
    try:
        size = path.lstat().st_blocks * 512
        if path.is_dir() and not path.is_symlink():
            size += sum(inside.lstat().st_blocks * 512 for inside in path.rglob("*"))
            shutil.rmtree(path)
        else:
            path.unlink()
    except FileNotFoundError:
        return 0
    return size
