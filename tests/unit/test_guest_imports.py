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
    *("errno", "fcntl", "select", "gc", "itertools", "_collections", "_heapq"),  # C, small
    *("struct", "_struct", "zlib"),  # the wire
    *("__future__", "_bootlocale"),
}

#: Named so that a failure says why.
FORBIDDEN = {
    *("ctypes", "resource", "termios", "faulthandler", "collections", "heapq", "asyncio", "subprocess", "logging"),
    *("dataclasses", "typing", "selectors", "socket", "signal", "enum", "re", "json", "pathlib", "tempfile"),
    *("shutil", "hashlib", "hmac", "traceback", "inspect"),
}


#: What containers may load, and the first process may not.
NEEDED_LATER = {"ctypes", "resource", "termios"}

#: Of msgpack the VM's image has less than the host (byre_images.bundle): it is looked at there.
NO_MSGPACK = "sys.modules['msgpack'] = type(sys)('msgpack')"


def loaded(module: str, *flags: str) -> set[str]:
    program = f"{BOOT_PATH}\n{NO_MSGPACK}\nimport {module}\nnames = sorted(sys.modules)\n"
    program += "import json\nprint(json.dumps(names))"
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-E", *flags, "-c", program], capture_output=True, text=True, check=True
    )
    return set(json.loads(result.stdout))


def ours(name: str) -> bool:
    return name.partition(".")[0] in ("byre_guest", "byre_proto")


def test_the_agent_imports_nothing_beyond_its_diet() -> None:
    foreign = {name for name in loaded("byre_guest.__main__") if not ours(name)}
    assert not foreign & FORBIDDEN
    assert foreign - BARE - ALLOWED - {"msgpack"} == set()


def test_containers_and_files_are_not_loaded_before_the_first_one() -> None:
    modules = loaded("byre_guest.__main__")
    assert (
        not {f"byre_guest.{name}" for name in ("containers", "storage", "runtime", "users", "files", "sockets")}
        & modules
    )
    assert "byre_proto.records" not in modules


def test_what_a_line_needs_costs_the_other_channels_nothing() -> None:
    assert not {"byre_guest.serial_line", "byre_proto.line", "byre_proto.stuffing"} & loaded("byre_guest.__main__")
    foreign = {name for name in loaded("byre_guest.serial_line") if not ours(name)}
    assert foreign - BARE - ALLOWED == {"termios", "msgpack"}


@pytest.mark.parametrize("module", ["containers", "storage", "runtime", "users", "stats", "files", "sockets"])
def test_the_parts_for_containers_and_files_keep_the_diet_too(module: str) -> None:
    foreign = {name for name in loaded(f"byre_guest.{module}") if not ours(name)}
    assert not foreign & FORBIDDEN - NEEDED_LATER


def test_the_agent_runs_on_the_oldest_python_that_it_names() -> None:
    """By its grammar; what Python 3.9 has in its library is looked at where that Python is installed."""
    import ast

    for package in ("guest/byre_guest", "bridge_proto/byre_proto"):
        for path in sorted((ROOT / package).rglob("*.py")):
            ast.parse(path.read_text(), filename=str(path), feature_version=(3, 9))
