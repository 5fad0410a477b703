"""The strict tar reader: honest archives of every dialect whole, hostile ones refused by name (B63)."""

from __future__ import annotations

import io
import subprocess
import tarfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from byre.errors import ImageInvalid
from byre.oci import tarstream
from byre.oci.tarstream import Entry, TarReader
from examples.busybox_image import Layer

from .oci_tar import file, header, pax, sparse

pytestmark = pytest.mark.behaviour("B63")
END = bytes(1024)


class Forward(io.RawIOBase):
    """A stream that cannot seek and gives at most `step` bytes at a time."""

    def __init__(self, data: bytes, step: int = 1 << 20) -> None:
        self._inner, self._step = io.BytesIO(data), step

    def read(self, size: int = -1, /) -> bytes:
        return self._inner.read(min(size, self._step) if size >= 0 else self._step)


def entries(data: bytes) -> list[Entry]:
    return list(TarReader(Forward(data)))


def contents(data: bytes, step: int = 1 << 20) -> dict[str, bytes]:
    reader = TarReader(Forward(data, step))
    return {entry.name: b"".join(reader.data()) for entry in reader if entry.kind == tarstream.FILE}


# -- honest archives --------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["ustar", "gnu", "pax", "v7", "oldgnu"])
def test_what_gnu_tar_writes_is_read_whole(tmp_path: Path, dialect: str) -> None:
    tree = tmp_path / "tree"
    long = "n" * 90 if dialect == "v7" else "d" * 80 + "/" + "n" * 90
    (tree / long).parent.mkdir(parents=True)
    (tree / long).write_bytes(b"hello" * 1000)
    (tree / "link").symlink_to("target")
    (tree / "one").write_bytes(b"1")
    (tree / "two").hardlink_to(tree / "one")
    command = ["tar", "-cf", "-", f"--format={dialect}", "--sort=name", "-C", tree, "."]
    packed = subprocess.run(command, check=True, capture_output=True).stdout
    found = {entry.name.removeprefix("./"): entry for entry in entries(packed)}
    kinds = {name: entry.kind for name, entry in found.items() if entry.kind != "dir"}
    assert kinds == {"link": "symlink", "one": "file", "two": "link", long: "file"}
    assert (found["link"].target, found["two"].target) == ("target", "./one")
    assert contents(packed) == {f"./{long}": b"hello" * 1000, "./one": b"1"}
    assert found[long].mtime == int((tree / long).stat().st_mtime)


@pytest.mark.parametrize("version", ["old", "0.0", "0.1", "1.0"])
def test_sparse_files_are_read_with_their_holes(tmp_path: Path, version: str) -> None:
    options = ["--format=gnu"] if version == "old" else ["--format=pax", f"--sparse-version={version}"]
    with open(tmp_path / "sparse", "wb") as out:
        for number in range(40):  # more segments than the header block of the old format holds
            out.seek(number << 16)
            out.write(b"data%d" % number)
        out.truncate(5 << 20)
    (tmp_path / "after").write_bytes(b"the end")
    command = ["tar", "-cSf", "-", *options, "-C", tmp_path, "sparse", "after"]
    packed = subprocess.run(command, check=True, capture_output=True).stdout
    assert len(packed) < 1 << 20
    assert contents(packed) == {"sparse": (tmp_path / "sparse").read_bytes(), "after": b"the end"}
    assert [e.size for e in entries(packed)] == [5 << 20, 7]


def test_attributes_that_tar_headers_have_no_room_for() -> None:
    layer = Layer()
    layer.add(
        "x/" * 200 + "x",
        b"1",
        owner=(3_000_000_000, 70_000),
        xattrs={"security.capability": b"\0\xff\n=1", "user.a": b""},
    )
    layer.symlink("l", "y" * 3000)
    layer.add("bad\udcff\udcfe", b"2")
    one, two, three = entries(layer.data())
    assert (one.name, one.uid, one.gid) == ("x/" * 200 + "x", 3_000_000_000, 70_000)
    assert one.xattrs == (("security.capability", b"\0\xff\n=1"), ("user.a", b""))
    assert two.target == "y" * 3000
    assert three.name.encode("utf-8", "surrogateescape") == b"bad\xff\xfe"


