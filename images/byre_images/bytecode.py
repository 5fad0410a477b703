"""Compiles Python files with the interpreter that will run them: the guest's own, started through its own loader.

The result depends on the sources and that interpreter alone: no times (PEP 552, unchecked hash: the guest never
looks at a source's date), a fixed hash seed, a fixed order, and the guest's path as the file name.
"""

from __future__ import annotations

import marshal
import tarfile
import tempfile
from pathlib import Path

from . import tools
from .errors import BuildFailed
from .tree import Tree

LIBRARIES = "usr/lib/x86_64-linux-gnu"
LOADER = f"{LIBRARIES}/ld-linux-x86-64.so.2"

#: Reads {path: source} and writes {path of the bytecode: bytecode}, both by marshal.
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


def compile_all(tree: Tree, sources: dict[str, bytes]) -> dict[str, bytes]:
    """Bytecode of `sources` ({path in the guest, without leading slash: text}), by the path where it belongs."""
    version = python_version(tree)
    with tempfile.TemporaryDirectory(prefix="byre-python-") as directory:
        home = Path(directory)
        _extract(tree, home, (f"usr/bin/python{version}", f"usr/lib/python{version}/", f"{LIBRARIES}/"))
        output = tools.run(
            [
                *(home / LOADER, "--library-path", home / LIBRARIES),
                *(home / f"usr/bin/python{version}", "-B", "-S", "-s", "-c", COMPILER),
            ],
            env={"PYTHONHOME": str(home / "usr"), "PYTHONHASHSEED": "0"},
            stdin=marshal.dumps(sources),
        )
    compiled = marshal.loads(output)
    assert isinstance(compiled, dict) and len(compiled) == len(sources)
    return compiled


def _extract(tree: Tree, home: Path, prefixes: tuple[str, ...]) -> None:
    """Write what the interpreter needs below `home`; absolute links are left out."""
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
