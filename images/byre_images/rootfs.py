"""What is in the guest's root file system: the packages without what no guest needs, a few files of our own,
and the agent in /usr/lib/byre.  The base (all but the agent) changes with the packages; the agent with ours.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from . import tools
from .bytecode import compile_all, python_version
from .modules import Module, indexes
from .packages import Apt, Pin
from .tree import Tree, merged

#: Paths that stay out: documentation, translations, what belongs to maintainer scripts, and charset converters.
LEFT_OUT = re.compile(
    r"boot/|usr/share/(?!base-passwd/|doc/)|usr/lib/(locale/(?!C\.)|valgrind/|udev/|tmpfiles\.d/|systemd/)"
    r"|usr/lib/x86_64-linux-gnu/(gconv|audit)/|etc/(cron|init\.d|logrotate|profile|update-motd|dpkg|ld\.so)"
    r"|usr/s?bin/(ldconfig|zdump|zic|iconvconfig|pygettext|pydoc|pdb|py3|2to3|update-passwd|catchsegv|sotruss|pldd)"
    r"|usr/bin/(busybox_|python3-|mtrace|xtrace|tzselect)"
)

#: Modules of the standard library that stay out: tests and tools, and extensions whose libraries are not there.
#: Without OpenSSL hashlib and hmac use Python's own code, and load in a fraction of the time.
LEFT_OUT_STDLIB = re.compile(
    r"(test|idlelib|ensurepip|distutils|lib2to3|tkinter|turtledemo|pydoc_data|__phello__|unittest/test)(/|$)"
    r"|(turtle|sitecustomize|antigravity|this)\.py|config-|EXTERNALLY-MANAGED"
    r"|lib-dynload/(_?xx|_test|_ctypes_test|_ssl|_hashlib|_sqlite3|_curses|_dbm|nis|readline|ossaudiodev|_crypt)"
)

#: Links into busybox that would mislead: the agent is init, and nothing here is a package manager.
APPLETS_LEFT_OUT = {"init", "linuxrc", "dpkg", "dpkg-deb", "rpm", "rpm2cpio", "busybox", "run-init", "resume"}

#: Mount points and places that programs expect, with their modes; `l` is short because overlay layers are
#: mounted below it and mount(2) takes 4 KiB of options.
DIRECTORIES = {
    **dict.fromkeys(("dev", "proc", "sys", "run", "l", "mnt", "home", "etc", "var/lib", "var/log", "opt"), 0o755),
    **dict.fromkeys(("tmp", "var/tmp"), 0o1777),
    "root": 0o700,
}

FILES = {
    "etc/hostname": "byre\n",
    "etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\n",
    "etc/shells": "/bin/sh\n",
    "etc/profile": "export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n",
}

#: What changes with each VM lies in /run.
LINKS = {
    "etc/mtab": "../proc/self/mounts",
    "etc/resolv.conf": "../run/resolv.conf",
    "etc/machine-id": "../run/machine-id",
    "var/run": "../run",
}

BUSYBOX = "usr/bin/busybox"
AGENT = "usr/lib/byre"
INIT = """\
import sys

sys.path.insert(0, "/usr/lib/byre")
from byre_guest.__main__ import main

