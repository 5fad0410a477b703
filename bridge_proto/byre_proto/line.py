"""A reliable byte stream over a line that is not one (a UART, a console): below the wire, without I/O or clock.

    receive_data(data, now)   bytes of the line        -> then `take_data()`, `take_noise()`, `over`
    send(data), end()         bytes for the peer, at most `room` of them; and their end
    data_to_send(now)         bytes for the line, when it takes some; again after every other verb
    next_timeout, on_time     when this wants to be asked again, and the asking

`now` is any clock in seconds that does not go back.  Specified in WIRE.md, section 13.

Synchronisation.  Each side has a nonce, new for every `Line`, and repeats SYNC until it hears its own nonce
back.  From then on both nonces are in every checksum: what an earlier line left behind, and what a line reflects,
is noise.  A SYNC with a new nonce says that the peer has begun anew: then this line is over, for nothing of the
old stream may be taken for the new one's.

Resends.  Frames are numbered; the receiver keeps what came early, and says in each ACK what it has.  A line does
not overtake: a frame is lost once one that was sent after it has arrived, and is sent again at once.  The timer is
for the last ones only.  A line that is silent is waited for without end: the program has the clock.

Rule: whatever arrives raises nothing, and makes nothing grow beyond the limits here.
"""

from __future__ import annotations

import os
import struct
import zlib

from .deques import deque
from .stuffing import Splitter, checked, stuffed, unstuffed

# -- limits, which are part of the version -----------------------------------------------------------------

#: Bytes of the stream in one frame: 50 ms at 115,200 baud, stuffed; what surrounds it costs 2 % of it.
MAX_PAYLOAD = 512

#: Frames under way, and so those that a receiver keeps early: 32 KiB, which a terminal driver's buffers hold.
MAX_WINDOW = 64

# -- this implementation's choices -------------------------------------------------------------------------

#: Bytes of the stream in one frame at first, and at least; more with each frame that arrives, less with each that
#: is lost: where each thousandth byte is hurt half of the largest frames are, of the smallest ones one in twenty.
FIRST_PAYLOAD = 128
MIN_PAYLOAD = 32
MORE_PAYLOAD = 16

#: Frames under way at first, and at least: with two the line is busy while the first one's answer comes.
FIRST_WINDOW = 4
MIN_WINDOW = 2

#: The window shrinks while a frame takes this much longer, in seconds, than the quickest took: the rest only waits
#: in buffers on the way, where no control frame can overtake it.
MAX_DELAY = 0.1

#: Bytes taken ahead of what is under way.  What is taken is out of reach of newer control frames.
MAX_UNSENT = 2 * MAX_PAYLOAD

#: Largest DATA frame of the wire that a program should send over a line: a control frame waits for a whole one.
MAX_DATA = 1024

#: Seconds until a frame is sent again: at first, at least (an emulated guest often answers late), at most.
FIRST_TIMEOUT = 0.5
MIN_TIMEOUT = 0.1
MAX_TIMEOUT = 4.0

#: Seconds between two SYNCs, growing from the first to the second.
SYNC_SECONDS = (0.1, 2.0)

# -- the wire ----------------------------------------------------------------------------------------------

#: The first byte of a body.  Letters, since they need no escape.
SYNC, SYNCED, DATA, ACK = b"SYDA"

NONCE_SIZE = 8
NO_NONCE = bytes(NONCE_SIZE)
SYNC_SIZE = 1 + 2 * NONCE_SIZE

_DATA = struct.Struct("!BHH")  # kind, number, next number expected
_ACK = struct.Struct("!BH")  # kind, next number expected; then the map of early ones
_NUMBERS = 1 << 16


class _Sent:
    """A frame under way."""

    __slots__ = ("at", "due", "number", "order", "payload", "resent")

    def __init__(self, number: int, payload: bytes) -> None:
        self.number = number
        self.payload = payload
        self.order = 0  # counts what is sent: a line keeps this order
        self.at = 0.0
        self.due = True
        self.resent = False


