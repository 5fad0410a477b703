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
from collections.abc import Callable
from pathlib import Path

import byre_guest  # as data: for its directory
import byre_proto

from . import initramfs, kernel, modules, programs, rootfs, tools
from .cache import FORMAT, INITRAMFS, KERNEL, MANIFEST, ROOT, Cache, Image, digest_of, key
from .errors import IMPORT_HINT, BuildFailed, HostNotSupported
from .packages import Apt, Pin
from .tree import Tree

#: In a base directory: the tree without the agent, and what there is to say of it.
BASE_ROOT, BASE_FACTS = "root.tar", "facts.json"

#: Block compression of the root disk: lz4 halves it at no cost that a boot shows; zstd costs 0.2 s under emulation.
COMPRESSION = "lz4"

Say = Callable[[str], None]


def ensure(progress: Say | None = None, *, cache: Path | None = None, guest: Path | None = None) -> Image:
    """The image of the sources that run now: from the cache in milliseconds, else built.

    The first build looks the packages up; later ones use the same, until `build` is called.  Arguments as there.
    """
    store, agent = Cache(cache), agent_sources(guest)
    return _find(store, agent) or _build(progress, store, agent, refresh=False)


def current(*, cache: Path | None = None) -> Image | None:
    """What `ensure` would give at once; None where it would have to build."""
    return _find(Cache(cache), agent_sources())


def _find(store: Cache, agent: dict[str, bytes]) -> Image | None:
    pins = store.pins()
    return store.find(key(digests(agent), pins)) if pins else None


def build(progress: Say | None = None, *, cache: Path | None = None, guest: Path | None = None) -> Image:
    """Look the packages up again and build what that gives; at once when the cache has it.

    `progress` is called with one line of text a step; `cache` is a directory in place of the user's cache; `guest`
    is a directory to take `byre_guest` from in place of the one that is installed.
    """
    return _build(progress, Cache(cache), agent_sources(guest), refresh=True)


def agent_sources(guest: Path | None = None) -> dict[str, bytes]:
    """The sources of the guest's side, by path below /usr/lib/byre.

    They are read once, so that what is built is what the key says, whoever edits them meanwhile.
    """
    packages = {
        "byre_guest": guest or Path(byre_guest.__path__[0]),
        "byre_proto": Path(byre_proto.__path__[0]),
    }
    return {
        f"{name}/{path}": data
        for name, directory in packages.items()
        for path, data in rootfs.sources_below(directory).items()
    }


def digests(agent: dict[str, bytes]) -> dict[str, str]:
    """Of what an image is made from besides packages: this builder, and the agent."""
    return {**_builder(), "agent": _digest(agent)}


def _builder() -> dict[str, str]:
    return {"builder": _digest(rootfs.sources_below(Path(__file__).parent))}


def _digest(files: dict[str, bytes]) -> str:
    total = hashlib.sha256()
    for path, data in files.items():
        total.update(f"{path} {hashlib.sha256(data).hexdigest()}\n".encode())
    return total.hexdigest()


def _build(progress: Say | None, store: Cache, agent: dict[str, bytes], *, refresh: bool) -> Image:
    say = progress or (lambda line: None)
    with store.locked(say):
        apt = Apt(store.apt)
        made_from = digests(agent)
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
            _make_image(base, directory, agent, made_from, pins)
        store.prune()
        image = store.find(final.name)
        assert image is not None
        say(f"image {image.digest}")
        return image


def _check_host() -> None:
    if platform.machine() != "x86_64" or not os.path.exists("/usr/bin/apt-get"):
        raise HostNotSupported("images are built on x86-64 hosts of the Debian family", hint=IMPORT_HINT)


def _base_directory(store: Cache, pins: list[Pin]) -> Path:
    return store.base / key(_builder(), pins)


def _ensure_base(store: Cache, apt: Apt, pins: list[Pin], say: Say) -> Path:
    final = _base_directory(store, pins)
    if final.is_dir():
        os.utime(final)
    else:
        with store.new(final) as directory:
            _make_base(directory, apt, pins, say)
    return final


def _make_base(directory: Path, apt: Apt, pins: list[Pin], say: Say) -> None:
    files = {pin.name: apt.file(pin) for pin in pins}
    kernels = [name for name in files if kernel.PACKAGE_NAME.fullmatch(name)]
    if len(kernels) != 1:
        raise BuildFailed(f"one kernel package expected, found {kernels}")
    say(f"unpacking {kernels[0]}")
    linux = kernel.read_package(kernels[0], files.pop(kernels[0]))
    (directory / KERNEL).write_bytes(linux.vmlinux)
    tree, init, licences = rootfs.base(files, linux, say)
    order = modules.load_order(linux.modules, modules.BOOT)
    (directory / INITRAMFS).write_bytes(initramfs.build(init, order))
    with (directory / BASE_ROOT).open("wb") as stream:
        tree.write(stream)
    facts = {
        "kernel": linux.release,
        "python": programs.python_version(tree),
        "modules": sorted(linux.modules),
        "missing_modules": linux.missing,
        "licences": licences,
    }
    (directory / BASE_FACTS).write_text(json.dumps(facts, sort_keys=True))


def _make_image(
    base: Path, directory: Path, agent: dict[str, bytes], made_from: dict[str, str], pins: list[Pin]
) -> None:
    facts = json.loads((base / BASE_FACTS).read_text())
    licences = facts.pop("licences")
    for name in (KERNEL, INITRAMFS):
        os.link(base / name, directory / name)
    tree = Tree()
    with (base / BASE_ROOT).open("rb") as stream:
        tree.merge(stream, lambda path: True)
    for path, data in rootfs.agent_files(tree, agent).items():
        tree.file(path, data)
    packed = io.BytesIO()
    tree.write(packed)
    tools.run([tools.find("tar2sqfs"), "-q", "-s", "-c", COMPRESSION, directory / ROOT], stdin=packed.getvalue())
    manifest = {
        "format": FORMAT,
        "architecture": "x86_64",
        **facts,
        "sources": made_from,
        "packages": [{**vars(pin), "licences": licences[pin.name]} for pin in pins],
        "files": {name: digest_of(directory / name) for name in (KERNEL, INITRAMFS, ROOT)},
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