main()
"""

#: `License: NAME` of the machine-readable format, or a file that an older text points to.
LICENCE = re.compile(r"^License: *(\S.*)$|/usr/share/common-licenses/([A-Za-z][\w.+-]*\w)", re.MULTILINE)


def base(
    apt: Apt, pins: list[Pin], release: str, modules: dict[str, Module], say: Callable[[str], None]
) -> tuple[Tree, dict[str, list[str]]]:
    """The tree without the agent, and each package's licences.  `pins` are all packages but the kernel."""
    tree = Tree()
    for pin in sorted(pins):
        say(f"unpacking {pin.name}")
        with tools.reading([tools.find("dpkg-deb"), "--fsys-tarfile", apt.file(pin)]) as stream:
            tree.merge(stream, wanted)
    licences = {pin.name: licences_of(tree, pin.name) for pin in pins}
    for path in [path for path in tree.entries if path == "usr/share/doc" or path.startswith("usr/share/doc/")]:
        del tree.entries[path]
    furnish(tree)
    add_applets(tree)
    for module in modules.values():
        tree.file(f"usr/lib/modules/{release}/{module.path}", module.data)
    for name, text in indexes(modules).items():
        tree.file(f"usr/lib/modules/{release}/{name}", text)
    say("compiling the standard library")
    prefixes = (f"usr/lib/python{python_version(tree)}/", "usr/lib/python3/dist-packages/")
    sources = {
        path: entry.data
        for path, entry in tree.entries.items()
        if path.startswith(prefixes) and path.endswith(".py")
    }
    for path, code in compile_all(tree, sources).items():
        tree.file(path, code)
    return tree, licences


def wanted(path: str) -> bool:
    """Whether a path of a package goes into the tree (copyright files are dropped once they are read)."""
    if path.startswith("usr/share/doc/"):
        return path.endswith("/copyright") or path.count("/") == 3
    if LEFT_OUT.match(path) or "/__pycache__" in path:
        return False
    stdlib = re.match(r"usr/lib/python3\.\d+/", path)
    return not (stdlib and LEFT_OUT_STDLIB.match(path, stdlib.end()))


def licences_of(tree: Tree, package: str) -> list[str]:
    """Names of the licences in a package's copyright file; some packages share another's by a link."""
    entry = tree.entries.get(f"usr/share/doc/{package}")
    owner = entry.link.rpartition("/")[2] if entry is not None and entry.link else package
    copyright_file = tree.entries.get(f"usr/share/doc/{owner}/copyright")
    if copyright_file is None or not copyright_file.data:
        return []
    return licence_names(copyright_file.data)


def licence_names(copyright_text: bytes) -> list[str]:
    """Names of the licences in a copyright file, sorted."""
    found = LICENCE.findall(copyright_text.decode(errors="replace"))
    return sorted({(stated or pointed).strip() for stated, pointed in found})


def furnish(tree: Tree) -> None:
    """Add the directories, files and links that maintainer scripts would have made."""
    for path, mode in DIRECTORIES.items():
        tree.directory(path, mode)
    for name in ("passwd", "group"):
        tree.file(f"etc/{name}", tree.read(f"usr/share/base-passwd/{name}.master"))
    for path, text in FILES.items():
        tree.file(path, text)
    for path, target in LINKS.items():
        tree.link(path, target)


def add_applets(tree: Tree) -> None:
    """A link to busybox for each program that no package brings, where busybox says that it belongs."""
    with tempfile.TemporaryDirectory(prefix="byre-busybox-") as directory:
        program = Path(directory) / "busybox"
        program.write_bytes(tree.read(BUSYBOX))
        program.chmod(0o700)
        names = tools.run([program, "--list-full"]).decode().split()
    for path in sorted(merged(name) for name in names):
        if path not in tree.entries and path.rpartition("/")[2] not in APPLETS_LEFT_OUT:
            tree.link(path, "busybox" if path.startswith("usr/bin/") else "../bin/busybox")


def agent_files(tree: Tree, packages: Mapping[str, Path]) -> dict[str, bytes]:
    """Everything below /usr/lib/byre, by path: `packages` ({name: directory of sources}), init.py, bytecode."""
    sources = {f"{AGENT}/init.py": INIT.encode()}
    for name, directory in packages.items():
        for path, data in python_sources(directory).items():
            sources[f"{AGENT}/{name}/{path}"] = data
    return {**sources, **compile_all(tree, sources)}


def python_sources(directory: Path) -> dict[str, bytes]:
    """The Python files below a directory, by relative path, sorted."""
    files = sorted(path for path in directory.rglob("*.py"))
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}
