"""Finds a container image by its reference: OCI layouts, OCI archives and docker archives.

Rule: what this returns was checked against its digests, except the layers' blobs, which are large and are
checked when they are converted.  Nothing is fetched: `pull` does that.
Source: OCI image-spec v1.1 `image-layout.md`, `image-index.md`, `manifest.md`; containers-transports(5).
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from byre.errors import ImageInvalid, ImageNotFound
from byre.oci import blobs
from byre.oci.blobs import Archive, Directory, Files
from byre.oci.image import (
    MAX_DOCUMENT,
    MAX_LAYERS,
    ContainerImage,
    ImageConfig,
    LayerSource,
    check_digest,
    get,
    parse_config,
)
from byre.oci.tarstream import show

__all__ = ["ContainerImage", "ImageConfig", "LayerSource", "open_image"]

#: What the guest runs.
OS, ARCHITECTURE = "linux", "amd64"
#: Indexes in indexes; the specification sets no bound, real ones have two levels.
MAX_INDEX_DEPTH = 4

_OCI, _DOCKER = "application/vnd.oci.image.", "application/vnd.docker."
_INDEXES = {_OCI + "index.v1+json", _DOCKER + "distribution.manifest.list.v2+json"}
_MANIFESTS = {_OCI + "manifest.v1+json", _DOCKER + "distribution.manifest.v2+json"}
_LAYERS = {
    *(_OCI + "layer." + rest for rest in ("v1.tar", "v1.tar+gzip", "v1.tar+zstd")),
    *(_OCI + "layer.nondistributable." + rest for rest in ("v1.tar", "v1.tar+gzip", "v1.tar+zstd")),
    *(
        _DOCKER + "image.rootfs." + rest
        for rest in ("diff.tar", "diff.tar.gzip", "diff.tar.zstd", "foreign.diff.tar.gzip")
    ),
}
_OCI_ONLY = ("oci", "oci-archive")
_REF_NAME, _CONTAINERD_NAME = "org.opencontainers.image.ref.name", "io.containerd.image.name"
_FETCH = "to fetch an image: byre image pull debian:stable-slim, or skopeo copy"


@contextmanager
def open_image(reference: str) -> Iterator[ContainerImage]:
    """The image at `reference`: ``oci:PATH[:TAG]`` (a layout directory or its archive),
    ``oci-archive:PATH[:TAG]``, ``docker-archive:PATH[:NAME[:TAG]]``, or a plain ``PATH[:TAG]`` of any of
    them.

    The layers can be read until the context ends.  Of an image for several platforms it is linux/amd64.
    Raises ImageNotFound (no such path, tag or platform) and ImageInvalid.
    """
    transport, path, tag = _parse(reference)
    with ExitStack() as keep:
        files: Files = Directory(path) if path.is_dir() else Archive(path, keep)
        if files.size("oci-layout") is not None and transport != "docker-archive":
            yield _from_layout(files, reference, tag)
        elif files.size("manifest.json") is not None and transport not in _OCI_ONLY and not path.is_dir():
            yield _from_docker(files, reference, tag)
        else:
            raise ImageInvalid(
                f"{path} is no {transport or 'container'} image: it has no "
                + ("manifest.json" if transport == "docker-archive" else "oci-layout"),
                hint="skopeo copy converts between the kinds of image; " + _FETCH,
            )


def _parse(reference: str) -> tuple[str, Path, str]:
    """`(transport, path, tag)`; the path is the longest beginning that exists, for both may have colons in
    them."""
    transport, colon, rest = reference.partition(":")
    if not colon or transport not in ("oci", "oci-archive", "docker-archive"):
        transport, rest = "", reference
    if "\0" in rest or not rest:
        raise ImageNotFound(f"{show(reference)} is no image reference", hint="give oci:PATH[:TAG]; " + _FETCH)
    end = len(rest)
    while end > 0:
        path = Path(rest[:end])
        if _exists(path):
            return transport, path, rest[end + 1 :]
        end = rest.rfind(":", 0, end)
    raise ImageNotFound(f"there is no image at {show(rest)}", hint=_FETCH, reference=reference)


def _exists(path: Path) -> bool:
    try:
        return path.is_dir() or path.is_file()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise ImageNotFound(f"{path} cannot be read: {error.strerror}", hint="look at its permissions") from error


# -- OCI ---------------------------------------------------------------------------------------------------


def _from_layout(files: Files, reference: str, tag: str) -> ContainerImage:
    layout = parse_json(blobs.read(files, "oci-layout", MAX_DOCUMENT), "oci-layout")
    version = get(layout, "imageLayoutVersion", str, "oci-layout")
    if version != "1.0.0":
        raise ImageInvalid(f"the layout has the version {show(version)}; only 1.0.0 is known")
    index = parse_json(blobs.read(files, "index.json", MAX_DOCUMENT), "index.json")
    entries = [d for d in get(index, "manifests", list, "index.json") if _is_image(d)]
    descriptor = _platform(_tagged(entries, reference, tag), reference)
    for _ in range(MAX_INDEX_DEPTH):
        if descriptor.get("mediaType") not in _INDEXES:
            return from_manifest(files, reference, descriptor)
        nested = parse_json(_blob(files, descriptor, "the index"), "the index")
        descriptor = for_platform(nested, reference)
    raise ImageInvalid(f"the image's indexes are nested deeper than {MAX_INDEX_DEPTH}")


def for_platform(index: Any, reference: str) -> dict[str, Any]:
    """The descriptor for the guest's platform out of an index.  Raises ImageNotFound, ImageInvalid."""
    return _platform([d for d in get(index, "manifests", list, "the index") if _is_image(d)], reference)


