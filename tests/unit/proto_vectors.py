"""The golden vectors of the wire:  python -m tests.unit.proto_vectors  writes bridge_proto/byre_proto/vectors/.

A vector is a list of steps for one side of one connection.  A step has one input and what must follow from it:

    input      {"receive": hex}  or  {"do": [action, arguments...]}  or  {"nothing": true}
    then       "events": what is reported, "send": what goes out, "refused": the error code of a wrong "do"

"send" is a list of hex strings, one for each preface or frame.  Where a frame has a text of this implementation's
own, {"frame": name, "code": error code} stands for it; texts are free, codes are not.

Received bytes are built here by hand (`struct` and msgpack alone), not by the code under test.  Bytes in events and
actions are written {"hex": ...}.  Nonces, session ids and secrets are fixed, so every run gives the same files.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import msgpack

from byre_proto import events
from byre_proto.connection import RESUME, Connection
from byre_proto.errors import BY_CODE, ByreError
from byre_proto.session import Session

from . import line_vectors

DIRECTORY = Path(__file__).parents[2] / "bridge_proto" / "byre_proto" / "vectors"

FIRST, SECOND, SESSION, SECRET = b"\x11" * 16, b"\x22" * 16, b"\x33" * 16, b"\x44" * 32
OTHER = b"\x55" * 16
ZEROS = bytes(16)

Step = dict[str, Any]
Vector = dict[str, Any]


# -- bytes by hand -----------------------------------------------------------------------------------------


def preface(nonce: bytes, echo: bytes) -> bytes:
    body = b"\x89BYRE\r\n\x1a" + nonce + echo
    return body + struct.pack("!I", zlib.crc32(body))


def frame(kind: int, stream: int, payload: bytes, *, flags: int = 0, length: int | None = None) -> bytes:
    return struct.pack("!IBBHI", len(payload) if length is None else length, kind, flags, 0, stream) + payload


def message(kind: int, *fields: Any) -> bytes:
    return frame(kind, 0, msgpack.Packer().pack(list(fields)))


def number(kind: int, stream: int, value: int) -> bytes:
    size = {5: 8, 9: 8, 13: 8, 14: 8, 15: 8}.get(kind, 4)
    return frame(kind, stream, value.to_bytes(size, "big"))


def hello(*fields: Any) -> bytes:
    return message(1, *fields, *[[1, 1], "peer", [], SESSION, 0, b""][len(fields) :])


def proof(side: bytes) -> bytes:
    return hmac.new(SECRET, b"byre1 " + side + FIRST + SECOND + SESSION, hashlib.sha256).digest()


REQUEST, REPLY, ERROR, CANCEL, EVENT, LOG = 2, 3, 4, 5, 6, 7
DATA, EOF, RESET, STOP, WINDOW, PING, PONG, ACK, CLOSE = range(8, 17)


def receive(*data: bytes) -> Step:
    return {"receive": b"".join(data).hex()}


def do(action: str, *arguments: Any) -> Step:
    return {"do": [action, *map(_plain, arguments)]}


NOTHING: Step = {"nothing": True}
TO_FIRST = receive(preface(SECOND, FIRST))
TO_SECOND = receive(preface(FIRST, SECOND))
OPEN_FIRST = receive(preface(SECOND, FIRST), hello([1, 1]))
OPEN_SECOND = receive(preface(FIRST, SECOND), hello([1, 1]))


# -- running them ------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """A value as JSON carries it."""
    if isinstance(value, (bytes, memoryview)):
        return {"hex": value.hex()}
    if isinstance(value, (frozenset, set)):
        return sorted(value)
    if isinstance(value, ByreError):
        return {"code": value.code, "message": value.message, "hint": value.hint, "data": _plain(value.data)}
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value


def _rich(value: Any) -> Any:
    """The reverse, for the arguments of actions."""
    if isinstance(value, dict) and set(value) == {"hex"}:
        return bytes.fromhex(value["hex"])
    if isinstance(value, dict) and set(value) == {"code", "message", "hint", "data"}:
        return BY_CODE.get(value["code"], ByreError)(value["message"], hint=value["hint"], **value["data"])
    if isinstance(value, dict):
        return {key: _rich(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rich(inner) for inner in value]
    return value


def event_record(event: events.Event) -> dict[str, Any]:
    if isinstance(event, events.Closed):
        return {"event": "Closed", "code": event.error.code if event.error else None}
    fields = {name: _plain(getattr(event, name)) for name in sorted(event.__slots__)}
    return {"event": type(event).__name__, **fields}


def sent_records(data: bytes, *, own_texts: bool) -> list[Any]:
    """Prefaces and frames as "send" has them."""
    records: list[Any] = []
    while data:
        size = 44 if data.startswith(b"\x89BYRE") else 12 + int.from_bytes(data[:4], "big")
        one, data = data[:size], data[size:]
        if size != 44 and one[4] in (ERROR, CLOSE) and own_texts:
            fields = msgpack.unpackb(one[12:])
            kind, code = ("ERROR", fields[1]) if one[4] == ERROR else ("CLOSE", fields[0])
            records.append({"frame": kind, "code": code})
        else:
            records.append(one.hex())
    return records


class Player:
    """One side under test; plays a vector's inputs and gives the steps with what followed."""

    def __init__(self, vector: Vector) -> None:
        self.first = vector["side"] == "first"
        self.settings = vector.get("settings", {})
        self.session: Session | None = None
        self.connect(FIRST if self.first else SECOND)

    def connect(self, nonce: bytes) -> None:
        """A connection; of the same session when there was one before."""
        session = self.session or Session(first=self.first)
        if self.first:
            session.id = session.id or SESSION
        secret = self.settings.get("secret")
        self.connection = Connection(
            first=self.first,
            name="byre",
            secret=None if secret is None else bytes.fromhex(secret),
            session=session,
            capabilities=frozenset(self.settings.get("capabilities", ())),
            nonce=nonce,
            versions=tuple(self.settings.get("versions", (1, 1))),
        )

    def play(self, step: Step) -> Step:
        played = {key: step[key] for key in ("receive", "do", "nothing") if key in step}
        if "receive" in step:
            self.connection.receive_data(bytes.fromhex(step["receive"]))
        elif "do" in step:
            try:
                self.act(*_rich(step["do"]))
            except ByreError as error:
                played["refused"] = error.code
        played["events"] = [event_record(event) for event in self.connection.take_events()]
        given_texts = step.get("do", [""])[0] in ("fail", "close")
        played["send"] = sent_records(b"".join(self._output()), own_texts=not given_texts)
        self.session = self.connection.session
        return played

    def _output(self) -> Any:
        while pieces := self.connection.data_to_send():
            yield from pieces

    def act(self, action: str, *arguments: Any) -> None:
        if action == "close":
            self.connection.close(*arguments)
        elif action == "end of channel":
            self.connection.receive_eof()
        elif action == "connect again":
            self.connect(*arguments)
        elif action in ("new_stream", "accept_stream"):
            *given, directions = arguments
            getattr(self.connection.session, action)(
                *given, sending="send" in directions, receiving="receive" in directions
            )
        else:
            getattr(self.connection.session, action)(*arguments)


