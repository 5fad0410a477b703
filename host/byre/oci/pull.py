"""Brings images into the store: from registries (`pull`), from archives and layouts (`take_in`).

    what the name leads to -> the guest's platform out of an index -> configuration -> layers -> the name

Rule: documents are checked against their digests here before anything is done with them, and the name is given
last, when everything it leads to is there.  A pull that ends early leaves whole blobs that the next one takes, and
nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from byre.errors import ImageInvalid, ImageNotFound, InvalidRequest, RegistryUnreachable, StorageFailed
from byre.oci import blobs, files, reference
from byre.oci.compression import CHUNK, DigestReader
from byre.oci.image import MAX_DOCUMENT, ContainerImage, LayerSource, check_digest, get
from byre.oci.images import Image, ImageStore, now
from byre.oci.layout import MAX_INDEX_DEPTH, check_config, for_platform, from_manifest, open_image, parse_json
from byre.oci.reference import Reference
from byre.oci.registry import Registry, Tick
from byre.oci.tarstream import MAX_BYTES

#: When to fetch an image: "missing" ones only, "always" (what has changed since), or "never".
PULL_POLICIES = ("missing", "always", "never")

#: A connection that breaks while layers are fetched is made again until there were so many; what came whole stays.
ATTEMPTS = 3

_OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"


class PullProgress(NamedTuple):
    """`done` of `total` bytes of the image's layers are here; before that is known both are 0."""

    name: str
    done: int
    total: int
    layers: int


Progress = Callable[[PullProgress], object]


def pull(
    store: ImageStore, name: str, registry: Registry | None = None, progress: Progress = lambda _: None
) -> Image:
    """Fetch what has changed of an image, and give it its name.  A second pull of it meanwhile takes the first's.

    Blocks: call it in a thread.  `progress` is called several times a second in that thread, and what it raises
    ends the pull.  Raises InvalidRequest (no such name), ToolMissing, RegistryUnreachable, RegistryRefused,
    RegistryFailed, ImageNotFound, ImageInvalid, StorageFailed.
    """
    wanted = reference.parse(name)
    start, waited = now(), False

    def waiting() -> None:
        nonlocal waited
        waited = True
        progress(PullProgress(wanted.name, 0, 0, 0))

    with store.adding(wanted.name, waiting) as scratch:
        if waited and (found := store.find(wanted.name)) and found.pulled >= start:
            return found
        return _Pull(store, scratch, wanted, registry or Registry(), progress).run()


