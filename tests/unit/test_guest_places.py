"""Operations below a root whose content is hostile: no VM, a directory as the root."""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from byre_guest import files, linux, operations, packing, places, rootfs
from byre_guest.places import Place
from byre_proto import records
from byre_proto.errors import ByreError, InvalidRequest, PathRefused

pytestmark = pytest.mark.behaviour("B65")


#: renameat2(2)
RENAME_EXCHANGE = 2


class Collected:
    """A sink in memory."""

    def __init__(self) -> None:
        self.found: list[Any] = []

    def message(self, *fields: object) -> None:
        self.found.append(list(fields))

    def data(self, data: bytes) -> None:
        self.found.append(data)


class Given:
    """A source in memory."""

    def __init__(self, *found: Any) -> None:
        self._found = list(found)

    def data(self) -> bytes:
        return self._found.pop(0) if self._found else b""

    def entries(self) -> Iterator[list[Any]]:
        while self._found:
            yield self._found.pop(0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with a secret beside it, and every kind of way there."""
    (tmp_path / "secret").write_text("outside")
    inside = tmp_path / "root"
    (inside / "dir").mkdir(parents=True)
    (inside / "etc").mkdir()
    (inside / "etc" / "passwd").write_text("root:x:0:0::/root:/bin/sh\n")
    for name, target in {
        "absolute": str(tmp_path / "secret"),
        "relative": "../../../../../../../../" + str(tmp_path / "secret"),
        "up": "..",
        "passwd": "/etc/passwd",
        "host": f"{tmp_path}",
        "magic": f"/proc/{os.getpid()}/cwd",
        "loop": "loop",
    }.items():
        (inside / name).symlink_to(target)
    return inside


def run(root: Path, operation: str, path: str, source: Any = None, **options: Any) -> list[Any]:
    """What an operation gives; its errors are those that the host would get."""
    opened = rootfs.open_root(str(root))
    sink = Collected()
    try:
        operations.OPERATIONS[operation](Place(opened), path, options, source or Given(), sink)  # type: ignore[arg-type]
    except Exception as error:
        raise files.typed(error, path) from error
    finally:
        os.close(opened)
    return sink.found


WAYS = ("absolute", "relative", "up/../../secret", "../secret", "/../../secret", "host/secret", "dir/../../secret")


@pytest.mark.parametrize("way", WAYS)
def test_nothing_outside_can_be_read_or_seen(root: Path, way: str) -> None:
    for operation in ("read", "stat", "pack"):
        with pytest.raises(ByreError):
            run(root, operation, way, follow=True)


@pytest.mark.parametrize("way", WAYS)
def test_nothing_outside_can_be_written_or_removed(root: Path, way: str) -> None:
    try:
        run(root, "write", way, Given(b"written"))
    except ByreError:
        pass
    outside = root.parent
    entry = ["entry", "secret", "file", 0o644, -1, -1, 0, 0, "", [], {}]
    for operation, source in (("remove", None), ("unpack", Given(entry)), ("mkdir", None)):
        try:
            run(root, operation, way.replace("secret", ""), source, recursive=True, parents=True)
        except ByreError:
            pass
    assert (outside / "secret").read_text() == "outside"
    assert sorted(os.listdir(outside)) == ["root", "secret"]


def test_an_absolute_link_leads_to_the_roots_own(root: Path) -> None:
    assert b"".join(run(root, "read", "/passwd")[1:]) == b"root:x:0:0::/root:/bin/sh\n"


def test_a_magic_link_is_not_followed(root: Path) -> None:
    (root / "proc").mkdir()
    opened = rootfs.open_root("/")
    try:
        with pytest.raises(OSError, match="levels of symbolic links"):
            Place(opened).find(f"/proc/{os.getpid()}/root/etc/passwd")
        with pytest.raises(OSError, match="levels of symbolic links"):
            Place(opened).find("/proc/self/exe")
    finally:
        os.close(opened)
    with pytest.raises(ByreError):
        run(root, "read", "magic")
    with pytest.raises(PathRefused):
        run(root, "read", "loop")


def test_nothing_but_regular_files_is_opened(root: Path) -> None:
    os.mkfifo(root / "fifo")
    for operation, source in (("read", None), ("write", Given(b"x"))):
        with pytest.raises(ByreError, match="fifo"):
            run(root, operation, "fifo", source)
    found = run(root, "pack", "/")
    assert ("fifo", "fifo") in [(fields[1], fields[2]) for fields in found if isinstance(fields, list)]


@pytest.mark.parametrize("path", ["", "/", ".", "dir/..", "a/b/../.."])
def test_what_does_not_end_with_a_name_is_not_changed(root: Path, path: str) -> None:
    for operation in ("write", "mkdir", "remove"):
        with pytest.raises((InvalidRequest, ByreError)):
            run(root, operation, path, recursive=True)
    assert (root / "etc" / "passwd").exists()


def entry(name: str, kind: str = "file", size: int = 0, target: str = "", mode: int = 0o644) -> list[Any]:
    return ["entry", name, kind, mode, -1, -1, 0, size, target, [], {}]


@pytest.mark.parametrize(
    "name", ["../x", "/x", "a/../../x", "a//b", "./a", "", "a/.", "a\0b", "dir/../../../x"], ids=ascii
)
def test_a_name_that_is_not_plainly_below_is_refused(root: Path, name: str) -> None:
    with pytest.raises(PathRefused):
        run(root, "unpack", "/dir", Given(entry(name)))


def test_links_of_an_archive_lead_nowhere_outside(root: Path) -> None:
    archive = [
        entry("out", "symlink", target=str(root.parent)),
        entry("out/planted", size=3),
        b"abc",
        entry("up", "symlink", target="../../../.."),
        entry("up/planted", size=3),
        b"abc",
    ]
    with pytest.raises(ByreError):  # the first leads to a directory that does not exist inside
        run(root, "unpack", "/dir", Given(*archive[:3]))
    run(root, "unpack", "/dir", Given(*archive[3:]))
    assert (root / "planted").read_bytes() == b"abc", "the root's own parent is itself"
    assert sorted(os.listdir(root.parent)) == ["root", "secret"]
    with pytest.raises(ByreError):
        run(root, "unpack", "/dir", Given(entry("hard", "link", target="../../secret")))


def test_a_link_in_the_place_of_a_file_is_replaced_not_followed(root: Path) -> None:
    (root / "dir" / "x").symlink_to("../etc/passwd")
    run(root, "unpack", "/dir", Given(entry("x", size=1), b"y"))
    assert not (root / "dir" / "x").is_symlink()
    assert (root / "etc" / "passwd").read_text().startswith("root")


def test_write_follows_a_link_inside_and_keeps_mode(root: Path) -> None:
    (root / "etc" / "passwd").chmod(0o640)
    run(root, "write", "passwd", Given(b"new"))
    assert (root / "passwd").is_symlink()
    assert (root / "etc" / "passwd").read_text() == "new"
    assert (root / "etc" / "passwd").stat().st_mode & 0o7777 == 0o640


def test_a_directory_that_is_swapped_for_a_link_leads_nowhere_outside(root: Path) -> None:
    """A container that renames as fast as it can, while files are written through the name that it renames."""
    outside, stop = root.parent, threading.Event()
    (root / "link").symlink_to(outside)
    (root / "d").mkdir()

    def swap() -> None:
        """The two change their names with each other: there is always something called "d"."""
        libc, names = ctypes.CDLL(None), (os.fsencode(root / "d"), os.fsencode(root / "link"))
        while not stop.is_set():
            libc.renameat2(linux.AT_FDCWD, names[0], linux.AT_FDCWD, names[1], RENAME_EXCHANGE)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for number in range(200):
            attempts: list[Callable[[], Any]] = [
                lambda: run(root, "write", f"d/../d/f{number}", Given(b"x")),  # noqa: B023
                lambda: run(root, "unpack", "/", Given(entry(f"d/g{number}", size=1), b"x")),  # noqa: B023
                lambda: run(root, "read", "d/secret"),
            ]
            for attempt in attempts:
                try:
                    assert b"outside" not in attempt()
                except ByreError:
                    pass
    finally:
        stop.set()
        thread.join()
    assert sorted(os.listdir(outside)) == ["root", "secret"]
    directory = next(root / name for name in ("d", "link") if not (root / name).is_symlink())
    assert os.listdir(directory), "sometimes it was there"


def test_deep_trees_are_refused_before_descriptors_run_out(root: Path) -> None:
    here = os.open(root / "dir", os.O_RDONLY)
    for _ in range(places.MAX_DEPTH + 5):
        os.mkdir("d", dir_fd=here)
        inner = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    for operation in ("list", "pack", "remove"):
        with pytest.raises(PathRefused, match="levels"):
            run(root, operation, "/dir", recursive=True)
    subprocess.run(["rm", "-r", root / "dir"], check=True)  # pytest's own way would recurse too deeply


def test_a_tree_is_removed_without_following_links(root: Path) -> None:
    (root / "dir" / "sub").mkdir()
    (root / "dir" / "sub" / "link").symlink_to("../../etc")
    (root / "dir" / "file").write_text("x")
    run(root, "remove", "/dir", recursive=True)
    assert not (root / "dir").exists() and (root / "etc" / "passwd").exists()


def test_a_failure_leaves_no_temporary_file(root: Path) -> None:
    class Cut(Given):
        def data(self) -> bytes:
            if not self._found:
                raise OSError(28, "No space left on device")
            return super().data()

    with pytest.raises(ByreError) as caught:
        run(root, "write", "passwd", Cut(b"half"))
    assert caught.value.code == "no-space"
    assert os.listdir(root / "etc") == ["passwd"]
    assert (root / "etc" / "passwd").read_text().startswith("root")


def test_pack_and_list_leave_the_kernels_views_out() -> None:
    opened = rootfs.open_root("/")
    try:
        fd = places.open_directory("/proc")
        assert places.is_pseudo(fd)
        os.close(fd)
        top = places.open_directory("/")
        names = []
        for name, directory, base, status in places.walk(top, recursive=False):
            assert places.kind_of(status) in records.__dict__.values() and directory >= 0 and base == name
            names.append(name)
        assert "proc" in names
    finally:
        os.close(opened)
    assert packing.MAX_PSEUDO > 0
