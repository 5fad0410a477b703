"""A client of 9P2000.L that sends what it is told, be it allowed or not.  Source: diod's protocol.md."""

from __future__ import annotations

import socket
import struct
from typing import Any

NOFID = 0xFFFFFFFF
TLOPEN, TLCREATE, TSYMLINK, TMKNOD, TRENAME, TREADLINK, TSETATTR = 12, 14, 16, 18, 20, 22, 26
TLINK, TMKDIR, TATTACH, TWALK, TREAD, TREMOVE = 70, 72, 104, 110, 116, 122
RLERROR = 7

#: Of Tsetattr: mode and size.
SET_MODE, SET_SIZE = 1, 8

O_RDONLY, O_RDWR, O_CREAT = 0, 2, 0o100


class Refused(Exception):
    """Rlerror, with its number."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.errno = number


class Client:
    """Blocking, one message at a time; `root` is the fid of the attach."""

    root = 0

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(10)
        self._sock = sock
        self._last = 0
        self.send(TATTACH, "<IIssI", self.root, NOFID, b"root", b"/", 0)

    def fid(self) -> int:
        """A new number."""
        self._last += 1
        return self._last

    def send(self, kind: int, form: str, *values: Any) -> bytes:
        """One message; `s` of the form is a string as 9P has it.  Returns the answer's body; raises `Refused`."""
        body = b""
        for code, value in zip(form.removeprefix("<"), values, strict=True):
            body += struct.pack("<H", len(value)) + value if code == "s" else struct.pack(f"<{code}", value)
        self._sock.sendall(struct.pack("<IBH", 7 + len(body), kind, 1) + body)
        size, answer, _ = struct.unpack("<IBH", self._receive(7))
        rest = self._receive(size - 7)
        if answer == RLERROR:
            raise Refused(struct.unpack("<I", rest)[0])
        return rest

    def _receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self._sock.recv(size - len(data))
            assert more, "the server has hung up"
            data += more
        return data

    def walk(self, *names: bytes, start: int = 0) -> int:
        """The fid of what the names lead to, each as it is.  Raises `Refused` unless all of them were walked."""
        fid = self.fid()
        answer = self.send(TWALK, "<IIH" + "s" * len(names), start, fid, len(names), *names)
        if struct.unpack("<H", answer[:2])[0] != len(names):
            raise Refused(2)
        return fid

    def read(self, fid: int) -> bytes:
        """Open, and read the begin."""
        self.send(TLOPEN, "<II", fid, O_RDONLY)
        return self.send(TREAD, "<IQI", fid, 0, 4096)[4:]
