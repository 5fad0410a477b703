"""A relay between two UNIX sockets that cuts each connection after a random number of bytes.

Rule: what it does follows from its seed.  Half of the cuts are made wherever the number of bytes falls, which is
mostly in a payload; the other half wait for the next frame, and are made in its header or right before it.  For
each cut and each direction it is noted what the bytes that had been passed on ended with.

It runs in a thread of its own, so that it may serve a program that is busy.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import socket
import threading
from collections import Counter
from types import TracebackType
from typing import Self

from byre_proto.connection import MAGIC, PREFACE_SIZE
from byre_proto.frames import HEADER, HEADER_SIZE, HELLO

READ_SIZE = 256 * 1024

#: More bytes than a handshake has: the first one is spared, for before it there is no session that could go on.
FIRST_HANDSHAKE = 1000

#: Where a direction can be when it is cut.
PLACES = ("handshake", "header", "payload", "between")


class Frames:
    """Follows the bytes of one direction: in which part of which frame they end."""

    def __init__(self) -> None:
        self._begun = b""  # of a header that is not complete
        self._rest = 0  # of a payload, or of a preface
        self._handshake = True

    @property
    def place(self) -> str:
        if self._handshake:
            return "handshake"
        return "header" if self._begun else "payload" if self._rest else "between"

    def follow(self, data: memoryview, *, to_next: bool = False) -> int:
        """Go on with `data`, or only to where its next frame begins.  Returns how far."""
        at, size = 0, len(data)
        while at < size:
            if self._rest:
                step = min(self._rest, size - at)
                self._rest -= step
                at += step
                continue
            if to_next and not self._begun and not self._handshake:
                return at
            step = min(HEADER_SIZE - len(self._begun), size - at)
            self._begun += bytes(data[at : at + step])
            at += step
            if len(self._begun) < HEADER_SIZE:
                break
            header, self._begun = self._begun, b""
            if header.startswith(MAGIC):
                self._rest = PREFACE_SIZE - HEADER_SIZE
            else:
                self._rest, kind = HEADER.unpack(header)[:2]
                self._handshake = kind == HELLO
        return at


class Plan:
    """Where the next cut is: after `after` bytes of one direction; with `aim` >= 0 so far into its next frame."""

    def __init__(self, chance: random.Random, mean: int, spared: int) -> None:
        self.way = chance.randrange(2)
        self.after = spared + chance.randrange(2 * mean) + 1
        self.aim = chance.randrange(HEADER_SIZE) if chance.random() < 0.5 else -1
        self.reached = False  # that next frame


class CuttingProxy:
    """`with CuttingProxy(path, target, mean=...)`: who dials `path` reaches `target`, until the next cut.

    `mean` bytes of one direction lie between two cuts, 0: there are none but those that are asked for by `cut`.
    While `barred`, connections are taken and ended at once: the way is broken, and somebody is there.
    """

    def __init__(self, path: str, target: str, *, mean: int = 0, seed: int = 1) -> None:
        self.path = path
        self.barred = False
        self.connections = 0
        self.cuts = 0
        self.passed = 0
        self.places: Counter[str] = Counter()
        self._target = target
        self._mean = mean
        self._chance = random.Random(seed)
        self._asked, self._ask = os.pipe()
        self._ended = False
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, name="cutting-proxy")

    def cut(self) -> None:
        """End the present connection now."""
        os.write(self._ask, b"x")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nobody listens any more."""
        self._ended = True
        self.cut()
        self._thread.join()
        os.close(self._asked)
        os.close(self._ask)

    def __str__(self) -> str:
        places = ", ".join(f"{self.places[place]} {place}" for place in PLACES)
        return f"cuts={self.cuts} passed={self.passed} directions: {places}"

    # -- the thread's --------------------------------------------------------------------------------------

    def _serve(self) -> None:
        with self._listener:
            while not self._ended:
                ready = select.select([self._listener, self._asked], [], [])[0]
                if self._asked in ready:
                    os.read(self._asked, 1)
                    continue
                with self._listener.accept()[0] as near:
                    if self.barred:
                        continue
                    self._pass_on(near)
            os.unlink(self.path)

    def _pass_on(self, near: socket.socket) -> None:
        with socket.socket(socket.AF_UNIX) as far, contextlib.suppress(OSError):
            far.connect(self._target)
            self.connections += 1
            spared = 0 if self.cuts else FIRST_HANDSHAKE
            plan = Plan(self._chance, self._mean, spared) if self._mean else None
            _Link(self, near, far).run(plan, self._asked)

    def note(self, frames: list[Frames]) -> None:
        """A connection is being cut."""
        self.cuts += 1
        self.places.update(each.place for each in frames)


class _Link:
    """One connection through the proxy.  Both ends always read, so what is passed on may be waited for."""

    def __init__(self, proxy: CuttingProxy, near: socket.socket, far: socket.socket) -> None:
        self._proxy = proxy
        self._ends = (near, far)  # way 0 goes from the first to the second
        self._frames = [Frames(), Frames()]

    def run(self, plan: Plan | None, asked: int) -> None:
        """Until it is cut, or one end has ended."""
        while True:
            readable = select.select([*self._ends, asked], [], [])[0]
            if asked in readable:
                os.read(asked, 1)
                self._proxy.note(self._frames)
                return
            for way, end in enumerate(self._ends):
                if end not in readable:
                    continue
                data = memoryview(end.recv(READ_SIZE))
                if not data:
                    return
                if self._forward(way, data, plan if plan is not None and plan.way == way else None):
                    self._proxy.note(self._frames)
                    return

    def _forward(self, way: int, data: memoryview, plan: Plan | None) -> bool:
        """Pass on; whether this was where to cut."""
        if plan is None:
            self._send(way, data)
            return False
        if plan.after:
            step = min(plan.after, len(data))
            self._send(way, data[:step])
            plan.after -= step
            data = data[step:]
            if plan.after or plan.aim < 0:
                return not plan.after
        if not plan.reached:
            step = self._frames[way].follow(data, to_next=True)
            self._ends[1 - way].sendall(data[:step])
            self._proxy.passed += step
            data = data[step:]
            plan.reached = self._frames[way].place == "between"
        if plan.reached:
            step = min(plan.aim, len(data))
            self._send(way, data[:step])
            plan.aim -= step
        return plan.reached and not plan.aim

    def _send(self, way: int, data: memoryview) -> None:
        self._ends[1 - way].sendall(data)
        self._frames[way].follow(data)
        self._proxy.passed += len(data)
