"""Copies on the host's side: where they go, what a hostile guest may not make here, tars both ways."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from byre.errors import (
    ByreError,
    FileFailed,
    PathIsDirectory,
    PathNotDirectory,
    PathNotFound,
    PathRefused,
    ResourceExhausted,
)
from byre.file_operation import FileStatus
from byre.transfer.packing import Packer
from byre.transfer.rules import Place, Source, place
from byre.transfer.tar import TarWriter, records_of
from byre.transfer.unpacking import LocalUnpacker, leads_out
from byre_proto import records


def entry(name: str, kind: str = "file", size: int = 0, target: str = "", **fields: Any) -> FileStatus:
    return FileStatus(
        name, kind, **{"mode": 0o755, "uid": 0, "gid": 0, "mtime_ns": 5, **fields}, size=size, target=target
    )


def decoded(pieces: Any) -> list[Any]:
    decoder, found = records.Decoder(), []
    for piece in pieces:
        decoder.feed(piece)
        while (one := decoder.take()) is not None:
            found.append(one if isinstance(one, bytes) else FileStatus.of_record([*one]) if one[4] >= 0 else one)
    return found


# -- where a copy goes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "is_directory", "destination", "found", "expected"),
    [
        ("/a/f", False, "/d/x", "", Place("/d", "x")),
        ("/a/f", False, "/d/x", "file", Place("/d", "x")),
        ("/a/f", False, "/d", "dir", Place("/d", "f")),
        ("/a/f", False, "/d/", "dir", Place("/d/", "f")),
        ("/a/f", False, "/d/", "", PathNotFound),
        ("/a/f", False, "/d/x/", "file", PathNotDirectory),
        ("/a/d", True, "/new", "", Place("/", "new")),
        ("/a/d/", True, "/new/", "", Place("/", "new")),
        ("/a/d", True, "/f", "file", PathNotDirectory),
        ("/a/d", True, "/there", "dir", Place("/there", "d")),
        ("/a/d/", True, "/there", "dir", Place("/there", "d")),
        ("/a/d/.", True, "/there", "dir", Place("/there", ".")),
        ("/a/d/.", True, "/new", "", Place("/", "new")),
        ("/", True, "/there", "dir", Place("/there", ".")),
        ("/a/d/..", True, "/there", "dir", Place("/there", "a")),
        ("/a/f", False, "x", "", Place(".", "x")),
        ("/a/f", False, "/d/..", "", PathNotFound),
    ],
)
def test_where_a_copy_goes(source: str, is_directory: bool, destination: str, found: str, expected: Any) -> None:
    if isinstance(expected, Place):
        assert place(Source.of(source), is_directory, destination, found) == expected
    else:
        with pytest.raises(expected):
            place(Source.of(source), is_directory, destination, found)


# -- what a guest may not make here ------------------------------------------------------------------------


def unpack(directory: Path, *found: FileStatus | bytes, archive: bool = False, **limits: int) -> LocalUnpacker:
    unpacker = LocalUnpacker(str(directory), archive=archive, **limits)
    try:
        for one in found:
            unpacker.take(one)
        unpacker.finish()
    finally:
        unpacker.close()
    return unpacker


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A directory with something beside it that must stay as it is."""
    (tmp_path / "secret").write_text("outside")
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


def untouched(here: Path) -> bool:
    beside = here.parent
    return (beside / "secret").read_text() == "outside" and sorted(os.listdir(beside)) == ["here", "secret"]


@pytest.mark.behaviour("B65")
@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize(
    "name", ["../x", "/tmp/x", "a/../../x", "..", "a//b", "a/./b", "./a", "", "a/", "x" * 256, "y/" * 3000 + "y"],
    ids=lambda name: ascii(name[:20]),
)  # fmt: skip
def test_names_that_are_not_plainly_below_are_refused(here: Path, name: str, archive: bool) -> None:
    with pytest.raises(PathRefused):
        unpack(here, entry(name), archive=archive)
    assert untouched(here) and os.listdir(here) == []


@pytest.mark.behaviour("B65")
@pytest.mark.parametrize("target", ["..", "../secret", "/", "here/../../secret"])
def test_nothing_is_written_through_a_link_that_the_guest_made(here: Path, target: str) -> None:
    with pytest.raises(PathNotDirectory):
        unpack(here, entry("l", "symlink", target=target), entry("l/x", size=1), b"y", archive=True)
    assert untouched(here)
    unpack(here, entry("l", "symlink", target="../secret"), entry("l", size=1), b"y", archive=True)
    assert untouched(here) and (here / "l").read_text() == "y", "the link was replaced"


