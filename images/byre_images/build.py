"""Builds an image in two stages, each cached by what it is made from.

The *base* (kernel, initramfs, root file system without the agent) takes a minute and changes with the packages
or this builder; the *image* is the base and the agent, and takes seconds.  Packages are looked up by `build`
alone: `ensure` builds from the last look-up, so that the same sources keep giving the same image.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import re
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import byre_proto

from . import initramfs, kernel, modules, rootfs, tools
from .bytecode import python_version
from .cache import FORMAT, INITRAMFS, KERNEL, MANIFEST, ROOT, Cache, Image, digest_of, key
from .errors import IMPORT_HINT, BuildFailed, HostNotSupported
from .packages import Apt, Pin
from .tree import Tree

#: In a base directory: the tree without the agent, and what there is to say of it.
BASE_ROOT, BASE_FACTS = "root.tar", "facts.json"

#: Block compression of the root disk, see docs: lz4 halves it at no cost that a boot shows.
COMPRESSION = "lz4"

KERNEL_PACKAGE = re.compile(r"linux-image-(\d.*)")

Say = Callable[[str], None]


def ensure(progress: Say | None = None, *, cache: Path | None = None) -> Image:
    """The image of the sources that run now: from the cache in milliseconds, else built.

    The first build looks the packages up; later ones use the same, until `build` is called.
    """
    store, packages = Cache(cache), agent_packages()
    pins = store.pins()
    found = pins and store.find(key(sources(packages), pins))
    return found or _build(progress, store, packages, refresh=False)


def build(progress: Say | None = None, *, cache: Path | None = None, guest: Path | None = None) -> Image:
    """Look the packages up again and build what that gives; at once when the cache has it.

    `guest` is a directory to take `byre_guest` from, in place of the one that is installed.
    """
    return _build(progress, Cache(cache), agent_packages(guest), refresh=True)


def agent_packages(guest: Path | None = None) -> dict[str, Path]:
    """The packages that go into the guest, by name, and the directories of their sources."""
    if guest is None:
        import byre_guest  # noqa: PLC0415  (as data: its directory)

        guest = Path(byre_guest.__path__[0])
    return {"byre_guest": guest, "byre_proto": Path(byre_proto.__path__[0])}


def sources(packages: dict[str, Path]) -> dict[str, str]:
    """Digests of what an image is made from besides packages: this builder, and the agent."""
    agent = hashlib.sha256()
    for name, directory in packages.items():
        agent.update(f"{name} {_digest(directory)}\n".encode())
    return {"builder": _digest(Path(__file__).parent), "agent": agent.hexdigest()}


def _digest(directory: Path) -> str:
    total = hashlib.sha256()
    for path, data in rootfs.python_sources(directory).items():
        total.update(f"{path} {hashlib.sha256(data).hexdigest()}\n".encode())
    return total.hexdigest()


def _build(progress: Say | None, store: Cache, packages: dict[str, Path], *, refresh: bool) -> Image:
    say = progress or (lambda line: None)
    with store.locked(say):
        apt = Apt(store.apt)
        made_from = sources(packages)
        pins = store.pins()
        if not refresh and pins:
            found = store.find(key(made_from, pins))
            if found:  # by the builder that we waited for
                return found
        if refresh or pins is None or not (_base_directory(store, pins).is_dir() or apt.complete(pins)):
            _check_host()
            pins = apt.resolve(say)
            apt.fetch(pins, say)
            store.save_pins(pins)
        found = store.find(key(made_from, pins))
        if found:
            return found
        base = _ensure_base(store, apt, pins, say)
        say("adding the agent")
        final = store.built / key(made_from, pins)
        with store.new(final) as directory:
            _make_image(base, directory, packages, made_from, pins)
        store.prune()
        image = store.find(final.name)
        assert image is not None
        say(f"image {image.digest}")
        return image


def _check_host() -> None:
    if platform.machine() != "x86_64" or not os.path.exists("/usr/bin/apt-get"):
        raise HostNotSupported("images are built on x86-64 hosts of the Debian family", hint=IMPORT_HINT)


def _base_directory(store: Cache, pins: list[Pin]) -> Path:
    return store.base / key({"builder": _digest(Path(__file__).parent)}, pins)


def _ensure_base(store: Cache, apt: Apt, pins: list[Pin], say: Say) -> Path:
    final = _base_directory(store, pins)
    if final.is_dir():
        os.utime(final)
    else:
        with store.new(final) as directory:
            _make_base(directory, apt, pins, say)
    return final


def _make_base(directory: Path, apt: Apt, pins: list[Pin], say: Say) -> None:
    kernels = [pin for pin in pins if KERNEL_PACKAGE.fullmatch(pin.name)]
    if len(kernels) != 1:
        raise BuildFailed(f"one kernel package expected, found {[pin.name for pin in kernels]}")
    say(f"unpacking {kernels[0].name}")
    release = kernels[0].name.removeprefix("linux-image-")
    with tempfile.TemporaryFile(dir=directory) as spool:
        with tools.reading([tools.find("dpkg-deb"), "--fsys-tarfile", apt.file(kernels[0])]) as stream:
            while block := stream.read(1 << 20):
                spool.write(block)
        spool.seek(0)
        chosen, missing, bzimage, copyright_text = _read_kernel(spool, release)
    (directory / KERNEL).write_bytes(kernel.vmlinux(bzimage))
    others = [pin for pin in pins if pin is not kernels[0]]
    tree, licences = rootfs.base(apt, others, release, chosen, say)
    licences[kernels[0].name] = rootfs.licence_names(copyright_text)
    order = modules.load_order(chosen, modules.BOOT)
    (directory / INITRAMFS).write_bytes(initramfs.build(tree.read(rootfs.BUSYBOX), order))
    with (directory / BASE_ROOT).open("wb") as stream:
        tree.write(stream)
    facts = {
        "kernel": release,
        "python": python_version(tree),
        "modules": sorted(chosen),
        "missing_modules": missing,
        "licences": licences,
    }
    (directory / BASE_FACTS).write_text(json.dumps(facts, sort_keys=True))


def _read_kernel(spool: Any, release: str) -> tuple[dict[str, modules.Module], list[str], bytes, bytes]:
    """From the kernel package's tar: the modules we want, those that it lacks, the bzImage, the copyright file."""
    with tarfile.open(fileobj=spool) as archive:
        members = {member.name.removeprefix("./"): member for member in archive if member.isreg()}

        def read(path: str) -> bytes:
            stream = archive.extractfile(members[path])
            assert stream is not None
            return stream.read()

        prefix = next(name for name in (f"lib/modules/{release}/", f"usr/lib/modules/{release}/") if
                      any(path.startswith(name) for path in members))
        paths = [name.removeprefix(prefix) for name in members if name.startswith(prefix) and ".ko" in name]
        builtin = read(prefix + "modules.builtin").decode().split()
        chosen, missing = modules.closure(
            (*modules.BOOT, *modules.GUEST), paths, builtin, lambda path: read(prefix + path)
        )
        return (
            chosen,
            missing,
            read(f"boot/vmlinuz-{release}"),
            read(f"usr/share/doc/linux-image-{release}/copyright"),
        )


def _make_image(
    base: Path, directory: Path, packages: dict[str, Path], made_from: dict[str, str], pins: list[Pin]
) -> None:
    facts = json.loads((base / BASE_FACTS).read_text())
    licences = facts.pop("licences")
    for name in (KERNEL, INITRAMFS):
        os.link(base / name, directory / name)
    tree = Tree()
    with (base / BASE_ROOT).open("rb") as stream:
        tree.merge(stream, lambda path: True)
    for path, data in rootfs.agent_files(tree, packages).items():
        tree.file(path, data)
    tree.link(f"{rootfs.AGENT}/msgpack", "../python3/dist-packages/msgpack")
    packed = io.BytesIO()
    tree.write(packed)
    tools.run(
        [tools.find("tar2sqfs"), "-q", "-c", COMPRESSION, directory / ROOT], stdin=packed.getvalue()
    )
    manifest = {
        "format": FORMAT,
        "architecture": "x86_64",
        **facts,
        "sources": made_from,
        "packages": [{**vars(pin), "licences": licences[pin.name]} for pin in pins],
        "files": {name: digest_of(directory / name) for name in (KERNEL, INITRAMFS, ROOT)},
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
