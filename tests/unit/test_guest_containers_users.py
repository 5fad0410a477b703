"""Users, programs and files of a container's root: looked up inside it, whatever the image has put there."""

from __future__ import annotations

import os
import platform
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from byre_guest import rootfs, users
from byre_proto.errors import ProgramNotExecutable, ProgramNotFound, UserNotFound, WorkingDirectoryNotFound

PASSWD = """\
# a comment
root:x:0:0:root:/root:/bin/sh
web:x:1000:100:web:/srv/web:/bin/sh
4242:x:7:8:a name of digits:/digits:/bin/sh
homeless:x:1001:1001:::
broken:x:one:1:::
short:x:5
"""
GROUP = "root:x:0:\nusers:x:100:\nstaff:x:50:other,web\nwheel:x:10:web\nstaff2:x:51:webmaster\nbad:x:no:web\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text(PASSWD)
    (tmp_path / "etc/group").write_text(GROUP)
    return tmp_path


@pytest.fixture
def fd(root: Path) -> Iterator[int]:
    number = rootfs.open_root(str(root))
    yield number
    os.close(number)


@pytest.mark.behaviour("B14")
@pytest.mark.parametrize(
    ("user", "uid", "gid", "gids", "home"),
    [
        ("", 0, 0, [], "/root"),
        ("root", 0, 0, [], "/root"),
        ("web", 1000, 100, [10, 50], "/srv/web"),
        ("1000", 1000, 100, [10, 50], "/srv/web"),
        ("web:staff", 1000, 50, [], "/srv/web"),
        ("web:77", 1000, 77, [], "/srv/web"),
        ("1234", 1234, 0, [], "/"),
        ("1234:5678", 1234, 5678, [], "/"),
        ("4242", 7, 8, [], "/digits"),
        ("homeless", 1001, 1001, [], "/"),
        ("2147483647", 2147483647, 0, [], "/"),
    ],
)
def test_who_a_user_is(fd: int, user: str, uid: int, gid: int, gids: list[int], home: str) -> None:
    assert users.look_up(fd, user) == {"uid": uid, "gid": gid, "gids": gids, "home": home}


@pytest.mark.behaviour("B14")
@pytest.mark.parametrize(
    "user",
    [
        *(
            "nobody",
            "broken",
            "short",
            "web:nogroup",
            "web:bad",
            "web:",
            ":staff",
            ":",
            "-1",
            "2147483648",
            "٣",
            "1e3",
        )
    ],
)
def test_who_is_nobody_is_named(fd: int, user: str) -> None:
    with pytest.raises(UserNotFound) as caught:
        users.look_up(fd, user)
    assert caught.value.data["user"] == user


@pytest.mark.behaviour("B14", "B47")
def test_hostile_files_neither_hang_nor_lead_outside(root: Path, fd: int) -> None:
    passwd = root / "etc/passwd"
    passwd.unlink()
    os.mkfifo(passwd)
    assert users.look_up(fd, "12:34")["uid"] == 12
    with pytest.raises(UserNotFound):
        users.look_up(fd, "root")
    passwd.unlink()
    passwd.symlink_to("/etc/passwd")  # inside it names itself: a loop, not the host's file
    with pytest.raises(UserNotFound):
        users.look_up(fd, "root")
    passwd.unlink()
    passwd.symlink_to("../../../../../../proc/self/root/etc/passwd")
    with pytest.raises(UserNotFound):
        users.look_up(fd, "root")
    passwd.unlink()
    passwd.write_bytes(b"x" * users.MAX_FILE + b"\nlate:x:1:1::/:\n")
    with pytest.raises(UserNotFound):
        users.look_up(fd, "late")