def play(vector: Vector) -> Vector:
    player = Player(vector)
    return {**vector, "steps": [player.play(step) for step in vector["steps"]]}


# -- the vectors -------------------------------------------------------------------------------------------


def vector(description: str, side: str, *steps: Step, **settings: Any) -> Vector:
    """Every vector begins with the opening of its own side."""
    made = {"description": description, "side": side, "steps": [NOTHING, *steps]}
    return {**made, "settings": settings} if settings else made


HANDSHAKE = [
    vector("first side: it begins, the second was not listening yet", "first",
           receive(preface(SECOND, ZEROS)), receive(preface(SECOND, FIRST), hello([1, 1]))),
    vector("second side: the usual order", "second",
           receive(preface(FIRST, ZEROS)), receive(preface(FIRST, SECOND), hello([1, 1]))),
    vector("second side: the opening of the first was lost", "second", OPEN_SECOND),
    vector("bytes of an earlier connection and a boot log come first", "second",
           receive(b"[    0.000000] Linux version 6.1\r\n", preface(OTHER, b"\x66" * 16), message(EVENT, "x", {})),
           receive(preface(FIRST, SECOND), hello([1, 1]))),
    vector("a preface with a wrong checksum is noise", "second",
           receive(preface(FIRST, SECOND)[:-1] + b"\x00"), OPEN_SECOND),
    vector("the own preface, reflected by the channel, is noise", "first",
           receive(preface(FIRST, ZEROS)), receive(preface(FIRST, FIRST)), OPEN_FIRST),
    vector("a nonce of zeros is noise", "second", receive(preface(ZEROS, SECOND)), OPEN_SECOND),
    vector("a secret on both sides, seen from the first", "first", TO_FIRST,
           receive(hello([1, 1], "peer", [], SESSION, 0, proof(b"second"))), secret=SECRET.hex()),
    vector("a secret on both sides, seen from the second", "second", TO_SECOND,
           receive(hello([1, 1], "peer", [], SESSION, 0, proof(b"first"))), secret=SECRET.hex()),
    vector("a newer peer: the highest common version, capabilities in common, a field more", "second", TO_SECOND,
           receive(message(1, [2, 9], "newer", ["resume", "zip"], SESSION, 0, b"", {"more": 1})),
           versions=[1, 3], capabilities=[RESUME]),
    vector("a close in good order by the peer", "first", OPEN_FIRST, receive(message(CLOSE, "", "", ""))),
    vector("a close in good order here", "first", OPEN_FIRST, do("close")),
    vector("a close for a reason here", "second", OPEN_SECOND,
           do("close", ByreError("the VM shuts down", hint="start it again"))),
    vector("the channel ends without a word", "first", OPEN_FIRST, do("end of channel")),
]  # fmt: skip

