"""Two lines with bad wire between them, and a clock that the test owns."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterator

from byre_proto.line import Line
from tests.bad_line import BadWire

#: Seconds of the played clock after which what has not arrived never will.
LIMIT = 3600.0

#: What becomes of a few bytes of the wire.
Wire = Callable[[bytes], bytes]


class World:
    """`lines[0]` and `lines[1]`; what they took in is in `got`, and how often they sent how much in `raw`."""

    def __init__(
        self, *wires: Wire, seed: int = 0, baud: float = 115_200, delay: float = 0.001, cut: int = 4096
    ) -> None:
        self.now = 0.0
        self.lines = [Line(bytes((side + 1,)) * 8) for side in (0, 1)]
        self.got = [bytearray(), bytearray()]
        self.noise = [bytearray(), bytearray()]
        self.raw = [0, 0]
        self.feed: list[Iterator[bytes]] = [iter(()), iter(())]
        self._wires = wires or (BadWire(0, 0), BadWire(0, 0))
        self._random = random.Random(seed)
        self._seconds_per_byte = 10 / baud
        self._delay = delay
        self._cut = cut
        self._free_at = [0.0, 0.0]  # when the wire from a side has taken all
        self._coming: list[tuple[float, int, int, bytes]] = []
        self._count = 0

    def run(self, done: Callable[[], bool]) -> None:
        """Until `done()`; fails when nothing more will happen."""
        while not done():
            for side in (0, 1):
                self._send(side)
            times = [line.next_timeout for line in self.lines]
            due = [time for time in times if time is not None]
            if self._coming:
                due.append(self._coming[0][0])
            assert due, f"nothing will ever happen; got {list(map(len, self.got))}"
            self.now = max(self.now, min(due))
            assert self.now < LIMIT, f"too long; got {list(map(len, self.got))}"
            for line in self.lines:
                line.on_time(self.now)
            while self._coming and self._coming[0][0] <= self.now:
                _, _, to, data = heapq.heappop(self._coming)
                self.lines[to].receive_data(data, self.now)
                self.got[to] += self.lines[to].take_data()
                self.noise[to] += self.lines[to].take_noise()

    def restart(self, side: int) -> None:
        """Another program at this end; what is on the wire stays on it."""
        self.lines[side] = Line(self._random.randbytes(8))
        self.got[side] = bytearray()

    def _send(self, side: int) -> None:
        line = self.lines[side]
        while line.room and (more := next(self.feed[side], None)) is not None:
            line.send(more)
        data = line.data_to_send(self.now)
        self.raw[side] += len(data)
        while data:
            size = self._random.randint(1, self._cut)
            piece, data = data[:size], data[size:]
            self._free_at[side] = max(self._free_at[side], self.now) + len(piece) * self._seconds_per_byte
            self.put(1 - side, self._wires[side](piece), self._free_at[side] + self._delay)

    def put(self, to: int, data: bytes, at: float = 0.0) -> None:
        """Have these bytes arrive."""
        self._count += 1
        heapq.heappush(self._coming, (at, self._count, to, data))


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))
