"""Two ttys joined by bad wire: what is lost, flipped, doubled and inserted on it is random, seeded and counted.

    with BadLine(rate=1e-4) as line:  line.ends  are the paths of both; `line.hurt` bytes were damaged so far

Rule: the ttys are real ones (ptys), in raw mode; only the wire between them is played, by the running event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import random
import sys
import tty
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

from byre.serialhost import SerialHost

#: Taken from one tty at once; on a line with a speed, what the wire holds.
READ_SIZE = 4096
WIRE_SIZE = 32

#: How late the event loop may be, in seconds, without the wire being slower for it.
LATE = 0.005

#: Bits on the wire for each byte: a start and a stop bit around it.
BITS = 10


class BadWire:
    """Each byte is lost, flipped, doubled, or followed by another one, with a probability; `hurt` counts."""

    KINDS = ("lost", "flipped", "doubled", "inserted")

    def __init__(self, seed: int, rate: float, kinds: tuple[str, ...] = KINDS) -> None:
        self._random = random.Random(seed)
        self._rate = rate
        self._kinds = kinds
        self.hurt = 0

    def __call__(self, data: bytes) -> bytes:
        """What becomes of bytes on the way."""
        out = bytearray()
        at = 0
        while True:
            good = int(self._random.expovariate(self._rate)) if self._rate else len(data)
            out += data[at : at + good]
            at += good
            if at >= len(data):
                return bytes(out)
            out += self._hurt(data[at])
            at += 1

    def _hurt(self, byte: int) -> bytes:
        self.hurt += 1
        kind = self._random.choice(self._kinds)
        if kind == "lost":
            return b""
        if kind == "flipped":
            return bytes((byte ^ 1 << self._random.randrange(8),))
        return bytes((byte, byte if kind == "doubled" else self._random.randrange(256)))


class BadLine:
    """See the module.  `baud` 0: as fast as it goes.  `carried` counts bytes each way, as they came from a tty."""

    def __init__(self, rate: float = 0.0, *, seed: int = 1, baud: float = 0.0) -> None:
        self._wires = [BadWire(seed + way, rate) for way in (0, 1)]
        self._ways: list[_Way] = []
        self._baud = baud
        self._open: list[int] = []
        self.ends: list[str] = []

    @property
    def hurt(self) -> int:
        return sum(wire.hurt for wire in self._wires)

    @property
    def carried(self) -> tuple[int, int]:
        """Bytes from the first end to the second, and back."""
        return self._ways[0].carried, self._ways[1].carried

    def say(self, to: int, text: bytes) -> None:
        """Have a kernel write to the line in between, so that one end hears it."""
        self._ways[1 - to].put(text)

    def hang_up(self, end: int) -> None:
        """The tty at this end is gone, as when its adapter is unplugged."""
        for way in self._ways:
            way.close()
        os.close(self._open[2 * end])
        self._open[2 * end] = os.open(os.devnull, os.O_RDONLY)

    def __enter__(self) -> Self:
        masters = []
        for _ in (0, 1):
            master, slave = pty.openpty()
            self._open += (master, slave)  # a master whose slave nobody has open reads errors
            tty.setraw(slave)
            os.set_blocking(master, False)
            masters.append(master)
            self.ends.append(os.ttyname(slave))
        self._ways = [
            _Way(masters[way], masters[1 - way], wire, self._baud) for way, wire in enumerate(self._wires)
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for way in self._ways:
            way.close()
        for fd in self._open:
            os.close(fd)


@contextlib.asynccontextmanager
async def agent_at(device: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """The agent as an ordinary program at the end of a tty; told to end afterwards."""
    agent = await asyncio.create_subprocess_exec(sys.executable, "-m", "byre_guest", "--serial", device)
    try:
        yield agent
    finally:
        with contextlib.suppress(ProcessLookupError):
            agent.terminate()
        await agent.wait()


@contextlib.asynccontextmanager
async def line_host(
    rate: float = 0.0, *, seed: int = 1, baud: float = 0.0
) -> AsyncIterator[tuple[SerialHost, BadLine]]:
    """A host at one end of a bad line, with an agent at the other."""
    with BadLine(rate, seed=seed, baud=baud) as line:
        async with agent_at(line.ends[1]), SerialHost(line.ends[0]) as host:
            yield host, line


class _Way:
    """One direction: reads on only when what it has is delivered, as fast as the wire is."""

    def __init__(self, source: int, target: int, wire: BadWire, baud: float) -> None:
        self.carried = 0
        self._source, self._target, self._wire = source, target, wire
        self._seconds = BITS / baud if baud else 0.0
        self._free_at = 0.0
        self._rest = b""
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._loop.add_reader(source, self._read)

    def _read(self) -> None:
        data = os.read(self._source, WIRE_SIZE if self._seconds else READ_SIZE)
        self.carried += len(data)
        self._loop.remove_reader(self._source)
        self._free_at = max(self._free_at, self._loop.time() - LATE) + len(data) * self._seconds
        self._rest = self._wire(data)
        self._timer = self._loop.call_at(self._free_at, self._write) if self._seconds else None
        if self._timer is None:
            self._write()

    def _write(self) -> None:
        self.put(b"")
        if self._rest:
            self._loop.add_writer(self._target, self._write)
        else:
            self._loop.remove_writer(self._target)
            self._loop.add_reader(self._source, self._read)

    def put(self, text: bytes) -> None:
        """Behind what is on its way to the target."""
        self._rest += text
        try:
            self._rest = self._rest[os.write(self._target, self._rest) :] if self._rest else b""
        except BlockingIOError:
            pass

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self._source)
        self._loop.remove_writer(self._target)
