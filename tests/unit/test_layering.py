"""The arrows between the four packages, kept by reading every import, and what the guest may not pay for."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest

ROOT = Path(__file__).parents[2]

#: Package -> where it is, what it may import beside itself and the standard library, what it may take as data only
#: (`import package`, for its directory; nothing out of it).
PACKAGES: dict[str, tuple[str, set[str], set[str]]] = {
    "byre_proto": ("bridge_proto/byre_proto", {"msgpack"}, set()),
    "byre_guest": ("guest/byre_guest", {"byre_proto", "msgpack"}, set()),
    "byre_images": ("images/byre_images", {"byre_proto", "msgpack"}, {"byre_guest"}),
    "byre": (
        "host/byre",
        {"byre_proto", "byre_images", "msgpack", "qemu", "serial", "paramiko", "prometheus_client", "pytest"},
        {"byre_guest"},
    ),
}

#: What costs the guest tenths of a second at each boot under emulation.
EXPENSIVE = {"asyncio", "subprocess", "logging", "dataclasses", "typing"}

FILES = [
    (package, path) for package, (where, *_) in PACKAGES.items() for path in sorted((ROOT / where).rglob("*.py"))
]


def imports(tree: ast.AST) -> Iterator[tuple[str, bool, bool]]:
    """Of each import: the absolute module, whether names are taken out of it, whether it is run at all."""
    checking: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            checking.update(inner for child in node.body for inner in ast.walk(child))
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, "." in alias.name, node not in checking
        elif isinstance(node, ast.ImportFrom) and not node.level:
            assert node.module is not None
            yield node.module, True, node not in checking


def wrong_imports(package: str, source: str) -> list[str]:
    """The modules that this source of `package` may not import."""
    _, allowed, as_data = PACKAGES[package]
    wrong = []
    for module, names, runs in imports(ast.parse(source)):
        top = module.partition(".")[0]
        if top == package or top in allowed or (top in as_data and not names) or (top == "_typeshed" and not runs):
            continue
        if top not in sys.stdlib_module_names or (
            package in ("byre_proto", "byre_guest") and runs and top in EXPENSIVE
        ):
            wrong.append(module)
    return wrong


@pytest.mark.parametrize("package, path", FILES, ids=[str(path.relative_to(ROOT)) for _, path in FILES])
def test_arrows_go_one_way(package: str, path: Path) -> None:
    assert wrong_imports(package, path.read_text()) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_has_files_and_types(package: str) -> None:
    where = ROOT / PACKAGES[package][0]
    assert (where / "__init__.py").exists()
    assert (where / "py.typed").exists()


@pytest.mark.parametrize(
    "package, source",
    [
        ("byre_proto", "import byre_guest"),
        ("byre_proto", "import typing"),
        ("byre_proto", "def f():\n    from logging import handlers"),
        ("byre_guest", "import byre"),
        ("byre_guest", "import host.byre"),
        ("byre_guest", "import subprocess"),
        ("byre_images", "from byre_guest import loop"),
        ("byre_images", "import byre_guest.loop"),
        ("byre_images", "from byre.errors import ToolMissing"),
        ("byre", "from byre_guest.linux import mount"),
        ("byre", "import numpy"),
    ],
)
def test_a_wrong_import_is_found(package: str, source: str) -> None:
    assert wrong_imports(package, source)


@pytest.mark.parametrize("path", [p for package, p in FILES if package in ("byre_proto", "byre_guest")], ids=str)
def test_what_runs_in_the_guest_is_python_3_9(path: Path) -> None:
    ast.parse(path.read_text(), feature_version=(3, 9))


def test_the_imports_of_byre_proto_are_few() -> None:
    """By sys.modules, in a bare interpreter: what it loads beyond msgpack's own, and nothing that is slow."""
    libraries = [str(ROOT / "bridge_proto"), str(Path(msgpack.__file__).parents[1])]
    script = (
        f"import sys; sys.path[:0] = {libraries}; import msgpack; before = set(sys.modules);"
        "import byre_proto.connection, byre_proto.messages; print(*sorted(set(sys.modules) - before));"
        f"print(*sorted({EXPENSIVE | {'re', 'json', 'hashlib', 'hmac', 'socket', 'selectors'}} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, check=True)
    loaded, slow, *_ = run.stdout.split("\n")
    assert {name for name in loaded.split() if not name.startswith("byre_proto")} <= {
        "__future__",
        "struct",
        "_struct",
        "zlib",
    }
    assert slow == ""
