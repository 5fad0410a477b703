"""Makes a small OCI image of this machine's static busybox: `python -m examples.busybox_image DIRECTORY`.

It shows how little an image is: a tar per layer, two JSON documents, and an index, each named by its digest.  The
result is the same bytes for the same busybox.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BUSYBOX = Path("/usr/bin/busybox")  # Debian's package busybox-static

_ETC = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/home/user:/bin/sh\n"
    "nobody:x:65534:65534:nobody:/:/bin/false\n",
    "etc/group": "root:x:0:\ntty:x:5:\nusers:x:100:user\nuser:x:1000:\nnogroup:x:65534:\n",
    "etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
}


class Layer:
    """A layer's tar in the making; every entry has mtime 0, so that equal layers are equal bytes."""

    def __init__(self) -> None:
        self._bytes = io.BytesIO()
        self._tar = tarfile.open(fileobj=self._bytes, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115 - see `data`

    def add(
        self,
        name: str,
        data: bytes = b"",
        *,
        kind: bytes = tarfile.REGTYPE,
        mode: int = 0o644,
        owner: tuple[int, int] = (0, 0),
        target: str = "",
        device: tuple[int, int] = (0, 0),
        xattrs: Mapping[str, bytes] | None = None,
    ) -> None:
        entry = tarfile.TarInfo(name)
        entry.type, entry.mode, entry.size, entry.linkname = kind, mode, len(data), target
        entry.uid, entry.gid = owner
        entry.devmajor, entry.devminor = device
        entry.pax_headers = {
            f"SCHILY.xattr.{key}": value.decode("utf-8", "surrogateescape") for key, value in (xattrs or {}).items()
        }
        self._tar.addfile(entry, io.BytesIO(data))

    def directory(self, name: str, mode: int = 0o755, **more: Any) -> None:
        self.add(name, kind=tarfile.DIRTYPE, mode=mode, **more)

    def symlink(self, name: str, target: str) -> None:
        self.add(name, kind=tarfile.SYMTYPE, mode=0o777, target=target)

    def data(self) -> bytes:
        self._tar.close()
        return self._bytes.getvalue()


def write_layout(
    destination: Path,
    layers: Sequence[bytes],
    config: Mapping[str, Any],
    *,
    tag: str = "latest",
    compress: bool = True,
) -> Path:
    """An OCI image layout at `destination`: `layers` are tars, the lowest first, `config` the image's "config"."""
    blobs = destination / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def blob(data: bytes, media_type: str) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {
            "mediaType": f"application/vnd.oci.image.{media_type}",
            "digest": f"sha256:{digest}",
            "size": len(data),
        }

    def document(content: Mapping[str, Any], media_type: str) -> dict[str, Any]:
        return blob(json.dumps(content, sort_keys=True).encode(), media_type)

    described = [
        blob(gzip.compress(tar, 1, mtime=0), "layer.v1.tar+gzip") if compress else blob(tar, "layer.v1.tar")
        for tar in layers
    ]
    image = {
        "architecture": "amd64",
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(tar).hexdigest() for tar in layers]},
    }
    manifest = {"schemaVersion": 2, "config": document(image, "config.v1+json"), "layers": described}
    descriptor = document(manifest, "manifest.v1+json")
    descriptor["annotations"] = {"org.opencontainers.image.ref.name": tag}
    (destination / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [descriptor]}))
    (destination / "oci-layout").write_text(json.dumps({"imageLayoutVersion": "1.0.0"}))
    return destination


def busybox_layer() -> bytes:
    """A root file system of busybox alone: its applets as symbolic links, two users, and the usual directories."""
    layer = Layer()
    for name in ("bin", "dev", "etc", "home", "proc", "sys", "usr", "usr/bin", "usr/sbin", "sbin", "var"):
        layer.directory(name)
    layer.directory("root", 0o700)
    layer.directory("tmp", 0o1777)
    layer.directory("home/user", 0o755, owner=(1000, 1000))
    for name, text in _ETC.items():
        layer.add(name, text.encode())
    layer.add("bin/busybox", BUSYBOX.read_bytes(), mode=0o755)
    listed = subprocess.run([BUSYBOX, "--list"], capture_output=True, check=True, text=True)
    for applet in sorted(set(listed.stdout.split()) - {"busybox"}):
        layer.symlink(f"bin/{applet}", "busybox")
    return layer.data()


def make_busybox_image(destination: Path) -> Path:
    """An OCI layout with busybox at `destination`, which must not exist yet; its one tag is ``latest``."""
    return write_layout(
        destination, [busybox_layer()], {"Cmd": ["sh"], "Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]}
    )


if __name__ == "__main__":
    print(make_busybox_image(Path(sys.argv[1])))
