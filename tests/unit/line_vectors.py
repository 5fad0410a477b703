"""The golden vectors of a line (WIRE.md, section 13); `python -m tests.unit.proto_vectors` writes them as well.

A vector is a list of steps for one side, whose nonce is OWN.  A step has a time in seconds, one input, and what
must follow: "data" and "noise" (hex), "send" (frames, unstuffed, without flags and checksum, in hex) and "over".
Received bytes are built here by hand.
"""

from __future__ import annotations

import json
import struct
import zlib
from typing import Any

from byre_proto.line import Line

OWN, PEER, NEWER, OTHER = (bytes((digit * 0x11,)) * 8 for digit in (1, 2, 3, 5))
ZEROS = bytes(8)

Step = dict[str, Any]
Vector = dict[str, Any]


def stuff(body: bytes, seed: bytes = b"") -> bytes:
    """By hand: the checksum goes over the seed and the body."""
    data = body + struct.pack("!I", zlib.crc32(seed + body))
    special = {*range(0x20), 0x7D, 0x7E, 0x7F, 0xFF}
    return b"\x7e" + b"".join(bytes((0x7D, b ^ 0x20)) if b in special else bytes((b,)) for b in data) + b"\x7e"


def opened(line: bytes) -> list[bytes]:
    """The bodies of frames whose checksums are right, by hand."""
    bodies = []
    for piece in filter(None, line.split(b"\x7e")):
        plain, escaped = bytearray(), False
        for byte in piece:
            if byte == 0x7D:
                escaped = True
            else:
                plain.append((byte ^ 0x20 if escaped else byte) ^ 0xAA)
                escaped = False
        body = bytes(plain[:-4])
        seed = b"" if body[:1] in (b"S", b"Y") else OWN + PEER
        assert struct.pack("!I", zlib.crc32(seed + body)) == plain[-4:]
        bodies.append(body)
    return bodies


def sync(nonce: bytes, echo: bytes, kind: bytes = b"S") -> bytes:
    return stuff(kind + nonce + echo)


def data(number: int, expected: int, payload: bytes, seed: bytes = PEER + OWN) -> bytes:
    return stuff(b"D" + struct.pack("!HH", number, expected) + payload, seed)


def ack(expected: int, early: bytes = b"") -> bytes:
    return stuff(b"A" + struct.pack("!H", expected) + early, PEER + OWN)


def receive(*frames: bytes, at: float = 0.0) -> Step:
    return {"at": at, "receive": b"".join(frames).hex()}


def send(payload: bytes, at: float = 0.0) -> Step:
    return {"at": at, "write": payload.hex()}


def clock(at: float) -> Step:
    return {"at": at, "nothing": True}


END: Step = {"at": 0.0, "end": True}
BEGIN = clock(0.0)
IN_STEP = receive(sync(PEER, OWN, b"Y"))
KERNEL = b"[    1.234567] a message of the kernel\r\n"


def vector(description: str, *steps: Step) -> Vector:
    return {"description": description, "steps": [BEGIN, *steps]}


LINE = [
    vector("the peer was there first", receive(sync(PEER, OWN, b"Y"))),
    vector("the peer comes later: its first SYNC is answered, its second believed",
           receive(sync(PEER, ZEROS)), receive(sync(PEER, OWN)), receive(sync(PEER, OWN))),
    vector("two in a row came before: the newest counts", receive(sync(OTHER, ZEROS), sync(PEER, ZEROS)), IN_STEP),
    vector("what nobody sends, or what comes back, is nothing",
           receive(sync(OWN, OWN), sync(ZEROS, OWN), sync(PEER, OWN)[:-3] + b"\x7e"), IN_STEP),
    vector("SYNC again and again while nobody is there, less often", clock(0.1), clock(0.3), clock(0.7),
           clock(1.5)),
    vector("bytes both ways, what each side sends acknowledges", IN_STEP, receive(data(0, 0, b"hello")),
           send(b"well met"), receive(ack(1)), receive(data(1, 1, b"again"))),
    vector("every byte there is", IN_STEP, receive(data(0, 0, bytes(range(256)))), send(bytes(range(64)))),
    vector("a frame that came twice is taken once, and answered twice", IN_STEP,
           receive(data(0, 0, b"once")), receive(data(0, 0, b"once"))),
    vector("frames that came early are kept and named", IN_STEP, receive(data(1, 0, b"b")),
           receive(data(9, 0, b"j")), receive(data(0, 0, b"a"))),
    vector("a frame beyond the window is not taken", IN_STEP, receive(data(64, 0, b"x")),
           receive(data(63, 0, b"y"))),
    vector("a broken frame is noise, and so is what the kernel says", IN_STEP,
           receive(KERNEL, data(0, 0, b"whole"), KERNEL, data(1, 0, b"broken")[:-3] + b"\x7e")),
    vector("control characters in a frame are the line's own", IN_STEP,
           receive(data(0, 0, b"stop").replace(b"o", b"\x11o\x13").replace(b"t", b"\r\nt"))),
    vector("a frame of another line, or of this one reflected, is noise", IN_STEP,
           receive(data(0, 0, b"old", OTHER + OWN), data(0, 0, b"own", OWN + PEER))),
    vector("a frame is lost when a later one has arrived", IN_STEP, send(b"x" * 300), receive(ack(0, b"\x01")),
           receive(ack(3))),
    vector("the last one is sent again by the clock", IN_STEP, send(b"last"), clock(5.0)),
    vector("an acknowledgement of what was never sent is nothing", IN_STEP, send(b"x"), receive(ack(7)),
           clock(5.0)),
    vector("the end, in order", IN_STEP, receive(data(1, 0, b"")), receive(data(0, 0, b"last words")),
           receive(data(1, 0, b""))),
    vector("its own end", IN_STEP, send(b"last words"), END, receive(ack(2))),
    vector("the peer began anew", IN_STEP, receive(data(0, 0, b"old")), receive(sync(NEWER, ZEROS)),
           receive(data(0, 0, b"new", NEWER + OWN))),
    vector("the peer has not heard that it was heard", IN_STEP, receive(sync(PEER, OWN)),
           receive(sync(PEER, OWN, b"Y"))),
]  # fmt: skip


def play(vector: Vector) -> Vector:
    line = Line(OWN)
    return {**vector, "steps": [_step(line, step) for step in vector["steps"]]}


def _step(line: Line, step: Step) -> Step:
    now = step["at"]
    line.on_time(now)
    if "receive" in step:
        line.receive_data(bytes.fromhex(step["receive"]), now)
    elif "write" in step:
        line.send(bytes.fromhex(step["write"]))
    elif "end" in step:
        line.end()
    played = {key: step[key] for key in ("at", "receive", "write", "end", "nothing") if key in step}
    played["data"], played["noise"] = line.take_data().hex(), line.take_noise().hex()
    played["send"] = [body.hex() for body in opened(line.data_to_send(now))]
    played["over"] = bool(line.over)
    return played


def render() -> str:
    """The file's text."""
    head = {"format": 1, "nonce": OWN.hex(), "peer": PEER.hex()}
    return json.dumps({**head, "vectors": [play(v) for v in LINE]}, indent=1) + "\n"
