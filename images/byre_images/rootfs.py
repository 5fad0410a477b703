"""What is in the guest's root file system: the packages without what no guest needs, a few files of our own,
and the agent in /usr/lib/byre.  The base (all but the agent) changes with the packages; the agent with ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from . import bundle, licences, programs, tools
from .kernel import KernelPackage
from .modules import indexes
from .tree import Tree

#: Paths that stay out: documentation, translations, what belongs to maintainer scripts, and charset converters.
LEFT_OUT = re.compile(
    r"boot$|boot/|usr/share/(?!base-passwd/|doc/)|usr/lib/(locale/(?!C\.)|valgrind/|udev/|tmpfiles\.d/|systemd/)"
    r"|usr/lib/x86_64-linux-gnu/(gconv|audit)/|etc/(cron|init\.d|logrotate|profile|update-motd|dpkg|ld\.so)"
    r"|usr/s?bin/(ldconfig|zdump|zic|iconvconfig|pygettext|pydoc|pdb|py3|2to3|update-passwd|catchsegv|sotruss|pldd)"
    r"|usr/bin/(i386-tcc|busybox_|python3-|mtrace|xtrace|tzselect)"
)

#: What is in the tree only while it is made: texts that the manifest quotes, the compiler of the initramfs's init.
ONLY_TO_BUILD = re.compile(r"usr/share/(doc|base-passwd)(/|$)|usr/bin/tcc$|usr/lib/x86_64-linux-gnu/tcc(/|$)")

#: Modules of the standard library that stay out: tests and tools, and extensions whose libraries are not there.
#: Without OpenSSL hashlib and hmac use Python's own code, and load in a fraction of the time.
LEFT_OUT_STDLIB = re.compile(
    r"(test|idlelib|ensurepip|distutils|lib2to3|tkinter|turtledemo|pydoc_data|__phello__|unittest/test)(/|$)"
    r"|(turtle|sitecustomize|antigravity|this)\.py|config-|EXTERNALLY-MANAGED"
    r"|lib-dynload/(_?xx|_test|_ctypes_test|_ssl|_hashlib|_sqlite3|_curses|_dbm|nis|readline|ossaudiodev|_crypt)"
)

#: Links into busybox that would mislead: the agent is init, and nothing here is a package manager.
APPLETS_LEFT_OUT = {
    "init",
    "linuxrc",
    "dpkg",
    "dpkg-deb",
    "rpm",
    "rpm2cpio",
    "busybox",
    "run-init",
    "resume",
    "nuke",
}

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


def base(
    package_files: dict[str, Path], linux: KernelPackage, say: Callable[[str], None]
) -> tuple[Tree, bytes, dict[str, list[str]]]:
    """The tree without the agent, the initramfs's init, each package's licences.

    `package_files` are all packages but the kernel's, by name.
    """
    tree = Tree()
    say(f"unpacking {len(package_files)} packages")
    for _, file in sorted(package_files.items()):
        with tools.reading([tools.find("dpkg-deb"), "--fsys-tarfile", file]) as stream:
            tree.merge(stream, wanted)
    tree.file(f"usr/share/doc/{linux.name}/copyright", linux.copyright)
    package_licences = {name: licences.of_package(tree, name) for name in (*package_files, linux.name)}
    init = programs.initramfs_init(tree)
    furnish(tree)
    for path in [path for path in tree.entries if ONLY_TO_BUILD.match(path)]:
        del tree.entries[path]
    add_applets(tree)
    directory = f"usr/lib/modules/{linux.release}"
    for module in linux.modules.values():
        tree.file(f"{directory}/{module.path}", module.data)
    for name, text in indexes(linux.modules).items():
        tree.file(f"{directory}/{name}", text)
    say("compiling the standard library")
    prefixes = (f"usr/lib/python{programs.python_version(tree)}/", "usr/lib/python3/dist-packages/")
    sources = {
        path: entry.data
        for path, entry in tree.entries.items()
        if path.startswith(prefixes) and path.endswith(".py")
    }
    for path, code in programs.bytecode(tree, sources).items():
        tree.file(path, code)
    return tree, init, package_licences


def wanted(path: str) -> bool:
    """Whether a path of a package goes into the tree (copyright files are dropped once they are read)."""
    if path.startswith("usr/share/doc/"):
        return path.endswith("/copyright") or path.count("/") == 3
    if LEFT_OUT.match(path) or "/__pycache__" in path:
        return False
    stdlib = re.match(r"usr/lib/python3\.\d+/", path)
    return not (stdlib and LEFT_OUT_STDLIB.match(path, stdlib.end()))


def furnish(tree: Tree) -> None:
    """Add the directories, files and links that maintainer scripts would have made."""
    for path, mode in DIRECTORIES.items():
        tree.directory(path, mode)
    for name in ("passwd", "group"):
        master = tree.read(f"usr/share/base-passwd/{name}.master")
        tree.file(f"etc/{name}", master.replace(b"/bin/bash", b"/bin/sh"))
    for path, text in FILES.items():
        tree.file(path, text)
    for path, target in LINKS.items():
        tree.link(path, target)


def add_applets(tree: Tree) -> None:
    """A link to busybox for each program that no package brings, where busybox says that it belongs."""
    for path in programs.busybox_applets(tree):
        if path not in tree.entries and path.rpartition("/")[2] not in APPLETS_LEFT_OUT:
            tree.link(path, "busybox" if path.startswith("usr/bin/") else "../bin/busybox")


def agent_files(tree: Tree, agent: dict[str, bytes]) -> dict[str, bytes]:
    """Everything below /usr/lib/byre, by path in the guest: what runs, and `agent`, its sources, to be read."""
    return {
        **{f"{bundle.AGENT}/{path}": data for path, data in agent.items()},
        bundle.FILE: bundle.build(tree, agent),
    }


def sources_below(directory: Path) -> dict[str, bytes]:
    """The sources below a directory (Python's, and this builder's C), by relative path, sorted."""
    files = sorted(path for path in directory.rglob("*") if path.suffix in (".py", ".c"))
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}
