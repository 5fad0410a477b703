"""Reads a tar archive strictly, one entry after the other, from a stream that may be hostile.

Rule: an archive is read whole or refused by name.  Nothing is skipped, guessed or written here.

Why not `tarfile` alone: it takes a bad header in the middle of an archive for its end (so half a layer would pass
for a layer), reads extended headers of any size into memory, and matches them with expressions that are quadratic
in their length.  A header block itself is parsed by it (`TarInfo.frombuf`); what lies around it is done
here: pax records, GNU long names and sparse maps, with a limit for each.  Format: POSIX.1-2008 pax, GNU
tar's manual.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from byre.errors import ImageInvalid
from byre.oci.compression import ByteStream
from byre_proto.errors import printable

#: Entries of one archive: ten times what the largest images have; an entry costs about 1 kB of memory.
MAX_ENTRIES = 1_000_000
#: Bytes of one archive, decompressed, and of all its files with their holes: ends a decompression bomb.
MAX_BYTES = 64 << 30
#: Bytes of all names, link targets and xattrs of an archive, which are kept in memory.
MAX_INDEX_BYTES = 256 << 20
#: Bytes of one extended header; Go's archive/tar has the same.
MAX_EXTENDED = 1 << 20
#: Linux: PATH_MAX without its NUL, NAME_MAX, XATTR_SIZE_MAX.
MAX_PATH, MAX_NAME, MAX_XATTR = 4095, 255, 65536
#: Segments of one sparse file, each kept as a pair of numbers.
MAX_SEGMENTS = 100_000
#: What squashfs and the kernel's device numbers hold.
MAX_ID, MAX_MAJOR, MAX_MINOR = 2**32 - 2, 2**12 - 1, 2**20 - 1

BLOCK = 512
CHUNK = 1 << 20
_ZEROS = bytes(CHUNK)
_TEXT = ("utf-8", "surrogateescape")

FILE, LINK, SYMLINK, CHAR, BLOCKDEV, DIRECTORY, FIFO = "file", "link", "symlink", "char", "block", "dir", "fifo"
_KINDS = {
    tarfile.REGTYPE: FILE,
    tarfile.AREGTYPE: FILE,
    tarfile.CONTTYPE: FILE,
    tarfile.GNUTYPE_SPARSE: FILE,
    tarfile.LNKTYPE: LINK,
    tarfile.SYMTYPE: SYMLINK,
    tarfile.CHRTYPE: CHAR,
    tarfile.BLKTYPE: BLOCKDEV,
    tarfile.DIRTYPE: DIRECTORY,
    tarfile.FIFOTYPE: FIFO,
}
_PAX_NUMBERS = {b"size", b"uid", b"gid", b"mtime", b"GNU.sparse.size", b"GNU.sparse.realsize"}
_PAX_TEXTS = {b"path", b"linkpath", b"GNU.sparse.name", b"GNU.sparse.map", b"GNU.sparse.major", b"GNU.sparse.minor"}
_XATTR = b"SCHILY.xattr."


class Entry(NamedTuple):
    """One entry.  `size` is in bytes with holes, `mtime` in seconds, `target` that of a link; texts by
    surrogateescape."""

    name: str
    kind: str
    mode: int
    uid: int
    gid: int
    mtime: int
    size: int
    target: str
    device: tuple[int, int]
    xattrs: tuple[tuple[str, bytes], ...]

    @property
    def label(self) -> str:
        return show(self.name)


def show(name: str) -> str:
    """A name from an archive, safe and short enough for an error message."""
    return ascii(name) if len(name) <= 120 else ascii(name[:117]) + "..."


@dataclass
class _Extended:
    """What the extended headers before an entry said."""

    pax: dict[bytes, bytes] = field(default_factory=dict)
    xattrs: dict[str, bytes] = field(default_factory=dict)
    segments: list[int] = field(default_factory=list)  # offset, length, offset, length, …
    long_name: bytes | None = None
    long_target: bytes | None = None

    def text(self, key: bytes) -> str | None:
        value = self.pax.get(key)
        return value.decode(*_TEXT) if value else None

    def number(self, key: bytes) -> int | None:
        value = self.pax.get(key)
        if not value:
            return None
        whole, _, fraction = value.partition(b".") if key == b"mtime" else (value, b"", b"")
        digits = whole[1:] if key == b"mtime" and whole[:1] == b"-" else whole
        if len(digits) > 20 or not digits.isdigit() or not (fraction.isdigit() or not fraction):
            raise ImageInvalid(f"a pax header has the number {show(value.decode(*_TEXT))} for {key.decode(*_TEXT)}")
        return int(whole)


class TarReader:
    """Iterate for the entries; `data()` gives the bytes of the entry that came last, for as long as it is
    the last.

    `offset` is where that entry's data begin in the stream.  A stream that can seek is not read where it
    need not be. Raises ImageInvalid at the first thing that is not as it must be.
    """

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._end = stream.seek(0, 2) if stream.seekable() else None
        if self._end is not None:
            stream.seek(0)
        self._position = 0
        self._left = 0  # stored bytes of the current entry not yet read
        self._padding = 0
        self._segments: list[tuple[int, int]] | None = None
        self._size = 0
        self._entries = self._index_bytes = self._file_bytes = 0

    @property
    def offset(self) -> int:
        return self._position

    @property
    def sparse(self) -> bool:
        """Whether the last entry's data are stored with holes."""
        return self._segments is not None

    def __iter__(self) -> Iterator[Entry]:
        while True:
            self._skip(self._left + self._padding)
            self._left = self._padding = 0
            entry = self._next()
            if entry is None:
                return
            yield entry

    def data(self) -> Iterator[bytes]:
        """The contents of the file that came last, holes as zeros, in pieces of at most 1 MiB."""
        if self._segments is None:
            yield from self._take(self._left)
            return
        position = 0
        for start, length in self._segments:
            yield from _zeros(start - position)
            yield from self._take(length)
            position = start + length
        yield from _zeros(self._size - position)

    # -- the stream ----------------------------------------------------------------------------------------

    def _read(self, count: int) -> bytes:
        """Exactly `count` bytes; the callers keep it small."""
        parts: list[bytes] = []
        missing = count
        while missing:
            part = self._stream.read(missing)
            if not part:
                raise ImageInvalid(f"the archive ends in the middle of an entry, at byte {self._position}")
            parts.append(part)
            missing -= len(part)
            self._position += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _take(self, count: int) -> Iterator[bytes]:
        while count:
            piece = self._read(min(count, CHUNK))
            count -= len(piece)
            self._left -= len(piece)
            yield piece

    def _skip(self, count: int) -> None:
        if self._end is None:
            while count:
                count -= len(self._read(min(count, CHUNK)))
        elif self._position + count > self._end:
            raise ImageInvalid(f"the archive ends in the middle of an entry, at byte {self._end}")
        else:
            self._position = self._stream.seek(self._position + count)

    def _block(self) -> bytes | None:
        """The next header block, or None at the archive's end: no more bytes, or a block of zeros."""
        first = self._stream.read(1)
        if not first:
            return None
        self._position += 1
        block = first + self._read(BLOCK - 1)
        return block if block.count(0) != BLOCK else None

    # -- headers -------------------------------------------------------------------------------------------

    def _next(self) -> Entry | None:
        extended = _Extended()
        while True:
            start = self._position
            block = self._block()
            if block is None:
                if extended != _Extended():
                    raise ImageInvalid(f"the archive ends after an extended header, at byte {start}")
                return None
            try:
                header = tarfile.TarInfo.frombuf(block, *_TEXT)
            except (tarfile.HeaderError, ValueError) as error:
                raise ImageInvalid(f"the archive has a bad header at byte {start}: {error}") from None
            if header.size < 0:
                raise ImageInvalid(f"{show(header.name)} has the negative size {header.size}")
            if not self._extend(extended, header):
                break
        if header.type == tarfile.GNUTYPE_SPARSE:
            self._old_sparse(block, extended)
        return self._entry(header, extended)

    def _extend(self, extended: _Extended, header: tarfile.TarInfo) -> bool:
        """Take `header` as an extension of the entry that follows; False when it is that entry itself."""
        kind = header.type
        if kind not in b"xXgLK":
            return False
        if header.size > MAX_EXTENDED:
            raise ImageInvalid(f"an extended header of {header.size} bytes is over the limit of {MAX_EXTENDED}")
        body = self._read(-(-header.size // BLOCK) * BLOCK)[: header.size] if header.size else b""
        if kind in b"xX":
            self._pax(body, extended)
        elif kind == b"L":
            extended.long_name = body.rstrip(b"\0")
        elif kind == b"K":
            extended.long_target = body.rstrip(b"\0")
        self._account(len(body) if kind != b"g" else 0)  # a global header: container engines ignore it, so do we
        return True

    def _pax(self, body: bytes, extended: _Extended) -> None:
        position = 0
        while position < len(body):
            space = body.find(b" ", position, position + 8)
            length = body[position:space]
            if space < 0 or not length.isdigit():
                raise ImageInvalid("a pax header is malformed: a record does not begin with its length")
            end = position + int(length)
            key, equals, value = body[space + 1 : end - 1].partition(b"=")
            if end > len(body) or end <= space + 1 or body[end - 1 : end] != b"\n" or not equals or not key:
                raise ImageInvalid("a pax header is malformed: a record is not LENGTH KEY=VALUE")
            position = end
            if key in _PAX_NUMBERS or key in _PAX_TEXTS:
                extended.pax[key] = value
            elif key.startswith(_XATTR):
                try:
                    extended.xattrs[key[len(_XATTR) :].decode()] = value
                except UnicodeDecodeError:
                    raise ImageInvalid(f"an extended attribute has the name {key[:99]!r}, not UTF-8") from None
            elif key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):  # sparse format 0.0: repeated records
                extended.segments.append(_decimal(value))
        self._limit_segments(extended)

    def _old_sparse(self, block: bytes, extended: _Extended) -> None:
        """GNU's old sparse header: pairs in the header block, continued in blocks of their own."""
        extended.pax[b"GNU.sparse.realsize"] = b"%d" % _field(block[483:495])
        more, pairs = block[482], block[386:482]
        while True:
            for at in range(0, len(pairs) - 23, 24):
                if pairs[at + 12 : at + 24].strip(b"\0 "):
                    extended.segments += [_field(pairs[at : at + 12]), _field(pairs[at + 12 : at + 24])]
            if not more:
                return
            self._limit_segments(extended)
            block = self._read(BLOCK)
            more, pairs = block[504], block[:504]

    def _new_sparse(self, extended: _Extended) -> None:
        """GNU sparse format 1.0: the map is text in front of the data, padded to a block."""
        lines: list[bytes] = []
        text, wanted = b"", 1
        while len(lines) < wanted:
            if self._left < BLOCK:
                raise ImageInvalid("a sparse file's map is malformed")
            self._left -= BLOCK
            *found, text = (text + self._read(BLOCK)).split(b"\n")
            lines += found
            wanted = 1 + 2 * _decimal(lines[0] if lines else b"")
            if wanted > 1 + 2 * MAX_SEGMENTS:
                raise ImageInvalid(f"a sparse file has more than {MAX_SEGMENTS} segments")
        extended.segments = [_decimal(line) for line in lines[1:wanted]]

    def _limit_segments(self, extended: _Extended) -> None:
        if len(extended.segments) > 2 * MAX_SEGMENTS:
            raise ImageInvalid(f"a sparse file has more than {MAX_SEGMENTS} segments")

    def _entry(self, header: tarfile.TarInfo, extended: _Extended) -> Entry:
        name = _first(extended.text(b"GNU.sparse.name"), extended.text(b"path"), extended.long_name, header.name)
        target = _first(extended.text(b"linkpath"), extended.long_target, header.linkname)
        kind = _KINDS.get(header.type)
        if kind is None:
            raise ImageInvalid(f"{show(name)} is of the unknown type {header.type!r}")
        if kind == FILE and header.type == tarfile.AREGTYPE and name.endswith("/"):
            kind = DIRECTORY
        size = _or(extended.number(b"size"), header.size) if kind == FILE else 0
        self._left, self._padding, self._segments, self._size = size, -size % BLOCK, None, size
        if kind == FILE:
            self._sparse(name, extended)
        entry = Entry(
            name=name,
            kind=kind,
            mode=header.mode & 0o7777,
            uid=_or(extended.number(b"uid"), header.uid),
            gid=_or(extended.number(b"gid"), header.gid),
            mtime=min(max(_or(extended.number(b"mtime"), int(header.mtime)), 0), 2**32 - 1),
            size=self._size,
            target=target if kind in (LINK, SYMLINK) else "",
            device=(header.devmajor, header.devminor) if kind in (CHAR, BLOCKDEV) else (0, 0),
            xattrs=tuple(sorted(extended.xattrs.items())),
        )
        self._account(len(name) + len(target))
        self._file_bytes += self._size
        self._entries += 1
        if self._entries > MAX_ENTRIES:
            raise ImageInvalid(f"the archive has more than {MAX_ENTRIES} entries")
        if self._file_bytes > MAX_BYTES:
            raise ImageInvalid(f"with {entry.label} the archive's files are over the limit of {MAX_BYTES} bytes")
        check(entry)
        return entry

    def _sparse(self, name: str, extended: _Extended) -> None:
        size = _or(extended.number(b"GNU.sparse.realsize"), extended.number(b"GNU.sparse.size") or -1)
        if size < 0:
            return
        if extended.pax.get(b"GNU.sparse.major") == b"1":
            self._new_sparse(extended)
        elif table := extended.pax.get(b"GNU.sparse.map"):
            extended.segments = [_decimal(number) for number in table.split(b",")]
        self._limit_segments(extended)
        self._segments = list(zip(extended.segments[::2], extended.segments[1::2], strict=False))
        position = stored = 0
        for start, length in self._segments:
            if start < position:
                raise ImageInvalid(f"the sparse file {show(name)} has segments that overlap or are out of order")
            position = start + length
            stored += length
        if len(extended.segments) % 2 or position > size or stored != self._left:
            raise ImageInvalid(f"the sparse file {show(name)} has a map that does not fit its data")
        self._size = size

    def _account(self, count: int) -> None:
        self._index_bytes += count
        if self._index_bytes > MAX_INDEX_BYTES:
            raise ImageInvalid(f"the archive's names and attributes are over the limit of {MAX_INDEX_BYTES} bytes")


def check(entry: Entry) -> None:
    """Refuse what no file system can hold and what no honest archive has: absolute names, `..`, numbers out
    of range."""
    name = entry.name
    parts = name.split("/")
    if name.startswith("/"):
        raise ImageInvalid(f"{entry.label} is an absolute name")
    if ".." in parts:
        raise ImageInvalid(f"{entry.label} leaves the archive by '..'")
    if not name or "\0" in name or "\0" in entry.target:
        raise ImageInvalid(f"{entry.label} is an empty name, or has a NUL in its name or target")
    if not _fits(name, entry.target):
        raise ImageInvalid(
            f"{entry.label} is longer than a name of {MAX_NAME} or a path of {MAX_PATH} bytes may be"
        )
    if entry.kind in (LINK, SYMLINK) and not entry.target:
        raise ImageInvalid(f"{entry.label} is a link without a target")
    if not (0 <= entry.uid <= MAX_ID and 0 <= entry.gid <= MAX_ID):
        raise ImageInvalid(f"{entry.label} has the owner {entry.uid}:{entry.gid}, out of range")
    if not (0 <= entry.device[0] <= MAX_MAJOR and 0 <= entry.device[1] <= MAX_MINOR):
        raise ImageInvalid(f"{entry.label} has the device number {entry.device[0]}:{entry.device[1]}, out of range")
    for key, value in entry.xattrs:
        if not 0 < len(key.encode(*_TEXT)) <= MAX_NAME or "\0" in key or len(value) > MAX_XATTR:
            raise ImageInvalid(f"{entry.label} has the extended attribute {printable(show(key))}, too long")


def _fits(name: str, target: str) -> bool:
    if len(name) + len(target) <= MAX_NAME // 4:  # a character is at most four bytes
        return True
    whole = name.encode(*_TEXT)
    parts = max(len(part) for part in whole.split(b"/"))
    return parts <= MAX_NAME and len(whole) <= MAX_PATH and len(target.encode(*_TEXT)) <= MAX_PATH


def _zeros(count: int) -> Iterator[bytes]:
    while count > 0:
        yield _ZEROS[: min(count, CHUNK)]
        count -= CHUNK


def _first(*candidates: str | bytes | None) -> str:
    found = next((c for c in candidates if c is not None), "")
    return found.decode(*_TEXT) if isinstance(found, bytes) else found


def _or(value: int | None, otherwise: int) -> int:
    return otherwise if value is None else value


def _decimal(text: bytes) -> int:
    if not text.isdigit() or len(text) > 20:
        raise ImageInvalid("a sparse file's map is malformed")
    return int(text)


def _field(raw: bytes) -> int:
    """A number field of a header: octal text, or base 256 when its first bit is set."""
    if raw[0] & 0x80:
        value = int.from_bytes(bytes([raw[0] & 0x7F]) + raw[1:], "big")
    else:
        text = raw.strip(b"\0 ") or b"0"
        if not all(0x30 <= digit <= 0x37 for digit in text):
            raise ImageInvalid("a sparse file's map is malformed")
        value = int(text, 8)
    return value