class Line:
    """See the module's text.  `nonce` is given by tests only."""

    def __init__(self, nonce: bytes | None = None) -> None:
        self.in_step = False
        #: Why there is nothing more to come from this line; "" while there may be.
        self.over = ""
        self._nonce = nonce or os.urandom(NONCE_SIZE)
        self._peer = NO_NONCE
        self._splitter = Splitter(_DATA.size + MAX_PAYLOAD)
        self._say = SYNC  # a SYNC or SYNCED to send, or 0
        self._sync_every = SYNC_SECONDS[0]
        self._sync_at: float | None = None
        self._seeds = (0, 0)  # of the checksums: ours, the peer's
        # what goes out
        self._unsent = bytearray()
        self._end_wanted = False
        self._next_number = 0
        self._under_way: deque[_Sent] = deque()  # by number
        self._window = FIRST_WINDOW
        self._payload = FIRST_PAYLOAD
        self._order = 0
        self._timeout = FIRST_TIMEOUT
        self._timeout_at: float | None = None
        self._trip: tuple[float, float, float] | None = None  # smoothed, deviation, least
        # what comes in
        self._data = bytearray()
        self._expected = 0
        self._early: dict[int, bytes] = {}
        self._ack_due = False

    # -- what the program asks -----------------------------------------------------------------------------

    @property
    def room(self) -> int:
        """Bytes that `send` should be given at most now."""
        return max(0, MAX_UNSENT - len(self._unsent))

    @property
    def idle(self) -> bool:
        """Everything that was sent, the end included, has arrived."""
        return not (self._unsent or self._end_wanted or self._under_way)

    def send(self, data: bytes) -> None:
        """Bytes for the peer.  More than `room` is kept as well, and delays what follows."""
        self._unsent += data

    def end(self) -> None:
        """No more bytes follow.  The peer hears of it behind all that was sent.  Harmless when repeated."""
        self._end_wanted = True

    def take_data(self) -> bytes:
        """The peer's bytes since the last call, in order, each once."""
        if not self._data:
            return b""
        taken, self._data = bytes(self._data), bytearray()
        return taken

    def take_noise(self) -> bytes:
        """What was on the line and no frame, bounded: a console's text, or what is left of broken frames."""
        return self._splitter.take_noise()

    # -- the clock -----------------------------------------------------------------------------------------

    @property
    def next_timeout(self) -> float | None:
        """When `on_time` is due; None: no sooner than something else happens."""
        if self.over:
            return None
        return self._timeout_at if self.in_step else self._sync_at

    def on_time(self, now: float) -> None:
        """It may be due; harmless when it is not.  Next: `data_to_send`."""
        due = self.next_timeout
        if due is None or now < due:
            return
        if not self.in_step:
            self._say = SYNC
            self._sync_at = now + self._sync_every
            self._sync_every = min(2 * self._sync_every, SYNC_SECONDS[1])
            return
        self._under_way[0].due = True  # alone: the answer tells which of the others are missing
        self._timeout = min(2 * self._timeout, MAX_TIMEOUT)
        self._timeout_at = now + self._timeout

    # -- what goes out -------------------------------------------------------------------------------------

    def data_to_send(self, now: float) -> bytes:
        """Bytes for the line; b"" when there is nothing to say.  Ask only when the line takes some."""
        out = []
        if self._say and not self.over:
            body = bytes((self._say,)) + self._nonce + self._peer
            out.append(stuffed(body, 0))
            self._say = 0
            if not self.in_step and self._sync_at is None:
                self._sync_at = now + self._sync_every
        if self.in_step and not self.over:
            self._fill_window()
            for frame in self._under_way:
                if frame.due:
                    out.append(self._transmit(frame, now))
        if self._ack_due:
            self._ack_due = False
            body = _ACK.pack(ACK, self._expected % _NUMBERS) + self._early_map()
            out.append(stuffed(body, self._seeds[0]))
        return b"".join(out)

    def _fill_window(self) -> None:
        """Cut what is unsent into frames, as far as the window goes; the end is an empty one."""
        arriving = sum(1 for frame in self._under_way if frame.order >= 0)
        while arriving < self._window and len(self._under_way) < MAX_WINDOW and (self._unsent or self._end_wanted):
            payload = bytes(self._unsent[: self._payload])
            del self._unsent[: self._payload]
            if not payload:
                self._end_wanted = False
            self._under_way.append(_Sent(self._next_number, payload))
            self._next_number += 1
            arriving += 1

    def _transmit(self, frame: _Sent, now: float) -> bytes:
        self._order += 1
        frame.resent = frame.order > 0
        frame.order, frame.at, frame.due = self._order, now, False
        if self._timeout_at is None:
            self._timeout_at = now + self._timeout
        if not self._early:
            self._ack_due = False  # this says it as well
        head = _DATA.pack(DATA, frame.number % _NUMBERS, self._expected % _NUMBERS)
        return stuffed(head + frame.payload, self._seeds[0])

    def _early_map(self) -> bytes:
        """Bit 0 of the first byte is the frame after the expected one."""
        bits = 0
        for number in self._early:
            bits |= 1 << (number - self._expected - 1)
        return bits.to_bytes(MAX_WINDOW // 8, "little").rstrip(b"\0")

    # -- what comes in -------------------------------------------------------------------------------------

    def receive_data(self, data: bytes | bytearray | memoryview, now: float) -> None:
        """Take in bytes of the line.  Next: `take_data`, `over`, `data_to_send`."""
        for piece in self._splitter.pieces(bytes(data)):
            if not self._take_frame(unstuffed(piece), now):
                self._splitter.noise(piece)

    def _take_frame(self, data: bytes, now: float) -> bool:
        """Whether it was one."""
        if data[:1] in (b"S", b"Y"):
            body = checked(data, 0)
            if len(body) == SYNC_SIZE:
                self._on_sync(body[0], body[1 : 1 + NONCE_SIZE], body[1 + NONCE_SIZE :])
        elif self.in_step:
            body = checked(data, self._seeds[1])
            if body[:1] == b"D" and _DATA.size <= len(body) <= _DATA.size + MAX_PAYLOAD:
                _, number, expected = _DATA.unpack_from(body)
                self._on_ack(expected, 0, now)
                self._on_data(number, body[_DATA.size :])
            elif body[:1] == b"A" and _ACK.size <= len(body) <= _ACK.size + MAX_WINDOW // 8:
                _, expected = _ACK.unpack_from(body)
                self._on_ack(expected, int.from_bytes(body[_ACK.size :], "little"), now)
        else:
            return False
        return bool(body)

    def _on_sync(self, kind: int, theirs: bytes, echo: bytes) -> None:
        if theirs in (self._nonce, NO_NONCE) or self.over:
            return  # our own, reflected by the line; or one that nobody sends
        if self.in_step:
            if kind == SYNC and theirs == self._peer:
                self._say = SYNCED  # it has not heard the first one
            elif kind == SYNC:
                self.over = "the peer began anew"
            return
        if echo == self._nonce:
            self._peer = theirs
            self.in_step = True
            self._seeds = (zlib.crc32(self._nonce + theirs), zlib.crc32(theirs + self._nonce))
            self._say = SYNCED if kind == SYNC else 0
        elif theirs != self._peer:
            self._peer = theirs
            self._say = SYNC

    def _on_data(self, number: int, payload: bytes) -> None:
        ahead = (number - self._expected) % _NUMBERS
        self._ack_due = True  # of a repeated one as well: its answer was lost
        if self.over or ahead >= MAX_WINDOW:
            return
        self._early[self._expected + ahead] = payload
        while self._expected in self._early and not self.over:
            payload = self._early.pop(self._expected)
            self._expected += 1
            self._data += payload
            if not payload:
                self.over = "the peer ended it"
                self._early.clear()

    def _on_ack(self, expected: int, early: int, now: float) -> None:
        """`expected` is the number that the peer lacks, `early` a bit for each one after it that it has."""
        under_way = self._under_way
        oldest = under_way[0].number if under_way else self._next_number
        arrived = (expected - oldest) % _NUMBERS
        if arrived > len(under_way):
            return  # older than what is known, or of what was never sent
        news = [under_way.popleft() for _ in range(arrived)]
        for frame in under_way:
            at = frame.number - oldest - arrived - 1
            if at >= 0 and early >> at & 1:
                news.append(frame)
        news = [frame for frame in news if frame.order > 0]
        if not news:
            return
        newest = max(news, key=_order)
        self._measure(None if newest.resent else now - newest.at)
        last = newest.order
        for frame in news:
            frame.order, frame.due = -1, False  # arrived; kept only where an older one has not
            self._payload = min(self._payload + MORE_PAYLOAD, MAX_PAYLOAD)
        for frame in under_way:
            if 0 < frame.order < last and not frame.due:
                frame.due = True
                self._payload = max(self._payload * 3 // 4, MIN_PAYLOAD)
        self._timeout_at = now + self._timeout if under_way else None

    def _measure(self, trip: float | None) -> None:
        """The timeout of RFC 6298, and the window by the delay beyond the least.

        None: the frame was sent twice and it cannot be told which was answered; the timeout stops growing.
        """
        if self._trip is None:
            if trip is None:
                return
            self._trip = trip, trip / 2, trip
        smoothed, deviation, least = self._trip
        if trip is not None:
            deviation += (abs(trip - smoothed) - deviation) / 4
            smoothed += (trip - smoothed) / 8
            least = min(least, trip)
            self._trip = smoothed, deviation, least
            wider = trip <= least + MAX_DELAY
            self._window = min(max(self._window + (1 if wider else -1), MIN_WINDOW), MAX_WINDOW)
        self._timeout = min(max(smoothed + 4 * deviation, MIN_TIMEOUT), MAX_TIMEOUT)


def _order(frame: _Sent) -> int:
    return frame.order
