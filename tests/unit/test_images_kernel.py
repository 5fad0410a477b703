"""The kernel out of a bzImage: every compression that can be made here, and every way to be no such kernel."""

from __future__ import annotations

import lzma
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable

import pytest

from byre_images import kernel
from byre_images.errors import BuildFailed

NOTE = struct.pack("<III", 4, 8, 18) + b"Xen\0" + bytes(8)
ELF = b"\x7fELF" + bytes(60) + NOTE + bytes(range(256)) * 40


def bzimage(payload: bytes, *, sectors: int = 3, version: int = 0x020F, length: int | None = None) -> bytes:
    """The least that the boot protocol calls a bzImage."""
    image = bytearray((max(sectors, 4 if not sectors else 0) + 1) * 512)
    image[kernel.SETUP_SECTS] = sectors
    image[kernel.BOOT_FLAG : kernel.BOOT_FLAG + 2] = b"\x55\xaa"
    image[kernel.MAGIC : kernel.MAGIC + 4] = b"HdrS"
    struct.pack_into("<H", image, kernel.VERSION, version)
    stub = b"decompressor"
    size = len(payload) if length is None else length
    struct.pack_into("<II", image, kernel.PAYLOAD_OFFSET, len(stub), size)
    return bytes(image) + stub + payload + b"after"


def zstd(data: bytes) -> bytes:
    assert shutil.which("zstd"), "the set-up installs zstd"
    return subprocess.run(["zstd", "-qc"], input=data, capture_output=True, check=True).stdout + b"size"


def gzip(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=31)
    return compressor.compress(data) + compressor.flush()


@pytest.mark.parametrize(
    "compress", [lambda data: lzma.compress(data) + b"size", gzip, zstd], ids=["xz", "gzip", "zstd"]
)
def test_the_payload_is_found_and_decompressed(compress: Callable[[bytes], bytes]) -> None:
    assert kernel.vmlinux(bzimage(compress(ELF))) == ELF


def test_no_setup_sectors_means_four() -> None:
    assert kernel.vmlinux(bzimage(gzip(ELF), sectors=0)) == ELF


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (b"", "no bzImage"),
        (bytes(4096), "no bzImage"),
        (bzimage(gzip(ELF), version=0x0207), "too old"),
        (bzimage(gzip(ELF), length=1 << 30), "cut off"),
        (bzimage(b"?" * 100), "unknown compression"),
        (bzimage(gzip(ELF)[:8] + b"\xff" * 100), "cannot be decompressed"),
        (bzimage(gzip(b"no elf")), "no ELF"),
        (bzimage(gzip(ELF.replace(NOTE, bytes(len(NOTE))))), "no PVH entry"),
    ],
)
def test_what_is_no_such_kernel_is_refused_with_its_reason(image: bytes, words: str) -> None:
    with pytest.raises(BuildFailed, match=words):
        kernel.vmlinux(image)