INFO: dict[str, Any] = {"kernel": "6.1", "cpus": 2}
NO_SUCH = ByreError("it failed", hint="look")

CALLS = [
    vector("a call and its answer, seen from the asker", "first", OPEN_FIRST,
           do("request", "system.info", {}, None), receive(message(REPLY, 1, {"info": INFO}))),
    vector("a call and its answer, seen from the server", "second", OPEN_SECOND,
           receive(message(REQUEST, 1, "system.info", {}, None)), do("reply", 1, {"info": INFO})),
    vector("arguments take their defaults, fields of a newer peer are dropped", "second", OPEN_SECOND,
           receive(message(REQUEST, 1, "process.signal", {"process": 7, "signal": 9, "newer": 1}, 1500))),
    vector("an error as the answer", "first", OPEN_FIRST, do("request", "system.info", {}, 2.5),
           receive(message(ERROR, 1, "program-not-found", "no such program", "install it", {"path": "/bin/x"}))),
    vector("an error with a code of a newer peer and control characters", "first", OPEN_FIRST,
           do("request", "system.info", {}, None),
           receive(message(ERROR, 1, "brand-new", "a\x1b[31mb", "", {}))),
    vector("failing a call", "second", OPEN_SECOND, receive(message(REQUEST, 1, "system.info", {}, None)),
           do("fail", 1, NO_SUCH), do("fail", 1, NO_SUCH)),
    vector("cancellation: the verdict still comes", "first", OPEN_FIRST, do("request", "system.info", {}, None),
           do("cancel", 1), receive(message(ERROR, 1, "cancelled", "as asked", "", {})), do("cancel", 1)),
    vector("cancellation, seen from the server", "second", OPEN_SECOND,
           receive(message(REQUEST, 1, "system.info", {}, None)), receive(number(CANCEL, 0, 1)),
           do("reply", 1, {"info": {}}), receive(number(CANCEL, 0, 1))),
    vector("B44: a late answer is dropped", "first", OPEN_FIRST, do("request", "system.info", {}, 1),
           do("forget", 1), receive(message(REPLY, 1, {"info": {}})), receive(message(REPLY, 99, {}))),
    vector("B45: a wrong request fails here, nothing is sent", "first", OPEN_FIRST,
           do("request", "process.signal", {"process": "seven", "signal": 9}, None),
           do("request", "process.signal", {"process": 7}, None),
           do("request", "system.info", {"typo": 1}, None)),
    vector("B46: an unknown method is answered with its id", "second", OPEN_SECOND,
           receive(message(REQUEST, 5, "no.such", {}, None))),
    vector("B45: a request with wrong fields is answered with its id", "second", OPEN_SECOND,
           receive(message(REQUEST, 1, "process.signal", {"process": 7}, None))),
    vector("a result that the method does not give becomes an error", "second", OPEN_SECOND,
           receive(message(REQUEST, 1, "system.info", {}, None)), do("reply", 1, {"info": 5})),
    vector("events", "first", OPEN_FIRST,
           receive(message(EVENT, "process.exit", {"process": 7, "code": 137, "signal": 9, "stdout": 10})),
           receive(message(EVENT, "newer.event", {"x": 1}))),
    vector("sending an event", "second", OPEN_SECOND,
           do("event", "process.exit", {"process": 7, "code": 0, "signal": 0})),
    vector("log lines: one frame each", "second", OPEN_SECOND, do("log", "kernel", 20, "one\ntwo")),
    vector("a log line cannot forge another", "first", OPEN_FIRST,
           receive(message(LOG, "agent", 30, "x\ny\x1b", 3))),
    vector("pings", "first", OPEN_FIRST, do("ping", 81985529216486895), receive(number(PONG, 0, 81985529216486895)),
           receive(number(PING, 0, 5))),
    vector("arguments that are not UTF-8 pass unchanged (surrogate escapes here, the bytes on the wire)", "first",
           OPEN_FIRST, do("request", "process.create", {"args": ["ls", "caf\udce9"]}, None)),
]  # fmt: skip

