"""The disk that the outer machine is given: this tree, and all that its tests would otherwise make under emulation.

It is made anew for each run: sources and Python packages with their bytecode, the guest image, the containers'
images and their layers, already converted.
"""

from __future__ import annotations

import compileall
import importlib.metadata
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import byre_images
from byre.oci.layout import open_image
from byre.oci.store import LayerStore, default_root
from byre_images import cache as image_cache
from examples.busybox_image import BUSYBOX
from tests import images

ROOT = Path(__file__).resolve().parents[2]

#: Directories of the source tree that the tests use.
SOURCES = ("host", "guest", "bridge_proto", "images", "tests", "examples", "pyproject.toml", "README.md")
#: The distributions that the tests import; what they require comes with them.
DISTRIBUTIONS = (
    "pytest",
    "pytest-asyncio",
    "pytest-timeout",
    "pytest-xdist",
    "prometheus-client",
    "qemu.qmp",
    "msgpack",
    "pyserial",
)
# Below the disk's root.
TREE, LIBRARIES, CACHE, BUSYBOX_COPY = "tree", "site-packages", "cache", "busybox"


def make_disk(destination: Path) -> None:
    """The disk: a squashfs that is not compressed, since unpacking costs the emulated machine more than reading."""
    with tempfile.TemporaryDirectory(prefix="byre-nested-", dir=destination.parent) as folder:
        top = Path(folder)
        copy_all(top)
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


def copy_all(top: Path) -> None:
    """The tree, the Python packages and the caches, below `top`."""
    _copy_tree(top / TREE)
    _copy_libraries(top / LIBRARIES)
    _copy_caches(top / CACHE / "byre")


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
    for layout in (images.busybox_layout(), images.debian_layout(), images.postgres_layout()):
        shutil.copytree(layout, destination / "test-images" / layout.name)
        with open_image(f"oci:{layout}") as found:
            layers = LayerStore().prepare(found)
        for layer in layers:
            target = destination / "layers" / layer.path.relative_to(store)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(layer.path, target)
    for folder in store.glob("*/chains"):
        shutil.copytree(folder, destination / "layers" / folder.relative_to(store))