@pytest.mark.behaviour("B65")
def test_nothing_is_written_through_a_link_that_was_there(here: Path) -> None:
    (here / "l").symlink_to("..")
    for found in (entry("l/x", size=1), entry("l", "dir")):
        with pytest.raises(PathNotDirectory, match="link"):
            unpack(here, found, b"y")
    assert untouched(here)


@pytest.mark.behaviour("B65")
def test_hard_links_are_to_files_of_the_copy(here: Path) -> None:
    for target in ("../secret", "/etc/passwd", "a/../../secret"):
        with pytest.raises(PathRefused):
            unpack(here, entry("x", "link", target=target), archive=True)
    with pytest.raises(PathRefused, match="no file"):  # moved up, it would lead out
        unpack(
            here,
            entry("d", "dir"),
            entry("d/l", "symlink", target="../f"),
            entry("l", "link", target="d/l"),
        )
    (here / "up").symlink_to("..")
    with pytest.raises(OSError):
        unpack(here, entry("x", "link", target="up/secret"))
    unpack(here, entry("f", size=1), b"y", entry("g", "link", target="f"))
    assert (here / "f").samefile(here / "g")


@pytest.mark.behaviour("B65")
@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize("kind", ["fifo", "char", "block", "socket"])
def test_devices_and_the_like_are_refused_by_name(here: Path, kind: str, archive: bool) -> None:
    device = {"device": (1, 3)} if kind in ("char", "block") else {}
    with pytest.raises(PathRefused, match=f"'a/thing': a {kind}"):
        unpack(here, entry("a", "dir"), entry("a/thing", kind, **device), archive=archive)
    assert os.listdir(here / "a") == []


@pytest.mark.parametrize(
    ("target", "depth", "out"),
    [
        ("f", 0, False),
        ("./f", 0, False),
        ("d/f", 3, False),
        ("../f", 1, False),
        ("../f", 0, True),
        ("../../f", 1, True),
        ("/etc/passwd", 5, True),
        ("d/../f", 5, True),
        (".././../f", 1, True),
        ("..", 1, False),
        ("", 1, True),
    ],
)
def test_links_that_lead_out(here: Path, target: str, depth: int, out: bool) -> None:
    assert leads_out(target, depth) == out
    if depth <= 1 and target:
        link = entry("d/l" if depth else "l", "symlink", target=target)
        if out:
            with pytest.raises(PathRefused, match="lead out"):
                unpack(here, entry("d", "dir"), link)
        else:
            unpack(here, entry("d", "dir"), link)
        unpack(here, link, archive=True)
        assert os.readlink(here / link.name) == target


def test_limits_and_lies_about_sizes(here: Path) -> None:
    with pytest.raises(ResourceExhausted, match="'f'"):
        unpack(here, entry("f", size=101), max_bytes=100)
    with pytest.raises(ResourceExhausted):
        unpack(here, entry("d", "dir"), entry("e", "dir"), max_entries=1)
    for found in ((entry("f", size=2), b"abc"), (entry("f", size=2), b"a"), (b"a",), (entry("f"), b"a")):
        with pytest.raises(FileFailed, match="malformed"):
            unpack(here, *found)
    with pytest.raises(FileFailed, match="malformed"):
        unpack(here, entry("f", size=2), b"a", entry("g"))
    assert sorted(os.listdir(here)) == ["d"], "nothing that is not whole"


def test_plainly_special_bits_and_owners_are_not_taken(here: Path) -> None:
    old = os.umask(0o027)
    try:
        unpack(
            here,
            entry("d", "dir", mode=0o7777, uid=7),
            entry("d/f", mode=0o6755, uid=7),
            entry("r", "dir", mode=0o555),
        )
    finally:
        os.umask(old)
    found = {name: (here / name).stat() for name in ("d", "d/f", "r")}
    assert {name: status.st_mode & 0o7777 for name, status in found.items()} == {
        "d": 0o750,
        "d/f": 0o750,
        "r": 0o550,
    }
    assert {status.st_uid for status in found.values()} == {os.geteuid()}
    assert {status.st_mtime_ns for status in found.values()} == {5}


def test_files_and_directories_do_not_replace_each_other(here: Path) -> None:
    (here / "d").mkdir()
    (here / "f").write_text("old")
    with pytest.raises(PathIsDirectory):
        unpack(here, entry("d", size=1), b"x")
    with pytest.raises(PathNotDirectory):
        unpack(here, entry("f", "dir"))
    unpack(here, entry("f", size=3), b"new")
    assert (here / "f").read_text() == "new" and sorted(os.listdir(here)) == ["d", "f"]