class _Pull:
    def __init__(
        self, store: ImageStore, scratch: Path, wanted: Reference, registry: Registry, progress: Progress
    ) -> None:
        self._store = store
        self._scratch = scratch
        self._wanted = wanted
        self._registry = registry
        self._progress = progress

    def run(self) -> Image:
        raw, indexes = self._manifest()
        digest = self._store.put(self._scratch, raw)
        layers = self._documents(parse_json(raw, "the manifest"), digest)
        self._layers(layers, digest)
        image = Image(
            name=self._wanted.name,
            digest=digest,
            size=len(raw),
            source=indexes[0] if indexes else digest,
            indexes=tuple(indexes),
            pulled=now(),
            stored=sum(layers.values()),
        )
        from_manifest(blobs.Directory(self._store.root), image.name, image.descriptor)  # all is there
        self._store.name(self._scratch, image)
        return image

    def _manifest(self) -> tuple[bytes, list[str]]:
        """The manifest for the guest, and the digests of the indexes that led to it."""
        raw, indexes = self._fetch(self._registry.manifest, self._wanted.digest, ""), list[str]()
        for _ in range(MAX_INDEX_DEPTH):
            document = parse_json(raw, "the manifest")
            if not _is_index(document):
                return raw, indexes
            indexes.append(self._store.put(self._scratch, raw))
            digest = for_platform(document, self._wanted.name)["digest"]
            raw = self._fetch(self._registry.manifest, digest, digest)
        raise ImageInvalid(f"the image's indexes are nested deeper than {MAX_INDEX_DEPTH}")

    def _fetch(self, get: Callable[[Reference, str, Tick], bytes], expected: str, by: str) -> bytes:
        """A document, which has the `expected` digest, if there is one."""
        self._tell(0, {})
        data = get(self._wanted, by, lambda: self._tell(0, {}))
        if expected:
            algorithm = check_digest(expected, "the image").partition(":")[0]
            if (found := f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}") != expected:
                raise ImageInvalid(
                    f"{self._wanted.registry} sent {found} as {expected} of {self._wanted.name}",
                    hint="the registry or a proxy on the way is broken",
                )
        return data

    def _documents(self, manifest: Any, digest: str) -> dict[str, int]:
        """Have the configuration; the layers' digests and sizes."""
        described = get(manifest, "layers", list, "the manifest")
        layers = {
            check_digest(get(d, "digest", str, "a layer"), "a layer"): get(d, "size", int, "a layer")
            for d in described
        }
        config = get(get(manifest, "config", dict, "the manifest"), "digest", str, "the manifest")
        if not _is_whole(self._store.blob(config), config):
            self._fetch_config(config, digest)
        name = self._store.blob(config).relative_to(self._store.root)
        document = blobs.read(blobs.Directory(self._store.root), str(name), MAX_DOCUMENT)
        check_config(document, len(described), self._wanted.name)
        return layers

    def _fetch_config(self, config: str, digest: str) -> None:
        def by_manifest(wanted: Reference, _: str, tick: Tick) -> bytes:
            return self._registry.config(wanted, digest, tick)

        data = self._fetch(by_manifest, config, digest)
        files.write(self._scratch / "document", data, self._store.blob(config))

    def _layers(self, layers: dict[str, int], digest: str) -> None:
        missing = {d: size for d, size in layers.items() if not _is_whole(self._store.blob(d), d)}
        self._tell(sum(layers.values()) - sum(missing.values()), layers)
        if not missing:
            return
        for found in missing:  # a damaged one would be taken for whole
            self._store.blob(found).unlink(missing_ok=True)
        self._check_room(sum(missing.values()))
        for attempt in range(ATTEMPTS):
            try:
                self._copy(layers, digest)
                break
            except RegistryUnreachable:
                if attempt == ATTEMPTS - 1:
                    raise
        self._tell(sum(layers.values()), layers)

    def _copy(self, layers: dict[str, int], digest: str) -> None:
        """Have skopeo fetch the layers that are missing.  It writes manifests in place, so it gets a directory of
        blobs of its own, with links to those that are here; layers that came whole are kept, however it ends."""
        shared, scratch = self._scratch / "blobs", self._scratch / "layout"
        for folder in (shared / "sha256", shared / "sha512", scratch):
            folder.mkdir(parents=True)
        ours = {layer: shared / self._store.blob(layer).relative_to(self._store.blobs) for layer in layers}
        for layer, path in ours.items():
            with contextlib.suppress(FileNotFoundError):
                os.link(self._store.blob(layer), path)
        try:
            self._registry.copy(
                self._wanted, digest, shared, scratch, lambda: self._tell(_arrived(layers, ours, scratch), layers)
            )
        finally:
            for layer, path in ours.items():
                if path.exists() and not self._store.blob(layer).exists():
                    files.publish(path, self._store.blob(layer))
            shutil.rmtree(shared)
            shutil.rmtree(scratch)

    def _check_room(self, needed: int) -> None:
        free = shutil.disk_usage(self._store.root).free
        if free < needed:
            raise StorageFailed(
                f"{self._wanted.name} needs {needed} bytes more, and {self._store.root} has {free} left",
                hint="make room: byre image prune; or set XDG_DATA_HOME to another directory",
            )

    def _tell(self, done: int, layers: dict[str, int]) -> int:
        self._progress(PullProgress(self._wanted.name, done, sum(layers.values()), len(layers)))
        return done


def _is_index(document: Any) -> bool:
    """Told by what is in it, for old ones have no mediaType; what could be either is refused (CVE-2021-41190)."""
    if not isinstance(document, dict) or document.get("schemaVersion") == 1:
        raise ImageInvalid(
            "the registry has this image in a format that is not known, or no longer",
            hint="push it again with a current docker, podman or skopeo",
        )
    is_index, is_image = "manifests" in document, "layers" in document or "config" in document
    if is_index == is_image:
        raise ImageInvalid("the document is neither an image's manifest nor an index of them, or both")
    return is_index


def _arrived(layers: dict[str, int], whole: dict[str, Path], scratch: Path) -> int:
    """Bytes of the layers that are here or on their way."""
    done = sum(size for digest, size in layers.items() if whole[digest].exists())
    for path in scratch.glob("oci-put-blob*"):
        with contextlib.suppress(FileNotFoundError):  # just renamed
            done += path.stat().st_size
    return min(done, sum(layers.values()))


