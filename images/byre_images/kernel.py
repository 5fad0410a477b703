"""What the guest takes from Debian's kernel package: a set of modules, and the uncompressed kernel in its bzImage.

QEMU boots that by PVH: without a firmware's detour, a decompressor or real mode.
Source: Documentation/arch/x86/boot.rst of Linux (the setup header; `payload_offset`, `payload_length`).
"""

from __future__ import annotations

import lzma
import re
import shutil
import struct
import tarfile
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from . import modules, tools, tree
from .errors import BuildFailed

#: What Debian's generic kernel need not do in a guest of ours; each was measured under emulation, where they take
#: a fifth of the kernel's start together.
KERNEL_ARGUMENTS = (
    "cryptomgr.notests",  # self-tests of ciphers that were tested when the kernel was made
    "initcall_blacklist="
    "load_system_certificate_list,"  # certificates for module signatures: the image's modules have none
    "crypto_kdf108_init,"  # a self-test that the word above does not reach
    "init_kprobe_trace",  # waits for RCU to set up tracing of the boot itself
)

#: Offsets in the setup header of a bzImage.
SETUP_SECTS, BOOT_FLAG, MAGIC, VERSION, PAYLOAD_OFFSET = 0x1F1, 0x1FE, 0x202, 0x206, 0x248
#: `payload_offset` and `payload_length` exist from this protocol version on.
PAYLOAD_VERSION = 0x0208
SECTOR = 512
#: A header that says zero setup sectors means this many (for kernels of long ago).
DEFAULT_SETUP_SECTS = 4

XZ, GZIP, ZSTD = b"\xfd7zXZ\0", b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
ELF = b"\x7fELF"
#: What the kernel's makefiles append to every payload but gzip's: its uncompressed size.
SIZE_TRAILER = 4
#: The ELF note that holds the PVH entry: XEN_ELFNOTE_PHYS32_ENTRY of the owner "Xen", 4 or 8 bytes long.
PVH_NOTES = [struct.pack("<III", 4, length, 18) + b"Xen\0" for length in (4, 8)]


#: Name of the package with a kernel in it, as against those that only depend on the newest one.
PACKAGE_NAME = re.compile(r"linux-image-(\d.*)")


@dataclass(frozen=True)
class KernelPackage:
    """What is taken from the package `name`; `missing` are wanted modules that this kernel does not have."""

    name: str
    release: str
    vmlinux: bytes
    modules: dict[str, modules.Module]
    missing: list[str]
    copyright: bytes


def read_package(name: str, file: Path) -> KernelPackage:
    """Open a kernel package.  Its 400 MB go through a temporary file, because modules are picked at random."""
    match = PACKAGE_NAME.fullmatch(name)
    if match is None:
        raise BuildFailed(f"{name} is no kernel package")
    release = match[1]
    with tempfile.TemporaryFile() as spool:
        with tools.reading([tools.find("dpkg-deb"), "--fsys-tarfile", file]) as stream:
            shutil.copyfileobj(stream, spool, 1 << 20)
        spool.seek(0)
        with tarfile.open(fileobj=spool) as archive:
            members = {tree.merged(member.name): member for member in archive if member.isreg()}

            def read(path: str) -> bytes:
                if path not in members:
                    raise BuildFailed(f"the package {name} has no /{path}")
                data = archive.extractfile(members[path])
                assert data is not None
                return data.read()

            prefix = f"usr/lib/modules/{release}/"
            paths = [path.removeprefix(prefix) for path in members if path.startswith(prefix) and ".ko" in path]
            found, missing = modules.closure(
                (*modules.BOOT, *modules.GUEST),
                paths,
                read(f"{prefix}modules.builtin").decode().split(),
                lambda path: read(prefix + path),
            )
            return KernelPackage(
                name,
                release,
                vmlinux(read(f"boot/vmlinuz-{release}")),
                found,
                missing,
                read(f"usr/share/doc/{name}/copyright"),
            )


def vmlinux(bzimage: bytes) -> bytes:
    """The ELF kernel inside a bzImage; `BuildFailed` when there is none, or none that PVH can boot."""
    elf = _decompress(_payload(bzimage))
    if not elf.startswith(ELF):
        raise BuildFailed("the kernel's payload is no ELF file", hint="use Debian's linux-image-amd64")
    if not any(note in elf for note in PVH_NOTES):
        raise BuildFailed("the kernel has no PVH entry", hint="it must be configured with CONFIG_PVH=y")
    return elf


def _payload(bzimage: bytes) -> bytes:
    if len(bzimage) < PAYLOAD_OFFSET + 8 or bzimage[BOOT_FLAG : BOOT_FLAG + 2] != b"\x55\xaa":
        raise BuildFailed("the kernel is no bzImage")
    (version,) = struct.unpack_from("<H", bzimage, VERSION)
    if bzimage[MAGIC : MAGIC + 4] != b"HdrS" or version < PAYLOAD_VERSION:
        raise BuildFailed(f"the kernel's boot protocol {version:#x} is too old")
    offset, length = struct.unpack_from("<II", bzimage, PAYLOAD_OFFSET)
    start = ((bzimage[SETUP_SECTS] or DEFAULT_SETUP_SECTS) + 1) * SECTOR + offset
    if not length or start + length > len(bzimage):
        raise BuildFailed("the kernel's payload is cut off")
    return bzimage[start : start + length]


def _decompress(payload: bytes) -> bytes:
    try:
        if payload.startswith(XZ):
            return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(payload)
        if payload.startswith(GZIP):
            return zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(payload)
    except (lzma.LZMAError, zlib.error) as error:
        raise BuildFailed(f"the kernel's payload cannot be decompressed: {error}") from error
    if payload.startswith(ZSTD):
        return tools.run([tools.find("zstd"), "-dcq"], stdin=payload[:-SIZE_TRAILER])
    raise BuildFailed(f"the kernel's payload has an unknown compression: {payload[:6].hex()}")
