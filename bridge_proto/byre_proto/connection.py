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

A wait for the handshake has no end of its own: the program has the clock, and gives up by `close`.
"""

from __future__ import annotations

import os
import zlib

from . import events, frames, limits
from .deques import deque
from .encoding import pack, text, unpack, unpack_fields
from .errors import BY_CODE, ByreError, PermissionRefused, ResourceExhausted, from_wire, printable
from .frames import HEADER_SIZE, FrameBuffer, LocalProtocolError, RemoteProtocolError
from .session import Session

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
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


class SessionLost(ByreError, ConnectionError):
    """The old session cannot go on over this connection; what was under way in it has no known outcome."""

    code = "session-lost"


class ChannelEnded(ByreError, ConnectionError):
    """The channel ended without a CLOSE: the peer died, or the channel was cut."""

    code = "channel-ended"


BY_CODE.update({cls.code: cls for cls in (VersionMismatch, ProofRefused, SessionLost)})


def preface(nonce: bytes, echo: bytes) -> bytes:
    """One preface: magic, own nonce, the other's nonce (zeros when not known), CRC-32 of all of it."""
    body = MAGIC + nonce + echo
    return body + zlib.crc32(body).to_bytes(4, "big")


class Connection:
    """See the module's text.

    `first` is the side that opened the channel (the host).  `session` is the one to resume; on the second side
    `.session` is another object once Connected is reported for a session that it did not know.  A second side that
    has several sessions gives `sessions`, which finds one by its id.  `secret` must be the same bytes on both
    sides, or None on both.
    """

    def __init__(
        self,
        *,
        first: bool,
        name: str,
        secret: bytes | None = None,
        session: Session | None = None,
        sessions: Callable[[bytes], Session | None] | None = None,
        capabilities: frozenset[str] = frozenset(),
        nonce: bytes | None = None,
        versions: tuple[int, int] = VERSIONS,
    ) -> None:
        self.session = session if session is not None else Session(first=first)
        self.close_due = False
        self.error: ByreError | None = None
        self._first = first
        self._sessions = sessions
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
        self._again: deque[tuple[bytes, ...]] = deque()  # frames of a resumed session, before its new ones
        self._events: list[events.Event] = []
        if first:
            self.session.id = self.session.id or os.urandom(NONCE_SIZE)
            self.session.carrier = self._nonce

    @property
    def connected(self) -> bool:
        """The handshake is complete and the connection is not over."""
        return self._state == OPEN

    @property
    def lacking(self) -> int:
        """Bytes that a frame which has begun still lacks: data that end there are taken in without a copy."""
        return self._frames.lacking

    # -- the four verbs ------------------------------------------------------------------------------------

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        """Take in bytes of any size.  Next: `take_events`, `data_to_send`, `close_due`."""
        try:
            self._check_session()
            if self._state == OVER:
                return
            if self._state == PREFACE:
                rest = self._find_preface(data)
                if rest is None:
                    return
                data = rest
            for kind, stream, payload in self._frames.frames(data):
                if self._state == OPEN and kind != frames.CLOSE:
                    self.session.receive_frame(kind, stream, payload)
                else:
                    self._receive_frame(kind, payload)
                    if self._state == OVER:
                        return
            if self.session.outbox.choked:
                self._check_session()
        except ByreError as error:
            self._fail(error)

    def take_events(self) -> list[events.Event]:
        """What happened since the last call, oldest first; `Closed` is the last of all."""
        taken, self._events = self._events, []
        if self.session.events and self.session.carrier == self._nonce:
            taken.extend(self.session.events)
            self.session.events.clear()
        if self._state == OVER:
            taken.sort(key=lambda event: isinstance(event, events.Closed))
        return taken

    def data_to_send(self, most: int = 256 * 1024) -> list[bytes]:
        """Buffers for the channel, about `most` bytes together; [] when there is nothing (more) to send.

        A large DATA frame is two buffers, header and payload: join them, or use sendmsg or writev.  Take no more
        than the channel takes: what was taken is out of reach of newer control frames.
        """
        try:
            self._check_session()
        except ByreError as error:
            self._fail(error)
        out = self._handshake
        self._handshake = []
        if self._state == OPEN:
            size = sum(map(len, out))
            while size < most:
                frame = self._again.popleft() if self._again else self.session.outbox.next_frame()
                if frame is None:
                    break
                out.extend(frame)
                size += sum(map(len, frame))
        return out

    def receive_eof(self) -> None:
        """The channel ended.  Next: `take_events`."""
        if self._state == OPEN:
            self._over(ChannelEnded("the channel ended without a word"))
        elif self._state != OVER:
            self._over(ChannelEnded("the channel ended in the handshake"))

    def close(self, error: ByreError | None = None) -> None:
        """End the connection; the peer is told why.  Queued frames are dropped.  Harmless when repeated."""
        if self._state != OVER:
            self._say_close(error)
            self._over(error)

    def _check_session(self) -> None:
        """End a connection whose session went on elsewhere, or whose peer does not read what it causes."""
        if self._state == OVER:
            return
        if (self._first or self._state == OPEN) and self.session.carrier != self._nonce:
            raise SessionLost("the session goes on over another connection")
        if self._state == OPEN and self.session.outbox.choked:
            raise ResourceExhausted(f"the peer left over {limits.MAX_CONTROL_BACKLOG} bytes of control unread")

    # -- handshake -----------------------------------------------------------------------------------------

    def _find_preface(self, data: bytes | bytearray | memoryview) -> bytes | None:
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
        if theirs in (self._nonce, NO_NONCE):
            return False  # our own, reflected by the channel; or one that nobody sends
        if theirs != self._peer_nonce:
            self._peer_nonce = theirs
            self._handshake = [preface(self._nonce, theirs)]  # in place of what was meant for an older nonce
            if self._first:
                self._handshake.append(self._hello(self._versions, self.session.received))
        if echo != self._nonce:
            return False
        self._state = HELLO
        return True

    def _hello(self, versions: tuple[int, int], received: int | None) -> bytes:
        session = self.session.id
        proof = self._proof(self._first, session)
        hello = [list(versions), text(self._name, 200), sorted(self._capabilities), session, received, proof]
        return frames.encode(frames.HELLO, 0, pack(hello))

    def _proof(self, first: bool, session: bytes) -> bytes:
        """What the first (or second) side must say to show that it knows the secret."""
        if self._secret is None:
            return b""
        import hashlib  # here, because OpenSSL costs a guest without a secret tens of milliseconds at boot
        import hmac

        mine, theirs = self._nonce, self._peer_nonce
        nonces = mine + theirs if self._first else theirs + mine
        side = b"first" if first else b"second"
        return hmac.new(self._secret, b"byre1 " + side + nonces + session, hashlib.sha256).digest()

    def _check_proof(self, proof: bytes, session: bytes) -> None:
        if self._secret is None:
            if proof:
                raise ProofRefused("the peer asks for a secret, and none was given here")
            return
        import hmac

        if not hmac.compare_digest(proof, self._proof(not self._first, session)):
            raise ProofRefused("the peer does not know this VM's secret", hint="is another VM on this address?")

    def _receive_hello(self, payload: bytes) -> None:
        """Versions first, of whatever a newer peer says; then the proof; then the session."""
        (versions,) = unpack_fields(payload, list, more=True)
        version = self._common_version(versions)
        _, name, capabilities, session_id, received, proof = unpack_fields(
            payload, list, str, list, bytes, None, bytes, more=True
        )
        if (
            len(session_id) != NONCE_SIZE
            or (received or 0) < 0
            or not all(isinstance(c, str) for c in capabilities)
        ):
            raise RemoteProtocolError("a malformed HELLO")
        self._check_proof(proof, session_id)
        common = self._capabilities & frozenset(capabilities)
        if self._first:
            if session_id != self.session.id:
                raise RemoteProtocolError("the peer speaks of another session")
        else:
            known = self._adopt(session_id)
            self._handshake.append(self._hello((version, version), self.session.received if known else None))
        resumed = self.session.begun
        self._continue_session(received, RESUME in common)
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

    def _adopt(self, session_id: bytes) -> bool:
        """The first side chooses the session: whether it is the one that we have; else ours is a fresh one."""
        found = self._sessions(session_id) if self._sessions is not None else None
        if found is not None:
            self.session = found
        known = self.session.begun and self.session.id == session_id
        if self.session.begun and not known:
            self.session = Session(first=False)
        self.session.id = session_id
        return known

    def _continue_session(self, received: int | None, resumable: bool) -> None:
        """`received`: numbered frames that the peer took in, None when the session is new to it."""
        session, outbox = self.session, self.session.outbox
        again: list[tuple[bytes, ...]] | None = []
        if session.begun:
            kept = outbox.keep_for_replay and received is not None
            again = outbox.replay.resume(received or 0) if kept else None
        elif received:
            again = None
        if again is None:
            raise SessionLost("the session cannot go on: what is missing is no longer kept", hint="connect anew")
        session.begun = True
        session.carrier = self._nonce
        outbox.choked = False
        outbox.keep_for_replay = resumable
        self._again.extend(again)

    # -- frames --------------------------------------------------------------------------------------------

    def _receive_frame(self, kind: int, payload: bytes) -> None:
        """CLOSE at any time, HELLO at the beginning."""
        if kind == frames.CLOSE:
            code, message, hint = unpack_fields(payload, str, str, str)
            self._over(from_wire(code, f"the peer closed the connection: {message}", hint, {}) if code else None)
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
        parts = [error.code, text(error.message, 1000), text(error.hint, 1000)] if error else ["", "", ""]
        self._handshake.append(frames.encode(frames.CLOSE, 0, pack(parts)))

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
    "ChannelEnded",
    "Connection",
    "LocalProtocolError",
    "ProofRefused",
    "RemoteProtocolError",
    "SessionLost",
    "VersionMismatch",
    "preface",
    "unpack",
]
