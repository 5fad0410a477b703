"""The protocol of one connection, without I/O: preface, handshake, then the session's frames.

Four verbs are the whole seam to the world:

    receive_data(data)   feed bytes from the channel      -> then take `take_events()` and `data_to_send()`
    take_events()        what happened, oldest first
    data_to_send(most)   bytes for the channel            -> again after every verb and every action
    close_due            the channel should be closed once data_to_send() is empty

The core never raises on what a peer sends: it records the error, says CLOSE, reports `Closed` and sets
`close_due`.  What the program wants (requests, streams) is asked of `.session`.

Handshake.  A channel may deliver bytes of an earlier connection, or lose bytes sent before the other side
listened.  So each side sends PREFACE(own nonce, echoed nonce) when it begins, with zeros for the echo, and again
for every new nonce that it sees.  All before a preface that echoes the own nonce is thrown away; frames follow it.

    first side          second side
    PREFACE a,0    ->   (may be lost: not open yet)
                   <-   PREFACE b,0
    PREFACE a,b    ->
    HELLO          ->   checks version and proof
                   <-   PREFACE b,a  HELLO            both are connected; one round trip

HELLO carries versions, capabilities, the session id, how much of the session was received, and, where the VM has
a secret, HMAC-SHA256(secret, side | both nonces | session): each side proves itself before anything is believed.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import zlib

from . import events, frames, limits
from .errors import BY_CODE, ByreError, PermissionRefused, from_wire, printable
from .frames import HEADER_SIZE, FrameBuffer, LocalProtocolError, RemoteProtocolError
from .session import Session, pack, unpack, unpack_fields

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: Versions that this code speaks, lowest and highest.
VERSIONS = (1, 1)

#: Not text, not UTF-8, changed by anything that translates line ends or strips the eighth bit (as PNG's is).
MAGIC = b"\x89BYRE\r\n\x1a"
NONCE_SIZE = 16
PREFACE_SIZE = len(MAGIC) + 2 * NONCE_SIZE + 4
NO_NONCE = bytes(NONCE_SIZE)

#: A session that may go on over another connection.
RESUME = "resume"

# States, in order.
PREFACE, HELLO, OPEN, OVER = range(4)


class VersionMismatch(ByreError, ConnectionError):
    """The peers have no protocol version in common (B46)."""

    code = "version-mismatch"


class ProofRefused(PermissionRefused):
    """The peer did not prove that it knows the VM's secret."""

    code = "proof-refused"


BY_CODE.update({cls.code: cls for cls in (VersionMismatch, ProofRefused)})


def preface(nonce: bytes, echo: bytes) -> bytes:
    """One preface: magic, own nonce, the other's nonce (zeros when not known), CRC-32 of all of it."""
    body = MAGIC + nonce + echo
    return body + zlib.crc32(body).to_bytes(4, "big")