@pytest.mark.behaviour("B65")
def test_an_absolute_link_is_followed_inside(root: Path, fd: int) -> None:
    (root / "data").write_text("inside")
    (root / "link").symlink_to("/data")
    assert rootfs.read(fd, "/link", 100) == b"inside"
    assert rootfs.read(fd, "link", 3) == b"ins"
    assert rootfs.read(fd, "/etc/../../../data", 100) == b"inside"
    assert rootfs.read(fd, "/etc", 100) == b""
    assert rootfs.status(fd, "/nowhere") is None


@pytest.mark.behaviour("B14")
def test_a_working_directory_is_a_directory_inside(root: Path, fd: int) -> None:
    rootfs.check_directory(fd, "/etc")
    (root / "host").symlink_to("/usr/bin")
    for path in ("/etc/passwd", "/nope", "/host"):
        with pytest.raises(WorkingDirectoryNotFound) as caught:
            rootfs.check_directory(fd, path)
        assert caught.value.data["cwd"] == path


def elf(machine: int, interpreter: bytes = b"") -> bytes:
    """The first bytes of a 64-bit ELF file with at most one program header."""
    count = 1 if interpreter else 0
    header = (
        b"\x7fELF\x02\x01\x01"
        + bytes(9)
        + struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, 0, 64, 0, 0, 64, 56, count, 0, 0, 0)
    )
    if not interpreter:
        return header
    program = struct.pack("<IIQQQQQQ", rootfs.PT_INTERP, 4, 120, 0, 0, len(interpreter) + 1, 0, 1)
    return header + program + interpreter + b"\0"


OURS = rootfs.ELF_MACHINES[platform.machine()][0]
FOREIGN = 243  # RISC-V


def put(root: Path, path: str, content: bytes) -> None:
    file = root / path.lstrip("/")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    file.chmod(0o755)


@pytest.mark.behaviour("B14")
@pytest.mark.parametrize(
    ("content", "error"),
    [
        (elf(OURS), None),
        (elf(OURS, b"/lib/ld.so"), None),
        (b"#!/bin/sh -e\n", None),
        (b"#! /bin/sh", None),
        (elf(OURS, b"/lib/missing.so"), ProgramNotFound),
        (b"#!/no/such\n", ProgramNotFound),
        (elf(FOREIGN), ProgramNotExecutable),
        (b"just text\n", ProgramNotExecutable),
        (b"", ProgramNotExecutable),
        (b"#!\n", ProgramNotFound),
    ],
)
def test_what_the_kernel_would_refuse(root: Path, fd: int, content: bytes, error: type[Exception] | None) -> None:
    put(root, "/bin/sh", elf(OURS))
    put(root, "/lib/ld.so", elf(OURS))
    put(root, "/bin/program", content)
    if error is None:
        assert rootfs.find_program(fd, "program", "/", "/sbin:/bin") == "/bin/program"
        return
    with pytest.raises(error) as caught:
        rootfs.find_program(fd, "program", "/", "/sbin:/bin")
    assert caught.value.data["program"] == "/bin/program"  # type: ignore[attr-defined]


def test_a_hostile_elf_header_costs_nothing(root: Path, fd: int) -> None:
    whole = elf(OURS, b"/lib/ld.so")
    for start in range(0, len(whole), 2):
        put(root, "/bin/program", whole[:start] + b"\xff\xff" + whole[start + 2 :])
        try:
            rootfs.find_program(fd, "/bin/program", "/", "")
        except (ProgramNotFound, ProgramNotExecutable):
            pass


def test_where_a_program_is_looked_for(root: Path, fd: int) -> None:
    put(root, "/a/tool", elf(OURS))
    put(root, "/b/tool", elf(OURS))
    (root / "a/tool").chmod(0o644)
    assert rootfs.find_program(fd, "tool", "/", "/none:/a:/b") == "/b/tool"
    assert rootfs.find_program(fd, "./tool", "/b", "/a") == "/b/./tool"
    assert rootfs.find_program(fd, "tool", "/b", "") == "/b/tool"
    assert rootfs.find_program(fd, "other", "/", "/a:/b") == ""