def _is_image(descriptor: Any) -> bool:
    """Whether it may be an image's manifest or an index of them; buildkit's attestations are for
    unknown/unknown."""
    check_digest(get(descriptor, "digest", str, "a descriptor"), "a descriptor")
    platform = get(descriptor, "platform", dict, "a descriptor", {})
    media_type = get(descriptor, "mediaType", str, "a descriptor", _OCI + "manifest.v1+json")
    return media_type in _INDEXES | _MANIFESTS and platform.get("os") != "unknown"


def _tag(descriptor: dict[str, Any]) -> str:
    name: str = get(get(descriptor, "annotations", dict, "a descriptor", {}), _REF_NAME, str, "a descriptor", "")
    return name


def _tagged(entries: list[dict[str, Any]], reference: str, tag: str) -> list[dict[str, Any]]:
    """The descriptors that `tag` names, or all of them."""
    found = entries
    if tag:
        found = [d for d in entries if _tag(d) == tag] or [d for d in entries if _tag(d).endswith(":" + tag)]
        if not found:
            tags, listed = _tags(entries)
            raise ImageNotFound(f"the layout has no tag {show(tag)}", hint=listed, tags=tags, reference=reference)
    if not found:
        raise ImageNotFound("the image layout is empty", hint=_FETCH, reference=reference)
    return found


def _tags(entries: list[dict[str, Any]]) -> tuple[list[str], str]:
    tags = sorted({_tag(d) for d in entries} - {""})
    return tags, "its tags are " + ", ".join(show(name) for name in tags) if tags else "it has no tags"


def _platform(entries: list[dict[str, Any]], reference: str) -> dict[str, Any]:
    """The one descriptor for the guest's platform; one that names no platform is judged by its configuration."""
    names = [_platform_name(d) for d in entries]
    fitting = [d for d, name in zip(entries, names, strict=True) if name == f"{OS}/{ARCHITECTURE}"]
    fitting = fitting or [d for d, name in zip(entries, names, strict=True) if not name]
    if not fitting:
        raise _no_platform(sorted(set(names)), reference)
    if len({d["digest"] for d in fitting}) > 1:
        tags, listed = _tags(fitting)
        hint = f"add :TAG; {listed}" if tags else "copy the one you mean into a layout of its own with skopeo copy"
        raise ImageNotFound("the layout has several images", hint=hint, tags=tags, reference=reference)
    return fitting[0]


def _platform_name(descriptor: dict[str, Any]) -> str:
    platform = get(descriptor, "platform", dict, "a descriptor", {})
    return f"{platform.get('os')}/{platform.get('architecture')}" if platform else ""


def _no_platform(names: list[str], reference: str) -> ImageNotFound:
    listed = ", ".join(show(name) for name in names) or "no platform"
    return ImageNotFound(
        f"the image is for {listed}, and the guest is {OS}/{ARCHITECTURE}",
        hint=f"use an image for it; where there are several, skopeo --override-arch {ARCHITECTURE} copy takes it",
        reference=reference,
    )


def from_manifest(files: Files, reference: str, descriptor: Mapping[str, Any]) -> ContainerImage:
    """The image whose manifest is the blob that `descriptor` describes; its other blobs lie beside it."""
    raw = _blob(files, descriptor, "the manifest")
    manifest = parse_json(raw, "the manifest")
    config_document = _blob(files, get(manifest, "config", dict, "the manifest"), "the configuration")
    described = get(manifest, "layers", list, "the manifest")
    config = check_config(config_document, len(described), reference)
    layers = [_layer(files, d, diff_id) for d, diff_id in zip(described, config.diff_ids, strict=True)]
    annotations = get(descriptor, "annotations", dict, "a descriptor", {})
    names = tuple(str(annotations[key]) for key in (_CONTAINERD_NAME, _REF_NAME) if annotations.get(key))
    return ContainerImage(reference, descriptor["digest"], config, layers, raw, config_document, names)