@given(st.integers(1, 700), st.lists(st.binary(max_size=2000), max_size=5))
def test_reads_of_any_size_give_the_same(step: int, datas: list[bytes]) -> None:
    packed = b"".join(file(b"f%d" % i, data) for i, data in enumerate(datas)) + END
    assert contents(packed, step) == {f"f{i}": data for i, data in enumerate(datas)}


def test_a_stream_that_seeks_gives_the_same_entries_and_their_offsets() -> None:
    packed = file(b"a", b"first") + pax((b"path", b"b" * 200)) + file(b"b", b"second" * 500) + END
    reader = TarReader(io.BytesIO(packed))
    found = [(entry, packed[reader.offset : reader.offset + entry.size]) for entry in reader]
    assert [entry for entry, _ in found] == entries(packed)
    assert [data for _, data in found] == [b"first", b"second" * 500]


@pytest.mark.parametrize("end", [b"", bytes(512), END, bytes(10240)])
def test_the_end_may_be_blocks_of_zeros_or_nothing(end: bytes) -> None:
    assert [entry.name for entry in entries(file(b"a") + end)] == ["a"]
    assert entries(end) == []


# -- hostile archives --------------------------------------------------------------------------------

LONG = b"l" * 4096
HOSTILE: dict[str, tuple[bytes, str]] = {
    "absolute": (file(b"/etc/passwd"), "'/etc/passwd' is an absolute name"),
    "parent": (file(b"a/../../etc"), "leaves the archive"),
    "parent in pax": (pax((b"path", b"../x")) + file(), "leaves the archive"),
    "only parent": (header(b"..", b"5"), "leaves the archive"),
    "no name": (file(b""), "empty name"),
    "nul in a name": (pax((b"path", b"a\0b")) + file(), "NUL"),
    "nul in a target": (pax((b"linkpath", b"a\0b")) + header(kind=b"2"), "NUL"),
    "long name": (pax((b"path", b"n" * 256)) + file(), "longer than"),
    "4 KiB path": (pax((b"path", b"a/" * 2048)) + file(), "longer than"),
    "long target": (pax((b"linkpath", LONG)) + header(kind=b"2"), "longer than"),
    "link to nothing": (header(kind=b"2"), "without a target"),
    "negative size": (header(size=b"\xff" * 12), "negative size"),
    "negative size in pax": (pax((b"size", b"-512")) + file(), "number '-512'"),
    "huge size": (header(size=b"\x80" + b"\x7f" * 11), "over the limit|ends in the middle"),
    "bad checksum": (b"x" * 512, "bad header"),
    "bad header in the middle": (file(b"a", b"1") + b"y" * 512 + file(b"b"), "bad header at byte 1024"),
    "cut off in data": (header(size=4096) + b"half", "ends in the middle"),
    "cut off in a header": (file(b"a") + header(b"b")[:300], "ends in the middle"),
    "nothing after pax": (pax((b"path", b"a")) + END, "ends after an extended header"),
    "huge pax": (header(kind=b"x", size=tarstream.MAX_EXTENDED + 1), "over the limit"),
    "huge long name": (header(kind=b"L", size=1 << 33), "over the limit"),
    "huge global": (header(kind=b"g", size=1 << 33), "over the limit"),
    "pax without a length": (header(kind=b"x", size=9) + b"path=abc\n" + bytes(503) + file(), "malformed"),
    "pax length of 0": (header(kind=b"x", size=9) + b"0 path=a\n" + bytes(503) + file(), "malformed"),
    "pax length too long": (header(kind=b"x", size=9) + b"99 pat=a\n" + bytes(503) + file(), "malformed"),
    "pax length too short": (header(kind=b"x", size=9) + b"3 path=a\n" + bytes(503) + file(), "malformed"),
    "pax without a key": (header(kind=b"x", size=5) + b"5 =a\n" + bytes(507) + file(), "malformed"),
    "pax number": (pax((b"uid", b"1e9")) + file(), "number '1e9'"),
    "pax uid": (pax((b"uid", b"4294967295")) + file(), "out of range"),
    "long pax number": (pax((b"mtime", b"9" * 5000)) + file(), "the number"),
    "device": (header(kind=b"3")[:329] + b"7777777\0" * 2, "bad header"),
    "unknown type": (header(kind=b"Z"), "unknown type b'Z'"),
    "volume": (header(kind=b"V"), "unknown type"),
    "xattr name": (pax((b"SCHILY.xattr." + b"k" * 256, b"")) + file(), "too long"),
    "xattr value": (pax((b"SCHILY.xattr.user.a", bytes(65537))) + file(), "too long"),
    "xattr not utf-8": (pax((b"SCHILY.xattr.user.\xff", b"")) + file(), "not UTF-8"),
    "sparse map beyond the size": (sparse(b"0,1,99,1") + file(data=b"ab"), "fit"),
    "sparse map out of order": (sparse(b"5,1,0,1") + file(data=b"ab"), "order"),
    "sparse map without data": (sparse(b"0,8") + file(), "fit"),
    "sparse map of letters": (sparse(b"a,b") + file(), "malformed"),
    "sparse bomb": (pax((b"GNU.sparse.realsize", b"%d" % (1 << 60))) + file(), "over the limit"),
    "sparse 1.0 without a map": (
        pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.realsize", b"9")) + file(data=b"x" * 512), "malformed"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archives_are_refused_by_name(case: str) -> None:
    data, reason = HOSTILE[case]
    data += b"" if case.startswith("cut off") else END
    for stream in (Forward(data), io.BytesIO(data)):
        with pytest.raises(ImageInvalid, match=reason):
            list(TarReader(stream))


def _pax_flood() -> Iterator[bytes]:
    block = pax((b"path", b"d/" * 2000 + b"x"))
    while True:
        yield block


def _zero_flood() -> Iterator[bytes]:
    yield header(size=b"\x80" + (1 << 40).to_bytes(11, "big"))
    while True:
        yield bytes(1 << 20)


class Endless(io.RawIOBase):
    def __init__(self, source: Callable[[], Iterator[bytes]]) -> None:
        self._source, self._rest = source(), b""

    def read(self, size: int = -1, /) -> bytes:
        while len(self._rest) < size:
            self._rest += next(self._source)
        data, self._rest = self._rest[:size], self._rest[size:]
        return data


@pytest.mark.parametrize("flood", [_pax_flood, _zero_flood])
def test_an_endless_archive_ends(flood: Callable[[], Iterator[bytes]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tarstream, "MAX_INDEX_BYTES", 1 << 20)
    tracemalloc.start()
    with pytest.raises(ImageInvalid, match="over the limit"):
        list(TarReader(Endless(flood)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


def test_too_many_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tarstream, "MAX_ENTRIES", 1000)
    packed = b"".join(file(b"%d" % number) for number in range(1001))
    assert len(entries(packed[: 1000 * 512])) == 1000
    with pytest.raises(ImageInvalid, match="more than 1000 entries"):
        entries(packed)


def test_a_pax_header_of_digits_is_no_work() -> None:
    """`tarfile` needs the square of its length for it (CVE-2024-6232)."""
    body = b"1" * tarstream.MAX_EXTENDED
    started = time.process_time()
    with pytest.raises(ImageInvalid, match="malformed"):
        entries(header(kind=b"x", size=len(body)) + body)
    assert time.process_time() - started < 1


@given(st.data())
def test_a_damaged_archive_is_read_or_refused(data: st.DataObject) -> None:
    """Bytes changed anywhere: an error of ours, or entries that keep the rules; nothing else."""
    packed = bytearray(
        pax((b"path", b"name"), (b"SCHILY.xattr.user.a", b"b")) + file(b"a", b"some data")
        + header(b"././@LongLink", b"L", 120) + b"q" * 120 + bytes(392) + header(b"l", b"2", target=b"t")
        + sparse(b"0,1,5,1") + file(b"s", b"ab") + END
    )  # fmt: skip
    for _ in range(data.draw(st.integers(1, 6))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    for block in range(0, len(packed), 512):  # most damage is to be met behind the checksum
        if data.draw(st.booleans()) and any(packed[block : block + 512]):
            packed[block + 148 : block + 156] = b" " * 8
            packed[block + 148 : block + 156] = b"%06o\0 " % sum(packed[block : block + 512])
    try:
        for entry in (reader := TarReader(Forward(bytes(packed)))):
            tarstream.check(entry)
            if entry.size < 1 << 20:
                assert len(b"".join(reader.data())) == entry.size
    except ImageInvalid:
        pass


def test_tarfile_would_have_taken_half_an_archive() -> None:
    """Why there is a reader of our own."""
    packed = file(b"a") + b"y" * 512 + file(b"b") + END
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        assert archive.getnames() == ["a"]
