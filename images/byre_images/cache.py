"""Where images live, and what an image is: a directory whose files are what its manifest says.

A directory in the cache is named by the key of what it was made from (packages and sources), so that finding the
right image takes no build.  It is written under another name, flushed, and renamed: it is whole or not there.
Layout: `built/KEY/` images, `base/KEY/` what many images share, `apt/` package files, `pins.json`, `lock`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import ImageCorrupt
from .packages import Pin, load_pins, save_pins

#: Changes when an older byre could not use a newer image.
FORMAT = 1
MANIFEST = "manifest.json"
KERNEL, INITRAMFS, ROOT = "vmlinux", "initramfs.cpio", "root.squashfs"
FILES = (KERNEL, INITRAMFS, ROOT)

#: Images kept besides those used during the last day: each change of the agent makes one, of some 50 MB.
KEEP_IMAGES = 4
KEEP_SECONDS = 86400
#: Bases kept: today's, and the one before it, should somebody go back.
KEEP_BASES = 2

TEMPORARY_PREFIX = ".new-"


@dataclass(frozen=True)
class Image:
    """A bootable guest.

    `kernel`: an uncompressed ELF file that boots by PVH; `initramfs`: a cpio archive; `root`: a read-only squashfs,
    to be /dev/vda.  `manifest` says what they are made from; `digest` ("sha256:...", of the manifest) is the
    image's identity, since the manifest has the digests of the files.
    """

    directory: Path
    kernel: Path
    initramfs: Path
    root: Path
    manifest: dict[str, Any] = field(hash=False)
    digest: str


def load(directory: Path) -> Image:
    """The image in a directory, its manifest read and its files' sizes checked; `verify` checks their digests."""
    try:
        text = (directory / MANIFEST).read_bytes()
        manifest = json.loads(text)
        if manifest["format"] != FORMAT:
            raise ImageCorrupt(f"{directory} has format {manifest['format']}, this byre reads {FORMAT}")
        for name in FILES:
            if (directory / name).stat().st_size != manifest["files"][name]["size"]:
                raise ImageCorrupt(f"{directory / name} has the wrong size", hint=f"remove {directory}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ImageCorrupt):
            raise
        raise ImageCorrupt(f"{directory} holds no image: {error}", hint=f"remove {directory}") from error
    return Image(
        directory,
        directory / KERNEL,
        directory / INITRAMFS,
        directory / ROOT,
        manifest,
        "sha256:" + hashlib.sha256(text).hexdigest(),
    )


def list_images(*, cache: Path | None = None) -> list[Image]:
    """All images in the cache, the last used first."""
    return Cache(cache).images()


def verify(image: Image) -> None:
    """Compare every file with the manifest, and the manifest with the digest and key; `ImageCorrupt` tells."""
    now = load(image.directory)
    if now.digest != image.digest:
        raise ImageCorrupt(f"the manifest of {image.directory} has changed", hint="build the image again")
    if key_of(now.manifest) != image.directory.name:
        raise ImageCorrupt(f"{image.directory} is not the image that its name says", hint="build the image again")
    for name in FILES:
        found = digest_of(image.directory / name)["sha256"]
        if found != now.manifest["files"][name]["sha256"]:
            raise ImageCorrupt(
                f"{image.directory / name} has sha256 {found}", hint=f"remove {image.directory} and build again"
            )


def digest_of(path: Path) -> dict[str, Any]:
    """`{"sha256": hex, "size": bytes}` of a file."""
    with path.open("rb") as stream:
        return {"sha256": hashlib.file_digest(stream, "sha256").hexdigest(), "size": path.stat().st_size}


def pins_of(manifest: dict[str, Any]) -> list[Pin]:
    """The packages that a manifest lists, as pins."""
    fields = ("name", "version", "architecture", "sha256", "size")
    return sorted(Pin(*(package[field] for field in fields)) for package in manifest["packages"])


def key(sources: dict[str, str], pins: list[Pin]) -> str:
    """Directory name of the image made from these; short enough for a path, long enough never to collide."""
    text = json.dumps([FORMAT, sources], sort_keys=True) + save_pins(pins)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def key_of(manifest: dict[str, Any]) -> str:
    """The key that an image's own manifest gives."""
    return key(manifest["sources"], pins_of(manifest))


class Cache:
    """The cache's directory: its parts, its lock, and how something gets into it."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = (root or default_root()).absolute()
        self.built = self.root / "built"
        self.base = self.root / "base"
        self.apt = self.root / "apt"
        self.pins_file = self.root / "pins.json"

    @contextmanager
    def locked(self, say: Callable[[str], None]) -> Iterator[None]:
        """Hold the cache alone.  The wait ends when its holder finishes or dies, whichever way."""
        for directory in (self.built, self.base):
            directory.mkdir(parents=True, exist_ok=True, mode=0o755)
        with open(self.root / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("waiting for another builder")
                fcntl.flock(lock, fcntl.LOCK_EX)
            for leftover in (*self.built.glob(TEMPORARY_PREFIX + "*"), *self.base.glob(TEMPORARY_PREFIX + "*")):
                shutil.rmtree(leftover)  # of a builder that was killed: we hold the lock
            yield

    @contextmanager
    def new(self, final: Path) -> Iterator[Path]:
        """A directory to fill; it becomes `final` at the end of the block, whole and on the disk."""
        directory = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=final.parent))
        try:
            yield directory
            directory.chmod(0o755)
            for path in directory.iterdir():
                path.chmod(0o444)
                _flush(path)
            _flush(directory)
            directory.rename(final)
            _flush(final.parent)
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def pins(self) -> list[Pin] | None:
        """The packages of the last look-up, None when there was none (or it cannot be read)."""
        try:
            return load_pins(self.pins_file.read_text())
        except (OSError, ValueError, TypeError):
            return None

    def save_pins(self, pins: list[Pin]) -> None:
        """Make these the packages that `ensure` builds from."""
        fresh = self.pins_file.with_suffix(".new")
        fresh.write_text(save_pins(pins))
        _flush(fresh)
        fresh.rename(self.pins_file)

    def find(self, name: str) -> Image | None:
        """The image with this key, marked as used now."""
        directory = self.built / name
        if not directory.is_dir():
            return None
        image = load(directory)
        os.utime(directory)
        return image

    def images(self) -> list[Image]:
        """All images, the last used first; what is no image is left out."""
        found = []
        for directory in self.built.glob("[!.]*"):
            try:
                found.append((directory.stat().st_mtime, load(directory)))
            except (ImageCorrupt, FileNotFoundError):
                continue
        return [image for _, image in sorted(found, key=lambda item: (-item[0], item[1].digest))]

    def prune(self) -> None:
        """Remove what was not used for a while.  A running VM keeps the files that it has open."""
        oldest = time.time() - KEEP_SECONDS
        for image in self.images()[KEEP_IMAGES:]:
            if image.directory.stat().st_mtime < oldest:
                shutil.rmtree(image.directory)
        bases = sorted(self.base.iterdir(), key=lambda directory: directory.stat().st_mtime, reverse=True)
        for directory in bases[KEEP_BASES:]:
            shutil.rmtree(directory)


def default_root() -> Path:
    """`$XDG_CACHE_HOME/byre/images`; a relative value of the variable is ignored, as its specification says."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    home = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return home / "byre" / "images"


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