def _layer(files: Files, descriptor: Any, diff_id: str) -> LayerSource:
    media_type = get(descriptor, "mediaType", str, "a layer")
    digest = check_digest(get(descriptor, "digest", str, "a layer"), "a layer")
    if media_type not in _LAYERS:
        raise ImageInvalid(
            f"the layer {digest} has the media type {show(media_type)}, which is not known",
            hint="copy the image anew with skopeo copy --format oci",
        )
    name, size = _locate(files, descriptor, "a layer")
    return LayerSource(digest, media_type, size, diff_id, lambda: files.open(name))


def _locate(files: Files, descriptor: Any, what: str) -> tuple[str, int]:
    """`(name, size)` of the blob, whose size is as described."""
    algorithm, _, encoded = check_digest(get(descriptor, "digest", str, what), what).partition(":")
    name = f"blobs/{algorithm}/{encoded}"
    size, expected = files.size(name), get(descriptor, "size", int, what)
    if size is None:
        raise ImageInvalid(f"the image lacks the blob {algorithm}:{encoded} of {what}", hint="copy the image anew")
    if size != expected:
        raise ImageInvalid(
            f"the blob {algorithm}:{encoded} of {what} has {size} bytes instead of {expected}",
            hint="the image was cut off or changed: copy it anew",
        )
    return name, size


def _blob(files: Files, descriptor: Mapping[str, Any], what: str) -> bytes:
    """A document's bytes, checked against the digest that its descriptor has."""
    name, _ = _locate(files, descriptor, what)
    data = blobs.read(files, name, MAX_DOCUMENT)
    algorithm, _, encoded = descriptor["digest"].partition(":")
    if hashlib.new(algorithm, data).hexdigest() != encoded:
        raise ImageInvalid(
            f"{what} does not have its digest {descriptor['digest']}",
            hint="the image was changed or damaged: copy it anew",
        )
    return data


def check_config(document: bytes, layers: int, reference: str) -> ImageConfig:
    """The configuration of an image that has as many layers and that the guest can run."""
    config = parse_config(parse_json(document, "the image's configuration"))
    if (config.os, config.architecture) != (OS, ARCHITECTURE):
        raise _no_platform([f"{config.os}/{config.architecture}"], reference)
    if layers != len(config.diff_ids):
        raise ImageInvalid(f"the image has {layers} layers and {len(config.diff_ids)} diff_ids")
    if not layers:
        raise ImageInvalid("the image has no layers, so there is nothing to run in it")
    if layers > MAX_LAYERS:
        raise ImageInvalid(
            f"the image has {layers} layers; an overlay takes {MAX_LAYERS}",
            hint="flatten the image, for example with docker export and docker import",
        )
    return config


def parse_json(data: bytes, what: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ImageInvalid(f"{what} is not JSON: {str(error)[:200]}") from None


# -- docker save -------------------------------------------------------------------------------------------


def _from_docker(files: Files, reference: str, tag: str) -> ContainerImage:
    what = "manifest.json"
    document = parse_json(blobs.read(files, what, MAX_DOCUMENT), what)
    if not isinstance(document, list):
        raise ImageInvalid(f"{what} is not a list")
    entries = [item for item in document if not tag or _named(item, tag)]
    tags = sorted({str(name) for item in document for name in get(item, "RepoTags", list, what, [])})
    listed = "it has " + (", ".join(show(name) for name in tags) or "no names")
    if len(entries) != 1:
        missing = f"no image {show(tag)}" if tag else f"{len(entries)} images"
        raise ImageNotFound(f"the docker archive has {missing}", hint=f"{listed}; give :NAME:TAG", tags=tags)
    raw = blobs.read(files, get(entries[0], "Config", str, what), MAX_DOCUMENT)
    members = get(entries[0], "Layers", list, what)
    config = check_config(raw, len(members), reference)
    layers = [_docker_layer(files, name, diff_id) for name, diff_id in zip(members, config.diff_ids, strict=True)]
    names = tuple(str(name) for name in get(entries[0], "RepoTags", list, what, []))
    digest = "sha256:" + hashlib.sha256(raw).hexdigest()
    return ContainerImage(reference, digest, config, layers, config_document=raw, names=names)


def _named(item: Any, tag: str) -> bool:
    """Whether `tag` names it as users write names: without the registry, and `latest` left out."""
    wanted = {tag, f"{tag}:latest"} if ":" not in tag.rpartition("/")[2] else {tag}
    names = get(item, "RepoTags", list, "manifest.json", [])
    return any(
        isinstance(n, str) and (n in wanted or n.removeprefix("docker.io/library/") in wanted) for n in names
    )


def _docker_layer(files: Files, name: Any, diff_id: str) -> LayerSource:
    size = files.size(name) if isinstance(name, str) else None
    if size is None:
        raise ImageInvalid(f"the docker archive lacks its layer {show(str(name))}", hint="save the image anew")
    # Such an archive has no digest of the blob; the diff_id covers what is in it.
    return LayerSource("", _DOCKER + "image.rootfs.diff.tar", size, diff_id, lambda: files.open(name))
