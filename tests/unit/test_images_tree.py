"""Merging packages and writing the results: one normal form, whatever order things come in."""

from __future__ import annotations

import io
import random
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest

from byre_images import initramfs, licences, rootfs, tools
from byre_images.errors import BuildFailed
from byre_images.modules import Module
from byre_images.tree import Tree, merged


def package(*members: tuple[str, bytes, bytes | str, int]) -> io.BytesIO:
    """A tar of (name, type, data or link target, mode), as dpkg-deb writes it."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, kind, content, mode in members:
            member = tarfile.TarInfo(name)
            member.type, member.mode, member.mtime = kind, mode, 1234567890
            member.uname = "builder"
            if isinstance(content, str):
                member.linkname = content
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    stream.seek(0)
    return stream


REG, DIR, SYM, LNK, CHR = tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("./bin/sh", "usr/bin/sh"),
        ("./lib64/ld.so", "usr/lib64/ld.so"),
        ("./bin/", "bin"),
        ("./", ""),
        ("./libexec/x", "libexec/x"),
        ("usr//lib/./x", "usr/lib/x"),
    ],
)
def test_paths_have_one_normal_form(name: str, path: str) -> None:
    assert merged(name) == path


def test_packages_are_merged_into_usr() -> None:
    tree = Tree()
    tree.merge(
        package(
            ("./bin/", DIR, b"", 0o755),
            ("./bin/tool", REG, b"tool", 0o4755),
            ("./usr/bin/same", LNK, "./bin/tool", 0o755),
            ("./lib/link", SYM, "/etc/target", 0o777),
            ("./usr/share/man/x", REG, b"dropped", 0o644),
        ),
        lambda path: "/man/" not in path,
    )
    assert tree.entries["usr/bin/tool"].mode == 0o4755
    assert tree.entries["usr/bin/same"].data == b"tool"
    assert tree.entries["usr/lib/link"].link == "/etc/target"
    assert tree.entries["bin"].link == "usr/bin"
    assert not any("man" in path for path in tree.entries)


@pytest.mark.parametrize("member", [("./../etc/x", REG, b"", 0o644), ("./dev/x", CHR, b"", 0o644)])
def test_what_no_package_may_hold_is_refused(member: tuple[str, bytes, bytes, int]) -> None:
    with pytest.raises(BuildFailed):
        Tree().merge(package(member), lambda path: True)


def written(paths: list[str]) -> bytes:
    tree = Tree()
    for path in paths:
        tree.file(path, path)
    stream = io.BytesIO()
    tree.write(stream)
    return stream.getvalue()


def test_the_order_of_additions_does_not_show() -> None:
    paths = [f"usr/{a}/{b}" for a in "abc" for b in ("x", "x-y", "x.d/z", "é")]
    shuffled = paths[:]
    random.Random(1).shuffle(shuffled)
    assert shuffled != paths
    assert written(paths) == written(shuffled)
    with tarfile.open(fileobj=io.BytesIO(written(paths))) as archive:
        members = archive.getmembers()
    seen: set[str] = set()
    for member in members:
        assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")
        parent = member.name.rpartition("/")[0]
        assert not parent or parent in seen, f"{member.name} comes before its parent"
        seen.add(member.name)


def test_tar2sqfs_takes_the_tree(tmp_path: Path) -> None:
    tools.run([tools.find("tar2sqfs"), "-q", "-s", tmp_path / "a"], stdin=written(["etc/x", "usr/bin/y"]))
    assert (tmp_path / "a").read_bytes().startswith(b"hsqs")


def test_the_initramfs_is_a_cpio_that_others_read(tmp_path: Path) -> None:
    order = [Module("kernel/a/first.ko", b"one"), Module("kernel/b/second.ko", b"three")]
    data = initramfs.build(b"#init", order)
    assert data == initramfs.build(b"#init", order)
    listed = subprocess.run(["busybox", "cpio", "-itv"], input=data, capture_output=True, check=True).stdout
    lines = [line.split() for line in listed.decode().splitlines()]
    modes = {fields[-1]: fields[0] for fields in lines}
    assert modes["init"] == "-rwxr-xr-x"
    assert modes["dev/console"] == "crw-------"
    unpacked = tmp_path / "x"
    unpacked.mkdir()
    subprocess.run(
        ["busybox", "cpio", "-id", "init", "modules/*"], input=data, cwd=unpacked, capture_output=True, check=True
    )
    assert (unpacked / "modules/order").read_text() == "first.ko\nsecond.ko\n"
    assert (unpacked / "modules/second.ko").read_bytes() == b"three"
    assert stat.S_IMODE((unpacked / "init").stat().st_mode) & 0o100


def test_an_initramfs_that_init_could_not_read_is_refused() -> None:
    with pytest.raises(BuildFailed, match="too many modules"):
        initramfs.build(b"", [Module(f"kernel/{'x' * 60}{i}.ko", b"") for i in range(100)])


@pytest.mark.parametrize(
    ("path", "kept"),
    [
        ("usr/share/doc/crun/copyright", True),
        ("usr/share/doc/crun/changelog.gz", False),
        ("usr/share/man/man1/crun.1.gz", False),
        ("usr/lib/locale/C.utf8/LC_CTYPE", True),
        ("usr/lib/python3.11/ctypes/__init__.py", True),
        ("usr/lib/python3.11/test/support/__init__.py", False),
        ("usr/lib/python3.13/lib-dynload/_ssl.cpython-313-x86_64-linux-gnu.so", False),
        ("usr/lib/python3.11/lib-dynload/_ctypes.cpython-311-x86_64-linux-gnu.so", True),
        ("usr/lib/python3/dist-packages/msgpack/__init__.py", True),
    ],
)
def test_what_goes_into_the_root_file_system(path: str, kept: bool) -> None:
    assert rootfs.wanted(path) is kept


def test_licences_are_named_from_either_form_of_copyright_file() -> None:
    tree = Tree()
    tree.file(
        "usr/share/doc/a/copyright",
        "Format: x\nLicense: GPL-2+ or MIT\n text\nLicense: Permission is granted to you\nLicense: ISC\n",
    )
    tree.file("usr/share/doc/b/copyright", "see /usr/share/common-licenses/LGPL-2.1.\n")
    tree.link("usr/share/doc/c", "a")
    tree.file("usr/share/doc/d/copyright", "under the GNU Lesser General Public\nLicense, version 2.1")
    assert licences.of_package(tree, "a") == ["GPL-2+ or MIT", "ISC"]
    assert licences.of_package(tree, "b") == ["LGPL-2.1"]
    assert licences.of_package(tree, "c") == licences.of_package(tree, "a")
    assert licences.of_package(tree, "d") == ["LGPL"]
    assert licences.of_package(tree, "e") == []
