"""What a container image is to byre: a verified configuration and its layers, lowest first.

Rule: whatever comes out of a JSON document is checked here, field by field; the rest of byre may trust
these types. Source: OCI image-spec v1.1 `config.md`, `manifest.md`; Docker's image spec v1.2 has the same
fields.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

from byre.errors import ImageInvalid
from byre.oci.tarstream import show

#: overlayfs takes this many lower directories (OVL_MAX_STACK).
MAX_LAYERS = 500
#: Bytes of a manifest, an index or a configuration; containers/image has the same limit.
MAX_DOCUMENT = 4 << 20

_DIGEST = re.compile(r"(sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})\Z")


@dataclass(frozen=True)
class ImageConfig:
    """An image's defaults.  `entrypoint` and `cmd` are None where the image has none; `env` are
    NAME=VALUE."""

    architecture: str
    os: str
    entrypoint: tuple[str, ...] | None = None
    cmd: tuple[str, ...] | None = None
    env: tuple[str, ...] = ()
    user: str = ""
    working_dir: str = ""
    stop_signal: str = ""
    volumes: tuple[str, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    diff_ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerSource:
    """One layer's blob.  `digest` is of the blob, `diff_id` of the tar in it, `size` the blob's in bytes."""

    digest: str
    media_type: str
    size: int
    diff_id: str
    open: Callable[[], BinaryIO]


@dataclass(frozen=True)
class ContainerImage:
    """An image that was found; its layers' blobs can be read while the source they came from is open.

    `manifest` and `config_document` are the JSON documents that were verified (a docker archive has no manifest of
    this kind: b"" and a digest of its configuration); `names` are those that the source itself gives it.
    """

    reference: str
    manifest_digest: str
    config: ImageConfig
    layers: list[LayerSource]
    manifest: bytes = b""
    config_document: bytes = b""
    names: tuple[str, ...] = ()


def check_digest(value: str, what: str) -> str:
    """`value` as a digest of an algorithm that is known; anything else could be a path."""
    if not _DIGEST.match(value):
        raise ImageInvalid(f"{what} has {show(value)} for a digest", hint="only sha256 and sha512 are known")
    return value


def get(document: Any, key: str, kind: type, what: str, default: Any = None) -> Any:
    """`document[key]`, which is of `kind`; `default` where it is absent or null; ImageInvalid otherwise."""
    if not isinstance(document, dict):
        raise ImageInvalid(f"{what} is not a JSON object")
    value = document.get(key)
    if value is None:
        if default is None:
            raise ImageInvalid(f"{what} has no {key}")
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ImageInvalid(f"{what} has a {key} that is not a {kind.__name__}")
    return value


def parse_config(document: Any) -> ImageConfig:
    """The image configuration; raises ImageInvalid naming the field that is wrong."""
    what = "the image's configuration"
    rootfs = get(document, "rootfs", dict, what)
    if get(rootfs, "type", str, what) != "layers":
        raise ImageInvalid(f"{what} has a rootfs of an unknown type")
    config = get(document, "config", dict, what, {})
    env = _strings(config, "Env", what) or ()
    if any("=" not in pair or pair.startswith("=") for pair in env):
        raise ImageInvalid(f"{what} has an Env that is not NAME=VALUE")
    labels = get(config, "Labels", dict, what, {})
    return ImageConfig(
        architecture=get(document, "architecture", str, what),
        os=get(document, "os", str, what),
        entrypoint=_strings(config, "Entrypoint", what),
        cmd=_strings(config, "Cmd", what),
        env=env,
        user=_text(config, "User", what),
        working_dir=_text(config, "WorkingDir", what),
        stop_signal=_text(config, "StopSignal", what),
        volumes=tuple(sorted(_volume(path) for path in get(config, "Volumes", dict, what, {}))),
        labels=tuple(sorted((str(key), str(value)) for key, value in labels.items())),
        diff_ids=tuple(check_digest(d, what) for d in _strings(rootfs, "diff_ids", what) or ()),
    )


def _text(config: dict[str, Any], key: str, what: str) -> str:
    value: str = get(config, key, str, what, "")
    if "\0" in value:
        raise ImageInvalid(f"{what} has a NUL in its {key}")
    return value


def _strings(document: dict[str, Any], key: str, what: str) -> tuple[str, ...] | None:
    if document.get(key) is None:
        return None
    values: list[Any] = get(document, key, list, what)
    if not all(isinstance(value, str) and "\0" not in value for value in values):
        raise ImageInvalid(f"{what} has a {key} that is not a list of strings")
    return tuple(values)


def _volume(path: str) -> str:
    """A volume's path, absolute and without `.` and `..`: it becomes a mount point."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not path.startswith("/") or ".." in parts or not parts or "\0" in path:
        raise ImageInvalid(
            f"the image's configuration has the volume {show(path)}, which is no absolute path below /"
        )
    return "/" + "/".join(parts)