CREATE = {"args": ["cat"], "stdin": 1, "stdout": 3}

STREAMS = [
    vector("a process with stdin and stdout, seen from the opener", "first", OPEN_FIRST,
           do("new_stream", "send"), do("new_stream", "receive"), do("request", "process.create", CREATE, None),
           do("send", 1, b"held back until the answer"), receive(message(REPLY, 1, {"process": 7, "pid": 70})),
           receive(frame(DATA, 3, b"out"), number(EOF, 3, 3)), do("consume", 3, 3), do("send_eof", 1)),
    vector("the same, seen from the server", "second", OPEN_SECOND,
           receive(message(REQUEST, 1, "process.create", CREATE, None)), do("accept_stream", 1, "receive"),
           do("accept_stream", 3, "send"), do("reply", 1, {"process": 7, "pid": 70}),
           receive(frame(DATA, 1, b"in")), do("consume", 1, 2), receive(number(EOF, 1, 2)),
           do("send", 3, b"out"), do("send_eof", 3)),
    vector("a request that fails ends its streams without a frame", "first", OPEN_FIRST,
           do("new_stream", "send"), do("request", "process.create", {"stdin": 1}, None), do("send", 1, b"lost"),
           receive(message(ERROR, 1, "program-not-found", "no", "", {})), do("reset", 1), do("stop", 1)),
    vector("ends asked for before the answer are said after it", "first", OPEN_FIRST,
           do("new_stream", "send"), do("new_stream", "receive"), do("request", "process.create", CREATE, None),
           do("reset", 1), do("stop", 3), receive(message(REPLY, 1, {"process": 7, "pid": 70}))),
    vector("credit: half of a window consumed gives it back and doubles it", "second", OPEN_SECOND,
           do("accept_stream", 1, "receive"), receive(frame(DATA, 1, bytes(8192))), do("consume", 1, 8191),
           do("consume", 1, 1)),
    vector("credit, seen from the sender", "first", OPEN_FIRST, do("new_stream", "send"),
           do("send", 1, bytes(16384)), do("send", 1, b"x"), receive(number(WINDOW, 1, 8192)), do("send", 1, b"x")),
    vector("reset throws away what waits", "first", OPEN_FIRST, do("new_stream", "send"), do("reset", 1, 1),
           do("send", 1, b"x"), do("reset", 1)),
    vector("a reset by the peer", "second", OPEN_SECOND, do("accept_stream", 1, "receive"),
           receive(frame(DATA, 1, b"some"), number(RESET, 1, 2)), do("consume", 1, 4)),
    vector("stop: data under way is dropped", "second", OPEN_SECOND, do("accept_stream", 1, "receive"),
           do("stop", 1, 3), receive(frame(DATA, 1, b"late"), number(EOF, 1, 4)), do("stop", 1)),
    vector("a stop by the peer", "first", OPEN_FIRST, do("new_stream", "send"), receive(number(STOP, 1, 3)),
           do("send", 1, b"x")),
    vector("frames on a stream that has ended are dropped", "second", OPEN_SECOND,
           do("accept_stream", 1, "receive"), receive(number(EOF, 1, 0)),
           receive(frame(DATA, 1, b"x"), number(EOF, 1, 0), number(RESET, 1, 0), number(STOP, 1, 0),
                   number(WINDOW, 1, 5))),
    vector("streams that a request may not name", "second", OPEN_SECOND, do("accept_stream", 2, "send"),
           do("accept_stream", 0, "send"), do("accept_stream", 1 << 32, "send"), do("accept_stream", 1, "send"),
           do("accept_stream", 1, "send")),
]  # fmt: skip

