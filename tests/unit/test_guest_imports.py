"""What the agent imports: each module costs every boot, under emulation tens of milliseconds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from .agent_client import BOOT_PATH, ROOT

#: What `python3 -I -S -E` has loaded anyway, Debian 12's.
BARE = {
    *("__main__", "_abc", "_codecs", "_frozen_importlib", "_frozen_importlib_external", "_imp", "_io", "_signal"),
    *("_thread", "_warnings", "_weakref", "abc", "builtins", "codecs", "encodings", "encodings.aliases"),
    *("encodings.utf_8", "io", "marshal", "posix", "sys", "time", "zipimport"),
}

#: What the agent may load besides, each with its reason.
ALLOWED = {
    *("os", "os.path", "posixpath", "genericpath", "stat", "_stat", "_collections_abc"),
    *("errno", "fcntl", "termios", "resource", "select", "faulthandler", "gc"),  # C, small
    *("heapq", "_heapq"),  # timers
    *("struct", "_struct", "zlib"),  # the wire
    *("ctypes", "_ctypes", "ctypes._endian", "types"),  # system calls
    *("collections", "_collections", "itertools", "keyword", "operator", "_operator", "reprlib"),  # deque
    *("_functools", "functools"),  # of collections and reprlib
    *("msgpack", "msgpack._version", "msgpack.exceptions", "msgpack.ext", "msgpack._cmsgpack"),
    *("datetime", "_datetime", "math", "cython_runtime"),  # of msgpack
    *("__future__", "_bootlocale"),
}

#: Named so that a failure says why.
FORBIDDEN = {"asyncio", "subprocess", "logging", "dataclasses", "typing", "selectors", "socket", "signal", "enum",
             "re", "json", "pathlib", "tempfile", "shutil", "hashlib", "hmac", "traceback", "inspect"}  # fmt: skip


def loaded(module: str, *flags: str) -> set[str]:
    program = f"{BOOT_PATH}\nimport {module}\nnames = sorted(sys.modules)\nimport json\nprint(json.dumps(names))"
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-E", *flags, "-c", program], capture_output=True, text=True, check=True
    )
    return set(json.loads(result.stdout))


def ours(name: str) -> bool:
    return name.partition(".")[0] in ("byre_guest", "byre_proto")


def test_the_agent_imports_nothing_beyond_its_diet() -> None:
    foreign = {name for name in loaded("byre_guest.__main__") if not ours(name)}
    assert not foreign & FORBIDDEN
    foreign = {name for name in foreign if not name.startswith("_cython_")}  # of msgpack, named by Cython's version
    assert foreign - BARE - ALLOWED == set()


def test_containers_are_not_loaded_before_the_first_one() -> None:
    modules = loaded("byre_guest.__main__")
    assert not {f"byre_guest.{name}" for name in ("containers", "storage", "runtime", "users")} & modules


@pytest.mark.parametrize("module", ["containers", "storage", "runtime", "users", "stats"])
def test_the_parts_for_containers_keep_the_diet_too(module: str) -> None:
    foreign = {name for name in loaded(f"byre_guest.{module}") if not ours(name)}
    assert not foreign & FORBIDDEN


def test_the_agent_runs_on_the_oldest_python_that_it_names() -> None:
    """By its grammar; what Python 3.9 has in its library is looked at where that Python is installed."""
    import ast

    for package in ("guest/byre_guest", "bridge_proto/byre_proto"):
        for path in sorted((ROOT / package).rglob("*.py")):
            ast.parse(path.read_text(), filename=str(path), feature_version=(3, 9))
