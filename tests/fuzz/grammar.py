"""What a hostile peer may say: frames that are nearly right, frames that are wrong in one field, and plain bytes.

Everything is drawn from a `Source`, so that a seeded generator, hypothesis and a coverage-guided fuzzer drive the
same grammar.  The peer knows what an attacker would know: ids of streams and calls, nonces, the session.
"""

from __future__ import annotations

import random
from typing import Any, Protocol

import msgpack

from byre_proto import frames, limits, messages
from byre_proto.connection import MAGIC, Connection, preface


class Source(Protocol):
    """Where decisions come from."""

    def integer(self, low: int, high: int) -> int: ...

    def bytes(self, size: int) -> bytes: ...

    @property
    def exhausted(self) -> bool: ...


class RandomSource:
    """A seeded generator: never exhausted."""

    exhausted = False

    def __init__(self, seed: object) -> None:
        self._random = random.Random(repr(seed))
        self.integer = self._random.randint
        self.bytes = self._random.randbytes


def choice(source: Source, options: Any) -> Any:
    return options[source.integer(0, len(options) - 1)]


def chance(source: Source, one_in: int) -> bool:
    return source.integer(1, one_in) == 1


EDGES = (0, 1, 2, 3, 127, 128, 255, 256, 16383, 16384, 16385, 65535, 65536, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
BIG_EDGES = (*EDGES, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -1, -(1 << 63))
TEXTS = (
    "",
    "a",
    "system.info",
    "\x1b[2J",
    "\n",
    "\u202e",
    "%s{0}",
    "../../etc/passwd",
    "x" * 300,
    "\ud800",
    "\udcff",
)


def value(source: Source, depth: int = 3) -> Any:
    """Anything that msgpack carries."""
    kind = source.integer(0, 9 if depth else 6)
    if kind == 0:
        return None
    if kind == 1:
        return chance(source, 2)
    if kind == 2:
        return choice(source, BIG_EDGES)
    if kind == 3:
        return choice(source, TEXTS)
    if kind == 4:
        return source.bytes(source.integer(0, 20))
    if kind == 5:
        return 0.5
    if kind == 6:
        return source.integer(-5, 5)
    if kind == 7:
        return [value(source, depth - 1) for _ in range(source.integer(0, 4))]
    return {choice(source, TEXTS): value(source, depth - 1) for _ in range(source.integer(0, 3))}


def fitting(source: Source, kind: str) -> Any:
    """A value of a kind of the message table."""
    if kind == "any":
        return value(source)
    if kind.endswith("?"):
        return None if chance(source, 2) else fitting(source, kind[:-1])
    if kind[0] == "[":
        return [fitting(source, kind[1:-1]) for _ in range(source.integer(0, 3))]
    if kind[0] == "{":
        return {choice(source, TEXTS): fitting(source, kind[1:-1]) for _ in range(source.integer(0, 3))}
    if kind == "int":
        return choice(source, BIG_EDGES) if chance(source, 3) else source.integer(0, 9)
    return {"str": choice(source, TEXTS), "bytes": source.bytes(3), "bool": chance(source, 2)}[kind]


def fields(source: Source, table: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    return {name: fitting(source, spec[0]) for name, spec in table.items() if not chance(source, 8)}


def encode(source: Source, fields_of: Any) -> bytes:
    """msgpack of a message, in one case of eight with something wrong in it."""
    if isinstance(fields_of, list) and chance(source, 8):
        fields_of = list(fields_of)
        place = source.integer(0, len(fields_of))
        what = source.integer(0, 2)
        if what == 0:
            fields_of.insert(place, value(source))
        elif what == 1:
            del fields_of[place : place + 1]
        else:
            fields_of[place : place + 1] = [value(source)]
    payload = bytearray(msgpack.Packer(unicode_errors="surrogatepass").pack(fields_of))
    if chance(source, 16) and payload:
        payload[source.integer(0, len(payload) - 1)] = source.integer(0, 255)
    if chance(source, 32):
        payload += source.bytes(3)
    return bytes(payload)


class Peer:
    """Speaks to `connection`; keeps what it needs to be nearly right."""

    def __init__(self, source: Source, connection: Connection) -> None:
        self.source = source
        self.connection = connection
        self._last_call = 0

    def preface(self) -> bytes:
        """Right, or for another nonce, or damaged."""
        source, own = self.source, self.connection._nonce
        echo = choice(source, (own, own, own, bytes(16), source.bytes(16).ljust(16, b"x")))
        nonce = choice(source, (b"peer" * 4, b"peer" * 4, own, bytes(16), source.bytes(16).ljust(16, b"x")))
        data = preface(nonce, echo)
        return data[: source.integer(0, len(data))] if chance(source, 8) else data

    def raw(self) -> bytes:
        """Anything at all, and what looks like the beginning of something."""
        source = self.source
        begin = choice(source, (b"", MAGIC, MAGIC[:4], b"\x00\x00\x00", frames.HEADER.pack(5, 2, 0, 0, 0)))
        return bytes(begin) + source.bytes(source.integer(0, 30))

    def header(self, kind: int) -> bytes:
        """A frame of which the header has something wrong."""
        source = self.source
        length, flags, zero, stream = choice(source, EDGES), 0, 0, self._stream(kind)
        what = source.integer(0, 3)
        if what == 0:
            flags = source.integer(1, 255)
        elif what == 1:
            zero = source.integer(1, 65535)
        elif what == 2:
            stream = 0 if stream else source.integer(1, 9)
        else:
            kind = source.integer(0, 255)
        return frames.HEADER.pack(length, kind, flags, zero, stream) + source.bytes(source.integer(0, 20))

    def frame(self, kind: int) -> bytes:
        """A whole frame with a header that is right."""
        payload = self._payload(kind)
        limit = frames.TYPES[kind][1]
        return frames.encode(kind, self._stream(kind), payload[:limit])

    def _stream(self, kind: int) -> int:
        if kind not in frames.STREAM_TYPES:
            return 0
        known = [*self.connection.session.streams, 1, 2, 3, 4, (1 << 32) - 1]
        return int(choice(self.source, known[:8]))

    def _payload(self, kind: int) -> bytes:
        source, session = self.source, self.connection.session
        if kind in frames.INTEGERS:
            return self._integer(kind).to_bytes(frames.INTEGERS[kind], "big")
        if kind == frames.DATA:
            size = choice(source, (0, 1, 5, 100, 4096, limits.INITIAL_WINDOW, limits.MAX_DATA))
            return bytes(size)
        calls = [*session._calls, 0, 1, 99]
        if kind == frames.REQUEST:
            self._last_call += 0 if chance(source, 20) else 1
            method = choice(source, sorted(messages.METHODS)) if not chance(source, 8) else choice(source, TEXTS)
            arguments = fields(source, messages.METHODS.get(method, ({}, {}))[0])
            for field in ("stdin", "stdout", "stderr"):
                if field in arguments:
                    arguments[field] = choice(source, (0, 1, 2, 3, 4, 5, 6))
            return encode(source, [self._last_call, method, arguments, choice(source, (None, 0, 5000, -1))])
        if kind == frames.REPLY:
            call = choice(source, calls)
            waiting = session._calls.get(call)
            table = messages.METHODS[waiting.method][1] if waiting else {}
            return encode(source, [call, fields(source, table)])
        if kind == frames.ERROR:
            code = choice(source, ("internal", "cancelled", "no-such-code", "\x1b"))
            return encode(source, [choice(source, calls), code, choice(source, TEXTS), "", {"a": value(source)}])
        if kind == frames.EVENT:
            name = choice(source, [*messages.EVENTS, "newer.event"])
            return encode(source, [name, fields(source, messages.EVENTS.get(name, {}))])
        if kind == frames.LOG:
            return encode(source, ["agent", choice(source, (20, 20, 20, -1)), choice(source, TEXTS), 0])
        if kind == frames.CLOSE:
            return encode(source, [choice(source, ("", "internal", "x")), choice(source, TEXTS), ""])
        assert kind == frames.HELLO
        return self.hello()

    def hello(self) -> bytes:
        source, session = self.source, self.connection.session
        versions = choice(source, ([1, 1], [1, 1], [1, 7], [2, 9], [], [1], "1", [1, "x"]))
        capabilities = choice(source, ([], ["resume"], ["resume", "new"], [5]))
        number = choice(source, (session.id or b"s" * 16, session.id or b"s" * 16, b"o" * 16, b"short"))
        received = choice(source, (0, session.outbox.replay.sent, None, 5, -1))
        return encode(source, [versions, choice(source, TEXTS), capabilities, number, received, b""])

    def _integer(self, kind: int) -> int:
        source, session = self.source, self.connection.session
        size = 8 * frames.INTEGERS[kind]
        if kind == frames.CANCEL and session._remote_calls and chance(source, 2):
            return int(choice(source, sorted(session._remote_calls)))
        if kind == frames.EOF and chance(source, 2):
            totals = [stream.received for stream in session.streams.values()]
            return int(choice(source, [*totals, 0]))
        if kind == frames.ACK:
            return int(choice(source, (0, session.outbox.replay.sent, session.outbox.replay.sent, 1 << 40)))
        if kind == frames.WINDOW and chance(source, 2):
            return source.integer(1, 1000)
        return int(choice(source, EDGES if size == 32 else [e for e in BIG_EDGES if e >= 0])) % (1 << size)
