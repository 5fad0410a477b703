"""Images as one file, for hosts that cannot build them: a gzipped tar of the manifest and the files it names.

What is imported is not trusted: only the known names are read, never past the sizes that the manifest gives, and
nothing becomes an image before every digest is right.
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zlib
from pathlib import Path
from typing import Any

from .builder import agent_sources, digests
from .cache import FILES, FORMAT, MANIFEST, Cache, Image, digest_of, key_of, pins_of, verify
from .errors import ImageCorrupt

#: Sizes beyond which no real image comes, in bytes: a bomb is refused before it fills the disk.
MAX_MANIFEST = 4 << 20
MAX_FILE = 1 << 30

#: A higher level takes many times longer for a few per cent.
COMPRESSION_LEVEL = 6


def export(image: Image, file: Path) -> None:
    """Write `image` to `file`; the same image gives the same bytes.  The image is verified first."""
    verify(image)
    partial = file.with_name(file.name + ".partial")
    try:
        with (
            partial.open("wb") as raw,
            gzip.GzipFile("", "wb", COMPRESSION_LEVEL, raw, mtime=0) as stream,
            tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as archive,
        ):
            for name in (MANIFEST, *FILES):
                member = tarfile.TarInfo(name)
                member.size = (image.directory / name).stat().st_size
                with (image.directory / name).open("rb") as data:
                    archive.addfile(member, data)
        partial.rename(file)
    finally:
        partial.unlink(missing_ok=True)


def import_image(file: Path, *, cache: Path | None = None) -> Image:
    """Take in what `export` wrote; `ImageCorrupt` when it is anything else.

    `ensure` uses it from now on, if it was made from the sources of this byre.
    """
    store = Cache(cache)
    with store.locked(lambda line: None):
        try:
            with tarfile.open(file, mode="r:gz") as archive:
                manifest, text = _read_manifest(archive, file)
                final = store.built / key_of(manifest)
                image = store.find(final.name)
                if image is None:
                    with store.new(final) as directory:
                        (directory / MANIFEST).write_bytes(text)
                        for name in FILES:
                            _extract(archive, name, manifest["files"][name], directory / name)
                    image = store.find(final.name)
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ImageCorrupt(f"{file} is no exported image: {error}", hint="export it again") from error
        assert image is not None
        if image.manifest["sources"] == digests(agent_sources()):
            store.save_pins(pins_of(image.manifest))
        return image


def _read_manifest(archive: tarfile.TarFile, file: Path) -> tuple[dict[str, Any], bytes]:
    text = _member(archive, MANIFEST, MAX_MANIFEST).read()
    try:
        manifest = json.loads(text)
        if manifest["format"] != FORMAT:
            raise ImageCorrupt(
                f"{file} has image format {manifest['format']}, this byre reads {FORMAT}",
                hint="export it by the byre version that imports it",
            )
        key_of(manifest)
        for name in FILES:
            sizes = manifest["files"][name]["size"], manifest["files"][name]["sha256"]
            if not (isinstance(sizes[0], int) and isinstance(sizes[1], str)):
                raise TypeError(f"the entry of {name}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, ImageCorrupt):
            raise
        raise ImageCorrupt(f"{file} has a broken manifest: {error}", hint="export it again") from error
    return manifest, text


def _member(archive: tarfile.TarFile, name: str, limit: int) -> io.BufferedIOBase:
    try:
        member = archive.getmember(name)
    except KeyError:
        raise ImageCorrupt(f"the archive has no {name}", hint="export it again") from None
    if not member.isreg() or member.size > limit:
        raise ImageCorrupt(f"{name} in the archive is no file, or larger than {limit} bytes")
    stream = archive.extractfile(member)
    assert stream is not None
    return stream  # type: ignore[return-value]  # (typeshed says IO[bytes]; it is a BufferedReader)


def _extract(archive: tarfile.TarFile, name: str, expected: dict[str, Any], target: Path) -> None:
    stream = _member(archive, name, MAX_FILE)
    with target.open("wb") as out:
        while block := stream.read(1 << 20):
            out.write(block)
    found = digest_of(target)
    if found != expected:
        raise ImageCorrupt(f"{name} in the archive is not what its manifest says: {found}", hint="export it again")
