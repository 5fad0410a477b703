"""One layer: its blob verified and listed (`scan`), and the squashfs image made of it (`convert`).

Rule: nothing is unpacked.  A layer's tar is read twice: once for its list of entries, from which `tree`
makes the plan of the image, and once to stream the contents that the plan wants into `tar2sqfs`.  Both
times the digests are checked, so a blob that changes in between gives an error and no image.
"""

from __future__ import annotations

import hashlib
import io
import os
import select
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

import msgpack

from byre.errors import ByreError, ImageInvalid, MachineFailed, ToolMissing
from byre.oci import tarstream
from byre.oci.compression import CHUNK, DigestReader, decompressed
from byre.oci.image import LayerSource
from byre.oci.tarstream import Entry, TarReader
from byre.oci.tree import Item
from byre_proto.errors import printable

#: Part of every key: to be raised whenever the same layer gives another image than before.
VERSION = 1
#: Seconds in which tar2sqfs must take some bytes; it is a local program writing to a local disk.
STALL = 120.0
_TEXT = ("utf-8", "surrogateescape")
_TYPES = {
    tarstream.FILE: tarfile.REGTYPE,
    tarstream.LINK: tarfile.LNKTYPE,
    tarstream.SYMLINK: tarfile.SYMTYPE,
    tarstream.CHAR: tarfile.CHRTYPE,
    tarstream.BLOCKDEV: tarfile.BLKTYPE,
    tarstream.DIRECTORY: tarfile.DIRTYPE,
    tarstream.FIFO: tarfile.FIFOTYPE,
}

Seen = Callable[[int], None]


def scan(layer: LayerSource, seen: Seen | None = None) -> list[Entry]:
    """The layer's entries, in the tar's order.  The blob's digest is checked first, then the tar and its
    diff_id.

    `seen` is told the bytes read of the blob; what it raises ends the scan.  Raises ImageInvalid.
    """
    if layer.digest:
        with layer.open() as blob:
            reader = DigestReader(blob, layer.digest.partition(":")[0], layer.size, seen)
            if (found := reader.digest()) != layer.digest:
                raise ImageInvalid(
                    f"the layer {layer.digest} has the digest {found}",
                    hint="the image was changed or damaged: copy it anew",
                    digest=found,
                )
    with _tar(layer, seen) as tar:
        return list(tar)


@contextmanager
def _tar(layer: LayerSource, seen: Seen | None) -> Iterator[TarReader]:
    """The layer's tar; leaving without an error reads its rest and checks the diff_id."""
    with layer.open() as blob, decompressed(DigestReader(blob, "sha256", layer.size, seen)) as stream:
        reader = DigestReader(stream, layer.diff_id.partition(":")[0], tarstream.MAX_BYTES)
        try:
            yield TarReader(io.BufferedReader(reader, CHUNK))
        except ImageInvalid as error:
            if not error.data.get("layer"):
                error.data["layer"] = layer.digest or layer.diff_id
            raise
        if (found := reader.digest()) != layer.diff_id:
            raise ImageInvalid(
                f"the layer with the diff_id {layer.diff_id} has {found} when decompressed",
                hint="the image is inconsistent: build or copy it anew",
                digest=found,
            )


def plan_key(plan: Sequence[Item], diff_ids: Sequence[str], copy: int) -> str:
    """The hex digest of all that determines a layer's image: what is in it, and where its files' data come
    from.

    `copy` counts the times that one stack of layers needs the same image: an overlay takes no directory
    twice.
    """
    hasher = hashlib.sha256(b"%d %d\n" % (VERSION, copy))
    for entry, (layer, ordinal) in plan:
        packed = msgpack.packb([*entry, diff_ids[layer] if layer >= 0 else "", ordinal],
                               use_bin_type=True, unicode_errors="surrogateescape")  # fmt: skip
        hasher.update(cast(bytes, packed))
    return hasher.hexdigest()


def convert(
    plan: Sequence[Item],
    layers: Sequence[LayerSource],
    listed: Sequence[Sequence[Entry]],
    target: Path,
    seen: Seen | None = None,
) -> None:
    """Write the squashfs image of `plan` to `target`, which must not exist.

    `layers` and `listed` are the stack up to this layer and its entries as `scan` gave them.  The image is
    the same bytes for the same plan.  Raises ImageInvalid, ToolMissing, and MachineFailed when tar2sqfs
    fails.
    """
    wanted: dict[int, dict[int, Entry]] = {}
    with _Squashfs(target) as out:
        for entry, (layer, ordinal) in plan:
            if layer >= 0:
                wanted.setdefault(layer, {})[ordinal] = entry
            elif entry.kind != tarstream.LINK:
                out.entry(entry)
        for layer in sorted(wanted, reverse=True):
            _contents(layers[layer], listed[layer], wanted[layer], out, seen)
        for entry, _ in plan:
            if entry.kind == tarstream.LINK:
                out.entry(entry)