def _is_whole(path: Path, digest: str) -> bool:
    """Whether the blob is there with this digest."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, digest.partition(":")[0]).hexdigest() == path.name
    except FileNotFoundError:
        return False


# -- from files --------------------------------------------------------------------------------------------


def take_in(store: ImageStore, source: str, name: str = "", progress: Progress = lambda _: None) -> Image:
    """Copy the image at `source`, a path as `open_image` takes it, into the store, under `name` or its own.

    Blocks, and calls `progress` as `pull` does.  Raises InvalidRequest without any name, ImageNotFound,
    ImageInvalid, StorageFailed.
    """
    with open_image(source) as image:
        wanted = _own_name(image, name)
        total = sum(layer.size for layer in image.layers)
        done = 0

        def seen(count: int) -> None:
            nonlocal done
            done += count
            progress(PullProgress(wanted, min(done, total), total, len(image.layers)))

        with store.adding(wanted, lambda: seen(0)) as scratch:
            layers = [_copy(store, scratch, layer, seen) for layer in image.layers]
            config = store.put(scratch, image.config_document)
            raw = image.manifest or _manifest(config, len(image.config_document), layers)
            digest = store.put(scratch, raw)
            made = Image(
                name=wanted, digest=digest, size=len(raw), source="", indexes=(), pulled=now(),
                stored=sum(size for _, size in layers),
            )  # fmt: skip
            from_manifest(blobs.Directory(store.root), wanted, made.descriptor)
            store.name(scratch, made)
            return made


def _own_name(image: ContainerImage, name: str) -> str:
    # A bare tag, as an OCI layout has it, is no name.
    own = next((found for found in image.names if "/" in found or ":" in found), "")
    if not (name or own):
        raise InvalidRequest(f"{image.reference} does not say its image's name", hint="give a name after it")
    found = reference.parse(name or own)
    if found.digest:
        raise InvalidRequest("an imported image is named by a tag, not by a digest", hint="give NAME:TAG")
    return found.name


def _copy(store: ImageStore, scratch: Path, layer: LayerSource, seen: Callable[[int], None]) -> tuple[str, int]:
    """Digest and size of the blob, which is in the store now; its digest is checked on the way."""
    algorithm = layer.digest.partition(":")[0] or "sha256"
    new = scratch / "layer"
    with layer.open() as blob, open(new, "wb") as file:
        reader = DigestReader(blob, algorithm, min(layer.size, MAX_BYTES), seen)
        while data := reader.read(CHUNK):
            file.write(data)
        files.sync(file)
        digest = reader.digest()
    if layer.digest not in ("", digest):
        raise ImageInvalid(f"the layer {layer.digest} has the digest {digest}", hint="copy the image anew")
    files.publish(new, store.blob(digest))
    return digest, layer.size


def _manifest(config: str, size: int, layers: list[tuple[str, int]]) -> bytes:
    """For an image of a docker archive, whose layers are plain tars."""
    return json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config, "size": size},
            "layers": [{"mediaType": _OCI_LAYER, "digest": digest, "size": length} for digest, length in layers],
        },
        sort_keys=True,
    ).encode()


# -- whatever a user names ---------------------------------------------------------------------------------


@contextlib.contextmanager
def obtained(
    name: str, policy: str = "missing", registry: Registry | None = None, progress: Progress = lambda _: None
) -> Iterator[ContainerImage]:
    """The image of a path, or of a name, which is pulled where `policy` (PULL_POLICIES) says so.  To be read in
    the context.  Blocks, and calls `progress`, as `pull` does."""
    if policy not in PULL_POLICIES:
        raise InvalidRequest(f"pull is one of {', '.join(PULL_POLICIES)}; not {policy!r}")
    if reference.is_path(name):
        with open_image(name) as image:
            yield image
        return
    store = ImageStore()
    found = store.find(name) if policy != "always" else None
    if found is None and policy == "never":
        found = store.get(name)
    if found is None:
        found = _pulled(store, name, registry, progress)
    with store.open(found) as image:
        yield image


def _pulled(store: ImageStore, name: str, registry: Registry | None, progress: Progress) -> Image:
    try:
        return pull(store, name, registry, progress)
    except (OSError, InvalidRequest) as error:
        # `byre run image.tar`: a name by the rules, and most likely not meant as one.
        if Path(name).exists() and isinstance(error, (ImageNotFound, InvalidRequest)):
            error.hint = f"for the file that is here give ./{name}"
        raise
