"""What the outer machine is given: a Debian with QEMU as an image, and a disk with this tree and its caches.

    image   from Debian packages, made once, in the cache of test images
    disk    made anew for each run: the source tree, the Python packages of this environment, the guest image, the
            containers' images and their layers, already converted; so nothing is built or compiled under emulation

Rule: the disk has everything at the path that it has here, so that compiled Python is good there too.
"""

from __future__ import annotations

import compileall
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import byre_images
from byre.oci.layout import open_image
from byre.oci.store import LayerStore, default_root
from byre_images import cache as image_cache
from examples.busybox_image import BUSYBOX, write_layout

from .. import images

ROOT = Path(__file__).resolve().parents[2]

SUITE = "bookworm"
#: What byre needs of a host (as the Makefile has it), and kmod for modprobe.
PACKAGES = (
    *("python3", "qemu-system-x86", "squashfs-tools-ng", "golang-github-containers-common"),
    *("util-linux", "kmod", "zstd", "procps"),
)
#: Directories of the source tree that the tests use.
SOURCES = ("host", "guest", "bridge_proto", "images", "tests", "examples", "pyproject.toml", "README.md")
#: The distributions that the tests import; what they require comes with them.
DISTRIBUTIONS = ("pytest", "pytest-asyncio", "pytest-timeout", "qemu.qmp", "msgpack")
#: Seconds for the packages to be fetched and unpacked.
TIMEOUT = 1800

# Below the disk's root.
TREE, LIBRARIES, CACHE, BUSYBOX_COPY = "tree", "site-packages", "cache", "busybox"


def system_image() -> Path:
    """The layout of the Debian with QEMU; made first where the cache does not have it."""
    return images._made("nested", _make_system, Path(__file__))


def _make_system(destination: Path) -> Path:
    with tempfile.TemporaryDirectory(prefix="byre-nested-") as folder:
        tar = Path(folder) / "system.tar"
        Path(folder).chmod(0o777)  # mmdebstrap writes as another user of its namespace
        command = [
            *("mmdebstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}"),
            *('--aptopt=Acquire::Languages "none"', '--aptopt=APT::Install-Recommends "false"'),
            *(f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "locale", "man")),
            *("--dpkgopt=force-unsafe-io", SUITE, str(tar)),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
        if done.returncode != 0:
            raise RuntimeError(f"mmdebstrap failed with status {done.returncode}:\n{done.stderr[-2000:]}")
        return write_layout(destination, [tar.read_bytes()], {"Cmd": ["bash"]}, compress=False)


def make_disk(destination: Path) -> None:
    """The disk: a squashfs that is not compressed, since unpacking costs the emulated machine more than reading."""
    with tempfile.TemporaryDirectory(prefix="byre-nested-", dir=destination.parent) as folder:
        top = Path(folder)
        _copy_tree(top / TREE)
        _copy_libraries(top / LIBRARIES)
        _copy_caches(top / CACHE / "byre")
        shutil.copy2(BUSYBOX, top / BUSYBOX_COPY)
        command = [
            "mksquashfs",
            str(top),
            str(destination),
            "-all-root",
            "-no-progress",
            "-noI",
            "-noD",
            "-noF",
            "-noX",
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _copy_tree(destination: Path) -> None:
    """The sources as they are now, compiled; also what pytest has compiled, which is what takes longest."""
    for name in SOURCES:
        source, target = ROOT / name, destination / name
        if source.is_dir():
            shutil.copytree(source, target, symlinks=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    _compile(destination, ROOT)


def _copy_libraries(destination: Path) -> None:
    for distribution in _closure(DISTRIBUTIONS):
        for file in distribution.files or ():
            if ".." in file.parts:
                continue  # a command in bin/
            source, target = Path(str(file.locate())), destination / file
            if source.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)
    _compile(destination, destination)


def _closure(names: tuple[str, ...]) -> Iterator[importlib.metadata.Distribution]:
    """These distributions and what they require here, each once."""
    waiting, seen = list(names), set()
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for another Python or an extra
        yield distribution
        for line in distribution.requires or ():
            requirement, _, marker = line.partition(";")
            if "extra" not in marker:
                waiting.append(re.match(r"[\w.-]+", requirement).group())  # type: ignore[union-attr]


def _compile(directory: Path, shown: Path) -> None:
    """Bytecode of all that has none; good for the same minor version, which Debian's is as a rule."""
    compileall.compile_dir(directory, quiet=2, stripdir=str(directory), prependdir=str(shown), workers=0)


def _copy_caches(destination: Path) -> None:
    image = byre_images.ensure()
    built = destination / "images"
    shutil.copytree(image.directory, built / "built" / image.directory.name)
    shutil.copy2(image_cache.Cache().pins_file, built / "pins.json")
    store = default_root()
    for layout in (images.busybox_layout(), images.debian_layout()):
        shutil.copytree(layout, destination / "test-images" / layout.name)
        with open_image(f"oci:{layout}") as found:
            layers = LayerStore().prepare(found)
        for layer in layers:
            target = destination / "layers" / layer.path.relative_to(store)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(layer.path, target)
    for folder in store.glob("*/chains"):
        shutil.copytree(folder, destination / "layers" / folder.relative_to(store))


if __name__ == "__main__":
    print(system_image())
    make_disk(Path(sys.argv[1]))