@pytest.mark.parametrize(
    "fields",
    [
        ["entry"],
        ["entry", 1, "file", 0, 0, 0, 0, 0, "", [], {}],
        ["entry", "a", "hole", 0, 0, 0, 0, 0, "", [], {}],
        ["entry", "a", [], 0, 0, 0, 0, 0, "", [], {}],
        ["entry", "a", "file", 1 << 20, 0, 0, 0, 0, "", [], {}],
        ["entry", "a", "file", 0, -1, 0, 0, 0, "", [], {}],
        ["entry", "a", "file", 0, 0, 0, 0, -1, "", [], {}],
        ["entry", "a", "file", 0, 0, 0, 0, 1 << 63, "", [], {}],
        ["entry", "a", "dir", 0, 0, 0, 0, 1, "", [], {}],
        ["entry", "a", "file", True, 0, 0, 0, 0, "", [], {}],
        ["entry", "a\0", "file", 0, 0, 0, 0, 0, "", [], {}],
        ["entry", "a", "char", 0, 0, 0, 0, 0, "", [1], {}],
        ["entry", "a", "file", 0, 0, 0, 0, 0, "", [], {"x": "text"}],
        ["entry", "a", "file", 0, 0, 0, 0, 0, "", [], {b"x": b""}],
        ["entry", "a", "file", 0, 0, 0, 0, 0, "", 5, []],
    ],
)
def test_malformed_entries_are_refused(fields: list[Any]) -> None:
    with pytest.raises(FileFailed, match="malformed"):
        FileStatus.of_record(fields)


# -- a tree of this host, and tars -------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    top = tmp_path / "tree"
    (top / "sub").mkdir(parents=True)
    (top / "f").write_bytes(b"contents")
    os.link(top / "f", top / "sub" / "again")
    (top / "l").symlink_to("f")
    os.mkfifo(top / "sub" / "fifo")
    (top / "sub" / os.fsdecode(b"bytes\xff\n")).write_bytes(b"")
    (top / "sub" / ("n" * 200)).write_bytes(b"x" * 700)
    os.utime(top / "f", ns=(1, 1_500_000_000_123_456_789))
    return top


def test_a_tree_as_records(tree: Path) -> None:
    found = decoded(Packer(str(tree), "top", archive=True, follow=False))
    entries = {one.name: one for one in found if isinstance(one, FileStatus)}
    assert next(iter(entries)) == "top" and len(entries) == 8
    assert entries["top/l"].target == "f"
    kinds = {entries[name].kind for name in ("top/f", "top/sub/again")}
    assert kinds == {"file", "link"}
    assert entries["top/sub/fifo"].kind == "fifo"
    assert "top/sub/bytes\udcff\n" in entries
    assert sum(len(one) for one in found if isinstance(one, bytes)) == 8 + 700


def test_a_tar_has_what_the_records_say_and_comes_back(tree: Path) -> None:
    pieces = list(Packer(str(tree), "top", archive=True, follow=False))
    file = io.BytesIO()
    writer = TarWriter(file)
    for one in decoded(pieces):
        writer.take(one)
    writer.finish()
    assert len(file.getvalue()) % 10240 == 0
    file.seek(0)
    with tarfile.open(fileobj=file, encoding="utf-8", errors="surrogateescape") as tar:
        members = {member.name: member for member in tar}
        assert "top/sub/bytes\udcff\n" in members and "top/sub/" + "n" * 200 in members
        assert members["top/f"].pax_headers["mtime"] == "1500000000.123456789" or members["top/f"].islnk()
        assert members["top/l"].issym() and members["top/sub/fifo"].isfifo() and members["top"].isdir()
    file.seek(0)
    again = [one for one in decoded(records_of(file)) if isinstance(one, FileStatus)]
    first = [one for one in decoded(pieces) if isinstance(one, FileStatus)]
    assert [(one.name, one.kind, one.mode, one.uid, one.size, one.target) for one in again] == [
        (one.name, one.kind, one.mode, one.uid, one.size, one.target) for one in first
    ]
    assert [one.mtime_ns // 10**9 for one in again] == [one.mtime_ns // 10**9 for one in first]


def test_gnu_tars_begin_with_dot_slash() -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name in ("./", "./" + "d" * 150 + "/", "./" + "d" * 150 + "/f"):
            member = tarfile.TarInfo(name)
            member.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            tar.addfile(member)
    file.seek(0)
    assert [one.name for one in decoded(records_of(file))] == [".", "d" * 150, "d" * 150 + "/f"]


@pytest.mark.behaviour("B65")
@pytest.mark.parametrize("data", [b"no tar at all" * 100, b"\x1f\x8b\x08" + bytes(600), b"short"])
def test_what_is_no_tar_is_refused(data: bytes) -> None:
    with pytest.raises(FileFailed, match="archive"):
        list(records_of(io.BytesIO(data)))


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x"])
def test_a_tar_with_a_name_that_leads_out_is_refused(name: str) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        tar.addfile(tarfile.TarInfo(name))
    file.seek(0)
    with pytest.raises(ByreError, match="archive"):
        list(records_of(file))
