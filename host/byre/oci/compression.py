"""Blobs as byte streams: the digest while reading, and the layer's tar out of its compression.

Rule: a stream says its digest only when it has been read to its end.  The compression is told by the blob's first
bytes, as other container tools do it, for media types are often wrong.  gzip is Python's own; for zstd, which is in
Python only from 3.14 on, the `zstd` program is fed through a pipe.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Protocol

from byre.errors import ImageInvalid, ToolMissing

CHUNK = 1 << 20
_GZIP, _ZSTD, _XZ, _BZIP2 = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ", b"BZh"


class ByteStream(Protocol):
    """What is asked of a stream: a file opened for reading bytes has it, and so have the readers of this module."""

    def read(self, size: int = -1, /) -> bytes: ...
    def seekable(self) -> bool: ...
    def seek(self, offset: int, whence: int = 0, /) -> int: ...


class Reader(io.RawIOBase):
    """A stream that is read forward; a subclass says in `some` what the next bytes are."""

    def some(self, size: int) -> bytes:
        """1 to `size` bytes, none at the end."""
        raise NotImplementedError

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        return self.some(size) if size >= 0 else self.readall()

    def readinto(self, buffer: bytearray | memoryview, /) -> int:  # type: ignore[override]  # as io documents it
        data = self.some(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class DigestReader(Reader):
    """Reads through to `stream`, hashing; over `limit` bytes are refused.  `seen` is told each count of bytes."""

    def __init__(
        self, stream: ByteStream, algorithm: str, limit: int, seen: Callable[[int], None] | None = None
    ) -> None:
        self._stream = stream
        self._hash = hashlib.new(algorithm)
        self._algorithm = algorithm
        self._limit = limit
        self._count = 0
        self._seen = seen

    def some(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._hash.update(data)
        self._count += len(data)
        if self._count > self._limit:
            raise ImageInvalid(f"a blob is longer than the {self._limit} bytes that it may have")
        if self._seen is not None:
            self._seen(len(data))
        return data

    def digest(self) -> str:
        """The digest of all that is there: reads what nobody has read."""
        while self.some(CHUNK):
            pass
        return f"{self._algorithm}:{self._hash.hexdigest()}"


@contextmanager
def decompressed(stream: ByteStream) -> Iterator[ByteStream]:
    """The bytes of `stream` out of gzip, zstd or nothing.  Reading a broken one raises ImageInvalid."""
    head = stream.read(6)
    whole = _Prefixed(head, stream)
    if head.startswith(_ZSTD):
        with _unzstd(whole) as reader:
            yield reader
    elif head.startswith((_XZ, _BZIP2)):
        raise ImageInvalid(
            "the blob is compressed by xz or bzip2, which no image specification has",
            hint="convert the image with skopeo copy --dest-compress-format gzip",
        )
    else:
        yield _Gunzip(whole) if head.startswith(_GZIP) else whole


def is_compressed(head: bytes) -> bool:
    return head.startswith((_GZIP, _ZSTD))


class _Prefixed(Reader):
    """`head`, which was read already, and then the rest of `stream`."""

    def __init__(self, head: bytes, stream: ByteStream) -> None:
        self._head = head
        self._stream = stream

    def some(self, size: int) -> bytes:
        if self._head:
            data, self._head = self._head[:size], self._head[size:]
            return data
        return self._stream.read(size)


class _Gunzip(Reader):
    """gzip of one or more members; `gzip.GzipFile` reads 8 KiB at a time before Python 3.12."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._decoder = zlib.decompressobj(wbits=31)
        self._input = b""

    def some(self, size: int) -> bytes:
        while True:
            if self._decoder.eof and not self._next_member():
                return b""
            if not self._input:
                self._input = self._stream.read(CHUNK)
                if not self._input:
                    raise ImageInvalid("the gzip data are cut off", hint="copy the image anew")
            try:
                data = self._decoder.decompress(self._input, size)
            except zlib.error as error:
                raise ImageInvalid(f"the gzip data are broken: {error}", hint="copy the image anew") from None
            self._input = self._decoder.unused_data if self._decoder.eof else self._decoder.unconsumed_tail
            if data:
                return data

    def _next_member(self) -> bool:
        rest = self._input.lstrip(b"\0")  # padding, as gzip(1) allows it
        while not rest:
            more = self._stream.read(CHUNK)
            if not more:
                return False
            rest = more.lstrip(b"\0")
        self._input = rest
        self._decoder = zlib.decompressobj(wbits=31)
        return True


@contextmanager
def _unzstd(source: ByteStream) -> Iterator[ByteStream]:
    program = shutil.which("zstd")
    if program is None:
        raise ToolMissing(
            "a layer is compressed by zstd, and there is no zstd program", hint="install the package zstd"
        )
    process = subprocess.Popen(
        [program, "-dcq"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin and process.stdout and process.stderr
    feeder = _Feeder(source, process.stdin)
    feeder.start()
    try:
        yield _ZstdOutput(process, feeder)
    finally:
        process.kill()  # at its end already, unless the reader gave up
        process.stdout.close()
        feeder.join()  # ends by EPIPE now that zstd is dead, or at the end of a read from a file
        process.stderr.close()
        process.wait()


class _Feeder(threading.Thread):
    """Writes a blob into zstd's standard input; keeps the error that stopped it."""

    def __init__(self, source: ByteStream, sink: IO[bytes]) -> None:
        super().__init__(name="byre-zstd", daemon=True)
        self._source, self._sink = source, sink
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while data := self._source.read(CHUNK):
                self._sink.write(data)
        except BrokenPipeError:
            pass  # zstd says why, or was killed on purpose
        except BaseException as error:  # handed to the reader
            self.error = error
        finally:
            try:
                self._sink.close()
            except OSError:
                pass  # the same broken pipe, met when flushing


class _ZstdOutput(Reader):
    def __init__(self, process: subprocess.Popen[bytes], feeder: _Feeder) -> None:
        self._process, self._feeder = process, feeder

    def some(self, size: int) -> bytes:
        assert self._process.stdout and self._process.stderr
        data = self._process.stdout.read(size)
        if data:
            return data
        self._feeder.join()
        if self._feeder.error is not None:
            raise self._feeder.error
        if self._process.wait() != 0:
            reason = self._process.stderr.read(4096).decode("utf-8", "replace").strip()
            raise ImageInvalid(f"the zstd data are broken: {reason!a}", hint="copy the image anew")
        return b""
