"""The module set: closed under dependencies, in an order that loads, from what the modules say themselves."""

from __future__ import annotations

import lzma
import struct

import pytest

from byre_images import modules
from byre_images.errors import BuildFailed


def module(*info: str) -> bytes:
    """An ELF file that has nothing but a .modinfo section."""
    text = b"\0".join(line.encode() for line in info) + b"\0"
    names = b"\0.modinfo\0.shstrtab\0"
    header = bytearray(64)
    header[:6] = b"\x7fELF\x02\x01"
    struct.pack_into("<Q", header, 0x28, 64 + len(text) + len(names))
    struct.pack_into("<HHH", header, 0x3A, 64, 3, 2)
    table = bytes(64)
    table += struct.pack("<IIQQQQ", 1, 1, 0, 0, 64, len(text)).ljust(64, b"\0")
    table += struct.pack("<IIQQQQ", 10, 3, 0, 0, 64 + len(text), len(names)).ljust(64, b"\0")
    return bytes(header) + text + names + table


FILES = {
    "kernel/virtio/virtio.ko": module("depends=", "license=GPL"),
    "kernel/virtio/virtio_ring.ko": module("depends=virtio"),
    "kernel/block/virtio_blk.ko": module("depends=virtio_ring,virtio", "alias=virtio:d00000002v*"),
    "kernel/fs/ext4.ko": module("depends=jbd2", "softdep=pre: crc32c-generic", "alias=fs-ext4"),
    "kernel/fs/jbd2.ko.xz": lzma.compress(module("depends=")),
    "kernel/crypto/crc32c-generic.ko": module("depends=", "softdep=pre: ext4"),
    "kernel/fs/broken.ko": module("depends=nowhere"),
}
BUILTIN = ["kernel/net/unix.ko"]


def close(*wanted: str) -> tuple[dict[str, modules.Module], list[str]]:
    return modules.closure(wanted, FILES, BUILTIN, FILES.__getitem__)


def test_the_closure_has_dependencies_first_and_nothing_else() -> None:
    found, missing = close("virtio_blk")
    assert list(found) == ["virtio", "virtio_ring", "virtio_blk"]
    assert not missing


def test_soft_dependencies_come_along_even_in_a_circle() -> None:
    found, _ = close("ext4")
    assert set(found) == {"ext4", "jbd2", "crc32c_generic"}
    order = [entry.path for entry in modules.load_order(found, ["ext4"])]
    assert order.index("kernel/fs/jbd2.ko") < order.index("kernel/fs/ext4.ko")


def test_what_is_built_in_is_not_wanted_and_what_is_nowhere_is_told() -> None:
    found, missing = close("unix", "no_such_module")
    assert found == {}
    assert missing == ["no_such_module"]


def test_a_hard_dependency_that_is_nowhere_is_an_error() -> None:
    with pytest.raises(BuildFailed, match="nowhere, which broken needs"):
        close("broken")


def test_the_indexes_are_as_modules_dep_5_says() -> None:
    found, _ = close("virtio_blk", "ext4")
    texts = modules.indexes(found)
    lines = dict(line.split(":", 1) for line in texts["modules.dep"].splitlines())
    assert lines["kernel/virtio/virtio.ko"] == ""
    assert lines["kernel/block/virtio_blk.ko"] == " kernel/virtio/virtio_ring.ko kernel/virtio/virtio.ko"
    assert lines["kernel/fs/ext4.ko"] == " kernel/fs/jbd2.ko"
    assert "alias fs-ext4 ext4\n" in texts["modules.alias"]
    assert "softdep ext4 pre: crc32c_generic\n" in texts["modules.softdep"]


def test_the_signature_is_cut_off_and_nothing_more() -> None:
    plain = module("depends=virtio")
    signer, key, signature = b"signer", b"key-id", b"s" * 513
    info = modules.SIGNATURE_INFO.pack(0, 0, 2, len(signer), len(key), len(signature))
    signed = plain + signer + key + signature + info + modules.SIGNATURE_MARK
    assert modules.unsigned(signed) == plain
    assert modules.unsigned(plain) == plain
    assert modules.parse("a.ko", signed).depends == ["virtio"]


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(BuildFailed, match="no 64-bit ELF"):
        modules.parse("a.ko", b"\x7fELF\x01")