RESUMABLE = {"capabilities": [RESUME]}
OPEN_RESUMABLE = receive(preface(SECOND, FIRST), hello([1, 1], "peer", [RESUME], SESSION, None))
OPEN_SECOND_RESUMABLE = receive(preface(FIRST, SECOND), hello([1, 1], "peer", [RESUME]))


def again(side: str, received: int | None) -> Step:
    """The next connection's handshake, as the peer says it."""
    nonces = (b"\x77" * 16, b"\x66" * 16) if side == "first" else (b"\x66" * 16, b"\x77" * 16)
    return receive(preface(*nonces), hello([1, 1], "peer", [RESUME], SESSION, received))


SESSIONS = [
    vector("first side: what the peer has not taken in is sent again", "first", OPEN_RESUMABLE,
           do("request", "system.info", {}, None), do("request", "system.stacks", {}, None), do("ping", 1),
           do("end of channel"), do("connect again", b"\x66" * 16), again("first", 1), **RESUMABLE),
    vector("second side: the same", "second",
           OPEN_SECOND_RESUMABLE,
           do("event", "vm.exit", {"reason": "a"}), do("log", "agent", 20, "line"), do("end of channel"),
           do("connect again", b"\x77" * 16), again("second", 0), **RESUMABLE),
    vector("the peer has lost the session: nothing is repeated to it", "first", OPEN_RESUMABLE,
           do("request", "process.create", {"args": ["once"]}, None), do("end of channel"),
           do("connect again", b"\x66" * 16), again("first", None), **RESUMABLE),
    vector("the first side comes with a new session: the second begins afresh", "second",
           OPEN_SECOND_RESUMABLE, do("event", "vm.exit", {"reason": "a"}),
           do("end of channel"), do("connect again", b"\x77" * 16),
           receive(preface(b"\x66" * 16, b"\x77" * 16), hello([1, 1], "peer", [RESUME], OTHER)), **RESUMABLE),
    vector("a session that was not meant to resume", "first", OPEN_FIRST, do("end of channel"),
           do("connect again", b"\x66" * 16), receive(preface(b"\x77" * 16, b"\x66" * 16), hello([1, 1]))),
    vector("acknowledgement after 64 frames", "second",
           OPEN_SECOND_RESUMABLE,
           receive(*[number(CANCEL, 0, 9)] * 63), receive(number(CANCEL, 0, 9)), **RESUMABLE),
    vector("more is acknowledged than was sent", "first", OPEN_RESUMABLE, receive(number(ACK, 0, 1)), **RESUMABLE),
]  # fmt: skip


def bad(description: str, *data: bytes, side: str = "second", before: tuple[Step, ...] = ()) -> Vector:
    opened = OPEN_FIRST if side == "first" else OPEN_SECOND
    return vector(description, side, opened, *before, receive(*data))