def _contents(
    layer: LayerSource, listed: Sequence[Entry], wanted: dict[int, Entry], out: _Squashfs, seen: Seen | None
) -> None:
    """Stream the files of a layer that are `wanted`, by ordinal."""
    with _tar(layer, seen) as tar:
        for ordinal, found in enumerate(tar):
            if ordinal >= len(listed) or found != listed[ordinal]:
                raise ImageInvalid(f"the layer {layer.diff_id} changed while it was read", hint="try again")
            if entry := wanted.get(ordinal):
                out.entry(entry, tar.data())


class _Squashfs:
    """tar2sqfs, fed with a tar.  Leaving without an error waits until the image is whole and on the disk."""

    def __init__(self, target: Path) -> None:
        program = shutil.which("tar2sqfs")
        if program is None:
            raise ToolMissing("there is no tar2sqfs to make a layer's image", hint="install squashfs-tools-ng")
        # lz4: as fast to write as none, half the size, and cheap to read in an emulated guest.  --no-skip: an entry
        # that it cannot take is an error.  The image has no time stamp of its own.
        self._command = [program, "--quiet", "--no-skip", "--compressor", "lz4", str(target)]
        self._target = target
        self._buffer = io.BytesIO()

    def __enter__(self) -> _Squashfs:
        self._errors: IO[bytes] = tempfile.TemporaryFile()
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                bufsize=0,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                env={"SOURCE_DATE_EPOCH": "0", "LC_ALL": "C"},
            )
        except BaseException:
            self._errors.close()
            raise
        assert self._process.stdin
        self._fd = self._process.stdin.fileno()
        os.set_blocking(self._fd, False)
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._process.kill()  # gone already, unless something failed
            assert self._process.stdin
            self._process.stdin.close()
            self._process.wait()
            self._errors.close()

    def entry(self, entry: Entry, data: Iterable[bytes] = ()) -> None:
        header = _header(entry)
        self._write(header.tobuf(tarfile.PAX_FORMAT, *_TEXT))
        for piece in data:
            self._write(piece)
        self._write(bytes(-header.size % tarfile.BLOCKSIZE))

    def _write(self, data: bytes) -> None:
        """Small writes are gathered: a header of 512 bytes is not worth a system call."""
        self._buffer.write(data)
        if self._buffer.tell() >= CHUNK:
            self._flush()

    def _flush(self) -> None:
        data = self._buffer.getbuffer()[: self._buffer.tell()]
        self._buffer = io.BytesIO()
        try:
            while data:
                if not select.select([], [self._fd], [], STALL)[1]:
                    raise self._failed(f"took nothing for {STALL:.0f} s")
                data = data[os.write(self._fd, data) :]
        except BrokenPipeError:
            self._process.wait()
            raise self._failed("ended early") from None

    def _finish(self) -> None:
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._flush()
        assert self._process.stdin
        self._process.stdin.close()
        try:
            status = self._process.wait(STALL)
        except subprocess.TimeoutExpired:
            raise self._failed(f"did not end within {STALL:.0f} s") from None
        if status != 0:
            raise self._failed(f"ended with status {status}")
        with open(self._target, "rb") as image:
            os.fsync(image.fileno())

    def _failed(self, what: str) -> ByreError:
        self._errors.seek(0)
        said = printable(self._errors.read(4096).decode("utf-8", "replace").strip())
        free = shutil.disk_usage(self._target.parent).free >> 20
        return MachineFailed(
            f"tar2sqfs {what}: {said or 'it said nothing'}",
            hint=f"{self._target.parent} has {free} MiB left; XDG_CACHE_HOME moves the cache",
            command=self._command,
        )


def _header(entry: Entry) -> tarfile.TarInfo:
    header = tarfile.TarInfo(entry.name or ".")
    header.type = _TYPES[entry.kind]
    header.mode, header.uid, header.gid, header.mtime = entry.mode, entry.uid, entry.gid, entry.mtime
    header.size = entry.size if entry.kind == tarstream.FILE else 0
    header.linkname = entry.target
    header.devmajor, header.devminor = entry.device
    header.pax_headers = {f"SCHILY.xattr.{key}": value.decode(*_TEXT) for key, value in entry.xattrs}
    return header
