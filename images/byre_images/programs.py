"""Runs programs of the packages on the host, through their own loader and libraries, out of a temporary directory.

What the image is made with is thus pinned like what it is made of: the Python that will run the bytecode compiles
it, the busybox that will run names its applets, and tcc is the one of that Debian.
"""

from __future__ import annotations

import marshal
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import tools
from .errors import BuildFailed
from .tree import Tree, merged

LIBRARIES = "usr/lib/x86_64-linux-gnu"
LOADER = f"{LIBRARIES}/ld-linux-x86-64.so.2"
BUSYBOX = "usr/bin/busybox"
INIT_SOURCE = Path(__file__).with_name("init.c")
TCC, TCC_LIBRARY = "usr/bin/tcc", f"{LIBRARIES}/tcc"

#: Reads {path: source} and writes {path of the bytecode: bytecode}, both by marshal.  No times (PEP 552, unchecked
#: hash: the guest never looks at a source's date), a fixed order, and the guest's path as the file name.
COMPILER = """
import importlib.util, marshal, sys
sources, compiled = marshal.load(sys.stdin.buffer), {}
for path in sorted(sources):
    code = compile(sources[path], "/" + path, "exec", dont_inherit=True, optimize=0)
    header = importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little") + importlib.util.source_hash(sources[path])
    compiled[importlib.util.cache_from_source(path)] = header + marshal.dumps(code)
marshal.dump(compiled, sys.stdout.buffer)
"""


def python_version(tree: Tree) -> str:
    """`3.11`, say: which Python the tree's /usr/bin/python3 is."""
    entry = tree.entries.get("usr/bin/python3")
    if entry is None or not entry.link.startswith("python3."):
        raise BuildFailed("the packages have no /usr/bin/python3")
    return entry.link.removeprefix("python")


def bytecode(tree: Tree, sources: dict[str, bytes]) -> dict[str, bytes]:
    """Bytecode of `sources` ({path in the guest, without leading slash: text}), by the path where it belongs, in
    the order of the sources' sorted paths.
    """
    version = python_version(tree)
    with _extracted(tree, f"usr/bin/python{version}", f"usr/lib/python{version}/", f"{LIBRARIES}/") as home:
        output = tools.run(
            [*_through_loader(home, f"usr/bin/python{version}"), "-B", "-S", "-s", "-c", COMPILER],
            env={"PYTHONHOME": str(home / "usr"), "PYTHONHASHSEED": "0"},
            stdin=marshal.dumps(sources),
        )
    compiled = marshal.loads(output)
    assert isinstance(compiled, dict) and len(compiled) == len(sources)
    return compiled


def initramfs_init(tree: Tree) -> bytes:
    """`init.c`, compiled: a static ELF program of a few kilobytes."""
    with _extracted(tree, TCC, f"{LIBRARIES}/") as home:
        program = home / "init"
        options = [f"-B{home / TCC_LIBRARY}", "-Wall", "-Werror", "-nostdlib", "-static"]
        tools.run([*_through_loader(home, TCC), *options, "-o", program, INIT_SOURCE])
        return program.read_bytes()


def busybox_applets(tree: Tree) -> list[str]:
    """Where busybox says that its applets belong, as paths of the tree, sorted."""
    with _extracted(tree, BUSYBOX) as home:
        names = tools.run([home / BUSYBOX, "--list-full"]).decode().split()
    return sorted(merged(name) for name in names)


def _through_loader(home: Path, program: str) -> list[str | Path]:
    return [home / LOADER, "--library-path", home / LIBRARIES, home / program]


@contextmanager
def _extracted(tree: Tree, *prefixes: str) -> Iterator[Path]:
    """The files whose paths begin so, in a temporary directory; bytecode and absolute links are left out."""
    with tempfile.TemporaryDirectory(prefix="byre-programs-") as directory:
        home = Path(directory)
        for path, entry in tree.entries.items():
            if not path.startswith(prefixes) or path.endswith(".pyc"):
                continue
            target = home / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if entry.kind == tarfile.REGTYPE:
                target.write_bytes(entry.data)
                target.chmod(0o700)
            elif entry.kind == tarfile.SYMTYPE and not entry.link.startswith("/"):
                target.symlink_to(entry.link)
        yield home