NEGATIVE = [
    vector("no common version", "second", TO_SECOND, receive(hello([2, 3]))),
    vector("no common version, whatever else a HELLO has", "second", TO_SECOND, receive(message(1, [7, 9], {}))),
    vector("a wrong proof", "second", TO_SECOND,
           receive(hello([1, 1], "peer", [], SESSION, 0, proof(b"second"))), secret=SECRET.hex()),
    vector("no proof", "first", TO_FIRST, receive(hello([1, 1])), secret=SECRET.hex()),
    vector("a proof, and no secret here", "second", TO_SECOND,
           receive(hello([1, 1], "peer", [], SESSION, 0, proof(b"first")))),
    vector("a request before HELLO", "second", TO_SECOND, receive(message(REQUEST, 1, "system.info", {}, None))),
    vector("another session in the answer", "first", TO_FIRST, receive(hello([1, 1], "peer", [], OTHER))),
    vector("a malformed version range", "second", TO_SECOND, receive(hello(["1", "1"]))),
    bad("a second HELLO", hello([1, 1])),
    bad("a new preface", preface(OTHER, ZEROS)),
    bad("an unknown frame type", frame(17, 0, b"")),
    bad("flags", frame(PING, 0, bytes(8), flags=1)),
    bad("a stream id where none belongs", frame(PING, 1, bytes(8))),
    bad("no stream id where one belongs", frame(DATA, 0, b"x")),
    bad("a DATA frame over its limit, known from the header", frame(DATA, 1, b"", length=262145)),
    bad("a REQUEST frame over its limit, known from the header", frame(REQUEST, 0, b"", length=1048577)),
    bad("a PING of seven bytes", frame(PING, 0, bytes(7))),
    bad("a payload that is no msgpack", frame(REQUEST, 0, b"\xc1")),
    bad("bytes after the message", frame(EVENT, 0, msgpack.Packer().pack(["x", {}]) + b"\x00")),
    bad("a list that claims more than there is", frame(REQUEST, 0, b"\xdc\x3f\xff" * 100)),
    bad("a list over MAX_ELEMENTS", frame(REQUEST, 0, b"\xdc\x40\x01" + b"\xc0" * 16385)),
    bad("an extension type", frame(REQUEST, 0, b"\xd4\x05\x00")),
    bad("a map with integer keys", frame(EVENT, 0, b"\x92\xa1x\x81\x01\x02")),
    bad("a field missing", message(REQUEST, 1, "system.info", {})),
    bad("a field of another type", message(REQUEST, "1", "system.info", {}, None)),
    bad("a boolean is not a number", message(REQUEST, True, "system.info", {}, None)),
    bad("a call id used again", message(REQUEST, 1, "system.info", {}, None) * 2),
    bad("an event without its field", message(EVENT, "vm.exit", {})),
    bad("a result of the wrong shape", message(REPLY, 1, {"info": 5}), side="first",
        before=(do("request", "system.info", {}, None),)),
    bad("data beyond the credit", frame(DATA, 1, bytes(16385)), before=(do("accept_stream", 1, "receive"),)),
    bad("DATA without data", frame(DATA, 1, b""), before=(do("accept_stream", 1, "receive"),)),
    bad("an EOF with another total", number(EOF, 1, 5), before=(do("accept_stream", 1, "receive"),)),
    bad("credit of nothing", number(WINDOW, 1, 0), before=(do("accept_stream", 1, "send"),)),
    bad("credit beyond the largest window", number(WINDOW, 1, 1 << 21), before=(do("accept_stream", 1, "send"),)),
    bad("a stream of this side that was never opened", number(STOP, 2, 0)),
    bad("an acknowledgement that nobody asked for", number(ACK, 0, 1)),
    bad("a negative level", message(LOG, "s", -1, "m", 0)),
]  # fmt: skip

LINE_FILE = "line.json"
FILES = {
    "handshake.json": HANDSHAKE,
    "calls.json": CALLS,
    "streams.json": STREAMS,
    "sessions.json": SESSIONS,
    "negative.json": NEGATIVE,
}


def render(vectors: list[Vector]) -> str:
    """One file's text."""
    head = {"format": 1, "protocol": 1, "first_nonce": FIRST.hex(), "second_nonce": SECOND.hex()}
    return json.dumps({**head, "vectors": [play(v) for v in vectors]}, indent=1, ensure_ascii=True) + "\n"


def main() -> None:
    for name, vectors in FILES.items():
        (DIRECTORY / name).write_text(render(vectors))
    (DIRECTORY / LINE_FILE).write_text(line_vectors.render())


if __name__ == "__main__":
    main()
