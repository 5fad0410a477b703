"""The steps that a peer goes through.  Each ends: by its figure, by a reason, or by its time, and says so at once,
so that what was measured is known whatever comes after.
"""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from .interface import Cannot, Peer

MIB = 1024 * 1024

#: The file, and the smaller output.
SIZE = 8 * MIB

#: The file is printed this often for the larger output, 256 MiB.
REPEATS = 32

#: Longest that one go of a step may take, in seconds; the slowest start that was seen takes 45.
LIMIT = 75

#: What takes longer, in seconds, is measured once.
SLOW = 10.0

#: `true` takes milliseconds: it is measured so many times as often as the rest.
TRUES = 10

#: Of the file, inside.
PATH = "/tmp/byre-peers-data"

Say = Callable[[str, "float | str"], None]


def measure(peer: Peer, runs: int, say: Say) -> None:
    """`say` is called with the name of each step, and its median seconds or the reason why there are none."""
    _step("warm_start", lambda: _start(peer, peer.start_warm), runs, say, before=peer.stop)
    _step("cold_start", lambda: _start(peer, peer.start), runs, say, before=peer.stop)  # the last one stays
    data = base64.b64encode(os.urandom(SIZE))[:SIZE]  # text: some peers carry nothing else
    steps: dict[str, Callable[[], float]] = {
        "true": lambda: _timed(lambda: peer.run("true"), b""),
        "put_8m": lambda: _put(peer, data),
        "get_8m": lambda: _timed(lambda: peer.get(PATH), data),
        "output_8m": lambda: _timed(lambda: peer.run(f"cat {PATH}"), data),
        "output_256m": lambda: _timed(
            lambda: peer.run(f"for i in $(seq {REPEATS}); do cat {PATH}; done"), data * REPEATS
        ),
    }
    try:
        for name, go in steps.items():
            _step(name, go, runs * TRUES if name == "true" else runs, say)
    finally:
        peer.stop()


def _start(peer: Peer, start: Callable[[], None]) -> float:
    def first() -> bytes:
        start()
        return peer.run("printf first")

    return _timed(first, b"first")


def _put(peer: Peer, data: bytes) -> float:
    taken = _timed(lambda: peer.put(data, PATH), None)
    _timed(lambda: peer.get(PATH), data)  # for what it compares
    return taken


def _timed(call: Callable[[], Any], expected: bytes | None) -> float:
    """Seconds that a call takes; ValueError where it gives other bytes than expected."""
    begin = time.perf_counter()
    got = call()
    taken = time.perf_counter() - begin
    if expected is not None and got != expected:
        raise ValueError(f"{len(got)} bytes came, which are not the {len(expected)} that were to come")
    return taken


def _step(name: str, go: Callable[[], float], runs: int, say: Say, before: Callable[[], object] = bool) -> None:
    """Say the median of `runs` goes, or the reason why there is none."""
    taken: list[float] = []
    try:
        while len(taken) < runs and not (taken and taken[-1] > SLOW):
            before()
            with limited(LIMIT):
                taken.append(go())
    except Exception as error:
        say(name, reason(error))
    else:
        say(name, statistics.median(taken))


def reason(error: Exception) -> str:
    """One line for the table."""
    said = (str(error).strip().splitlines() or [""])[0][:160]
    return said if isinstance(error, Cannot) else f"{type(error).__name__}: {said}"


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """TimeoutError in what still blocks after so long."""

    def over(*_: object) -> None:
        raise TimeoutError(f"no end within {seconds} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