class Connection:
    """See the module's text.

    `first` is the side that opened the channel (the host).  `session` is carried over to resume it.  `secret` must
    be the same bytes on both sides, or None on both.
    """

    def __init__(
        self,
        *,
        first: bool,
        name: str,
        secret: bytes | None = None,
        session: Session | None = None,
        capabilities: frozenset[str] = frozenset(),
        nonce: bytes | None = None,
        versions: tuple[int, int] = VERSIONS,
    ) -> None:
        self.session = session if session is not None else Session(first=first)
        if first and not self.session.id:
            self.session.id = os.urandom(16)
        self.close_due = False
        self.error: ByreError | None = None
        self._first = first
        self._name = name
        self._secret = secret
        self._capabilities = capabilities
        self._versions = versions
        self._state = PREFACE
        self._nonce = nonce or os.urandom(NONCE_SIZE)
        self._peer_nonce = NO_NONCE
        self._noise = bytearray()
        self._noise_seen = 0
        self._frames = FrameBuffer()
        self._handshake = [preface(self._nonce, NO_NONCE)]  # goes out before any frame
        self._events: list[events.Event] = []

    @property
    def connected(self) -> bool:
        """The handshake is complete and the connection is not over."""
        return self._state == OPEN

    # -- the four verbs ------------------------------------------------------------------------------------

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        """Take in bytes of any size.  Next: `take_events`, `data_to_send`, `close_due`."""
        if self._state == OVER:
            return
        try:
            if self._state == PREFACE:
                rest = self._find_preface(bytes(data))
                if rest is None:
                    return
                data = rest
            self._frames.feed(data)
            for kind, stream, payload in self._frames.frames():
                self._receive_frame(kind, stream, payload)
                if self._state == OVER:
                    return
        except ByreError as error:
            self._fail(error)

    def take_events(self) -> list[events.Event]:
        """What happened since the last call, oldest first."""
        taken, self._events = self._events, []
        if self.session.events:
            taken.extend(self.session.events)
            self.session.events.clear()
        if self._state == OVER:
            taken.sort(key=lambda event: isinstance(event, events.Closed))
        return taken

    def data_to_send(self, most: int = 256 * 1024) -> list[bytes]:
        """Buffers for the channel, about `most` bytes together; [] when there is nothing (more) to send."""
        out = self._handshake
        self._handshake = []
        size = sum(map(len, out))
        if self._state == OPEN:
            next_frame = self.session.next_frame
            while size < most:
                frame = next_frame()
                if frame is None:
                    break
                out.append(frame)
                size += len(frame)
        return out

    def receive_eof(self) -> None:
        """The channel ended.  Next: `take_events`."""
        if self._state != OVER:
            self._over(None if self._state == OPEN else RemoteProtocolError("the channel ended in the handshake"))

    def close(self, error: ByreError | None = None) -> None:
        """End the connection; the peer is told why.  Queued frames are dropped.  Harmless when repeated."""
        if self._state != OVER:
            self._say_close(error)
            self._over(error)

    # -- handshake -----------------------------------------------------------------------------------------

    def _find_preface(self, data: bytes) -> bytes | None:
        """Throw away all before the preface that echoes our nonce; returns what follows it, None: not yet."""
        self._noise += data
        self._noise_seen += len(data)
        while True:
            start = self._noise.find(MAGIC)
            if start < 0:
                del self._noise[: max(0, len(self._noise) - len(MAGIC) + 1)]
                break
            del self._noise[:start]
            if len(self._noise) < PREFACE_SIZE:
                break
            found = bytes(self._noise[:PREFACE_SIZE])
            if zlib.crc32(found[:-4]) != int.from_bytes(found[-4:], "big"):
                del self._noise[:1]
                continue
            del self._noise[:PREFACE_SIZE]
            if self._take_preface(found[len(MAGIC) : -4]):
                rest, self._noise = bytes(self._noise), bytearray()
                return rest
        if self._noise_seen > limits.MAX_NOISE:
            raise RemoteProtocolError(f"no preface in {self._noise_seen} bytes", hint="is this a byre agent?")
        return None

    def _take_preface(self, nonces: bytes) -> bool:
        """Answer a preface; True when it echoes our nonce, so that frames follow it."""
        theirs, echo = nonces[:NONCE_SIZE], nonces[NONCE_SIZE:]
        if theirs == self._nonce:
            return False  # our own, reflected by the channel
        if theirs != self._peer_nonce:
            self._peer_nonce = theirs
            self._handshake.append(preface(self._nonce, theirs))
            if self._first:
                self._handshake.append(self._hello(self._versions))
        if echo != self._nonce:
            return False
        self._state = HELLO
        return True

    def _hello(self, versions: tuple[int, int]) -> bytes:
        session = self.session
        capabilities = sorted(self._capabilities)
        hello = [
            list(versions),
            self._name,
            capabilities,
            session.id,
            session.received,
            self._proof(self._first),
        ]
        return frames.encode(frames.HELLO, 0, pack(hello))

    def _proof(self, first: bool) -> bytes:
        """What the first (or second) side must say to show that it knows the secret."""
        if self._secret is None:
            return b""
        mine, theirs = self._nonce, self._peer_nonce
        nonces = mine + theirs if self._first else theirs + mine
        side = b"first" if first else b"second"
        return hmac.new(self._secret, b"byre1 " + side + nonces + self.session.id, hashlib.sha256).digest()

    def _receive_hello(self, payload: bytes) -> None:
        versions, name, capabilities, session_id, received, proof = unpack_fields(
            payload, list, str, list, bytes, int, bytes
        )
        version = self._common_version(versions)
        if len(session_id) != NONCE_SIZE or received < 0 or not all(isinstance(c, str) for c in capabilities):
            raise RemoteProtocolError("a malformed HELLO")
        if not self._first:
            self._adopt(session_id)
        elif session_id != self.session.id:
            raise RemoteProtocolError("the peer speaks of another session")
        if not hmac.compare_digest(proof, self._proof(not self._first)):
            raise ProofRefused("the peer does not know this VM's secret", hint="is another VM on this address?")
        common = self._capabilities & frozenset(capabilities)
        if not self._first:
            self._handshake.append(self._hello((version, version)))
        resumed = self._continue_session(received, RESUME in common)
        self._state = OPEN
        self._events.append(events.Connected(version, printable(name)[:200], common, resumed))

    def _common_version(self, versions: list[Any]) -> int:
        if len(versions) != 2 or not all(type(v) is int for v in versions):
            raise RemoteProtocolError("a malformed version range")
        version: int = min(self._versions[1], versions[1])
        if version < max(self._versions[0], versions[0]):
            raise VersionMismatch(
                f"this side speaks versions {self._versions[0]} to {self._versions[1]}, "
                f"the peer {versions[0]} to {versions[1]}",
                hint="update the older side: rebuild the image or upgrade byre",
            )
        return version

    def _adopt(self, session_id: bytes) -> None:
        """The first side chooses the session; another id than the one we have means a fresh one."""
        if self.session.id and self.session.id != session_id:
            self.session = Session(first=False)
        self.session.id = session_id

    def _continue_session(self, received: int, resumable: bool) -> bool:
        session = self.session
        resumed = bool(session.received or session.replay.sent)
        if resumed or received:
            again = session.resume(received)
            if again is None:
                raise RemoteProtocolError("the session cannot go on: what is missing is no longer kept")
            self._handshake.extend(again)
        session.keep_for_replay = resumable
        return resumed

    # -- frames --------------------------------------------------------------------------------------------

    def _receive_frame(self, kind: int, stream: int, payload: bytes) -> None:
        if kind == frames.CLOSE:
            code, message, hint = unpack_fields(payload, str, str, str)
            self._over(from_wire(code, message, hint, {}) if code else None)
        elif self._state == OPEN:
            self.session.receive_frame(kind, stream, payload)
        elif kind == frames.HELLO:
            self._receive_hello(payload)
        else:
            raise RemoteProtocolError(f"{frames.TYPES[kind][0]} before HELLO")

    def _fail(self, error: ByreError) -> None:
        """The peer broke the protocol: tell it, and end."""
        self._say_close(error)
        self._over(error)

    def _say_close(self, error: ByreError | None) -> None:
        if self._state == PREFACE:
            return  # nobody is known to listen
        parts = (error.code, error.message[:1000], error.hint[:1000]) if error else ("", "", "")
        self._handshake.append(frames.encode(frames.CLOSE, 0, pack(list(parts))))

    def _over(self, error: ByreError | None) -> None:
        self._state = OVER
        self.close_due = True
        self.error = error
        self._events.append(events.Closed(error))


__all__ = [
    "HEADER_SIZE",
    "MAGIC",
    "PREFACE_SIZE",
    "RESUME",
    "VERSIONS",
    "Connection",
    "LocalProtocolError",
    "ProofRefused",
    "RemoteProtocolError",
    "VersionMismatch",
    "preface",
    "unpack",
]
