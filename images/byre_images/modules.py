"""Which kernel modules the guest gets, and the index files that its loaders read.

The set is a closure over what the modules themselves say (`.modinfo`: depends, softdep, alias), so neither
depmod nor the host's kernel has a part in it.  Formats: modules.dep(5), `scripts/mod/modpost.c`.
"""

from __future__ import annotations

import lzma
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from . import tools
from .errors import BuildFailed

#: What the initramfs loads to reach the root file system and the channel that most VMs have, in this order (each
#: after what it depends on).
BOOT = ("virtio_mmio", "virtio_pci", "virtio_blk", "squashfs", "virtio_console")

#: What the agent, containers and a nested byre may ask for.
GUEST = (
    *("virtio_scsi", "sd_mod", "virtio_rng", "virtio_net", "virtio_balloon"),
    *("vsock", "vmw_vsock_virtio_transport", "vhost_vsock", "kvm", "kvm_amd", "kvm_intel", "qemu_fw_cfg"),
    *("erofs", "overlay", "ext4", "loop", "fuse", "virtiofs", "9p", "9pnet_fd", "9pnet_virtio"),
    *("crc32c_generic", "crc32c_intel"),  # ext4 asks the crypto layer for it by alias
    *("tun", "veth", "bridge", "br_netfilter", "nf_tables", "nft_chain_nat", "nft_ct", "nft_nat", "nft_masq"),
    *("nft_reject_inet", "nft_compat", "xt_MASQUERADE", "xt_conntrack", "xt_comment", "xt_addrtype"),
    *("iptable_filter", "iptable_nat"),
)

#: At the end of a signed module.  Debian signs for secure boot, which the guest has not, and checking an RSA
#: signature costs each module's load milliseconds under emulation: it is cut off.
SIGNATURE_MARK = b"~Module signature appended~\n"
#: struct module_signature: algo, hash, id_type, signer_len, key_id_len, 3 pad bytes, sig_len (big endian).
SIGNATURE_INFO = struct.Struct(">BBBBB3xI")


@dataclass
class Module:
    """One module: `path` below /lib/modules/RELEASE, its bytes, and what it says of itself."""

    path: str
    data: bytes
    depends: list[str] = field(default_factory=list)
    soft_before: list[str] = field(default_factory=list)
    aliases: list[str] = field(default_factory=list)


def module_name(path: str) -> str:
    """The name that the kernel knows a module file by."""
    return PurePosixPath(path).name.split(".ko")[0].replace("-", "_")


def closure(
    wanted: Iterable[str], paths: Iterable[str], builtin: Iterable[str], read: Callable[[str], bytes]
) -> tuple[dict[str, Module], list[str]]:
    """`wanted` with all they depend on, by name, dependencies first; and the names that there are nowhere.

    `paths` are all module files there are, `builtin` the paths of what is in the kernel itself, `read` gives a
    file's bytes.  A module that another hard-depends on and that is missing is a `BuildFailed`.
    """
    files = {module_name(path): path for path in paths}
    inside = {module_name(path) for path in builtin}
    found: dict[str, Module] = {}
    missing: list[str] = []
    seen: set[str] = set()  # soft dependencies may run in a circle

    def visit(name: str, needed_by: str) -> None:
        if name in seen or name in inside:
            return
        seen.add(name)
        if name not in files:
            if needed_by:
                raise BuildFailed(f"module {name}, which {needed_by} needs, is not in the kernel package")
            missing.append(name)
            return
        module = parse(files[name], read(files[name]))
        for other in module.depends:
            visit(other, name)
        for other in module.soft_before:
            if other in files:
                visit(other, name)
        found[name] = module

    for name in wanted:
        visit(name, "")
    return found, missing


def parse(path: str, data: bytes) -> Module:
    """A module from its file, decompressed and without its signature; `path` loses its compression's suffix."""
    if path.endswith(".xz"):
        data, path = lzma.decompress(data), path.removesuffix(".xz")
    elif path.endswith(".zst"):
        data, path = tools.run([tools.find("zstd"), "-dcq"], stdin=data), path.removesuffix(".zst")
    data = unsigned(data)
    module = Module(path, data)
    for line in section(data, b".modinfo").split(b"\0"):
        key, _, value = line.decode(errors="replace").partition("=")
        if key == "depends":
            module.depends = [name.replace("-", "_") for name in value.split(",") if name]
        elif key == "softdep" and value.startswith("pre:"):
            names = value.removeprefix("pre:").split("post:")[0].split()
            module.soft_before = [name.replace("-", "_") for name in names]
        elif key == "alias":
            module.aliases.append(value)
    return module


def unsigned(data: bytes) -> bytes:
    """Module bytes without the signature that may follow the ELF file."""
    if not data.endswith(SIGNATURE_MARK):
        return data
    end = len(data) - len(SIGNATURE_MARK) - SIGNATURE_INFO.size
    *_, signer, key, signature = SIGNATURE_INFO.unpack_from(data, end)
    return data[: end - signer - key - signature]


def section(elf: bytes, name: bytes) -> bytes:
    """One section of a 64-bit little-endian ELF file; empty when there is none.  Source: elf(5)."""
    if not elf.startswith(b"\x7fELF\x02\x01"):
        raise BuildFailed("a kernel module is no 64-bit ELF file")
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names_index = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + index * size) for index in range(count)]
    names = headers[names_index][4]
    for name_offset, _, _, _, offset, length in headers:
        start = names + name_offset
        if elf[start : start + len(name) + 1] == name + b"\0":
            return elf[offset : offset + length]
    return b""


def load_order(found: dict[str, Module], names: Iterable[str]) -> list[Module]:
    """`names` and all they depend on, in an order in which each can be loaded."""
    order: dict[str, Module] = {}
    seen: set[str] = set()

    def visit(name: str) -> None:
        if name in found and name not in seen:
            seen.add(name)
            for other in [*found[name].depends, *found[name].soft_before]:
                visit(other)
            order[name] = found[name]

    for name in names:
        visit(name)
    return list(order.values())


def indexes(found: dict[str, Module]) -> dict[str, str]:
    """The index files, by name: modules.dep (each line names all dependencies, nearest first), .alias, .softdep."""
    dep, alias, soft = [], [], []
    for name, module in sorted(found.items(), key=lambda item: item[1].path):
        needs = load_order({**found, name: Module(module.path, b"", module.depends)}, [name])[:-1]
        dep.append(f"{module.path}:" + "".join(f" {need.path}" for need in reversed(needs)) + "\n")
        alias += [f"alias {pattern} {name}\n" for pattern in module.aliases]
        if module.soft_before:
            soft.append(f"softdep {name} pre: {' '.join(module.soft_before)}\n")
    return {"modules.dep": "".join(dep), "modules.alias": "".join(alias), "modules.softdep": "".join(soft)}
