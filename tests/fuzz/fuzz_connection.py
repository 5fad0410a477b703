"""Fuzz one connection in every state with every kind of frame.

    python -m tests.fuzz.fuzz_connection --runs N --seed S

Driven by atheris (coverage-guided, `pip install atheris`) where it is installed, else by a seeded generator over
the same grammar.  Contract, and so the only allowed exceptions:

    receive_data, take_events, data_to_send, receive_eof      none, whatever the peer sends
    what the program asks of the session                      LocalProtocolError, InvalidRequest, NotSupported,
                                                              RequestTooLarge, ResourceExhausted

Ends with a table for each side of how often each frame type was taken in in each state, and status 1 when one never
was.  The host is the side that speaks first, the agent the other one; `--runs` counts for each.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import shutil
import sys
import tempfile
import tracemalloc
from collections import Counter
from contextlib import ExitStack, suppress
from typing import Any

#: Bytes that one connection may hold after any input that the grammar can form: its frames are small, so this is
#: far below the sum of the limits.
MEMORY_BOUND = 8 * 1024 * 1024

#: Who is spoken to: a connection that speaks first, or one that does not.
SIDES = ("host", "agent")

#: Inputs between two looks at the memory.
MEMORY_EVERY = 500


class Fuzzer:
    """Runs inputs drawn from sources, and counts what was reached."""

    def __init__(self) -> None:
        from . import worlds  # late: atheris instruments what is imported under its hook

        self._worlds = worlds
        self.reached: Counter[tuple[str, str, str]] = Counter()
        self._frames: Counter[str] = Counter()
        self.inputs = 0

    @property
    def frames(self) -> int:
        """Fed to each side, at least."""
        return min(self._frames[side] for side in SIDES)

    def one_input(self, source: Any) -> None:
        """One connection, brought into a state, then spoken to."""
        world = self._worlds.World(source)
        side = SIDES[not world.first]
        watch = self.inputs % MEMORY_EVERY == 0
        if watch:
            tracemalloc.start()
        with ExitStack() as stack:
            if watch:
                stack.callback(tracemalloc.stop)
            for _ in range(source.integer(1, 12)):
                if source.exhausted:
                    break
                what, state = world.step()
                self.reached[side, what, state] += 1
                self._frames[side] += 1
            world.finish()
            if watch:
                _, peak = tracemalloc.get_traced_memory()
                assert peak < MEMORY_BOUND, f"{peak} bytes were held"
        self.inputs += 1

    def missing(self) -> list[tuple[str, str, str]]:
        """What was never reached: side, what it was sent, state."""
        cells = itertools.product(SIDES, self._worlds.WHAT, self._worlds.STATES)
        return [cell for cell in cells if not self.reached[cell]]

    def table(self) -> str:
        states = self._worlds.STATES
        lines = []
        for side in SIDES:
            lines.append(f"to the {side}: {self._frames[side]} frames")
            lines.append(" " * 10 + "".join(f"{state:>11}" for state in states))
            for what in self._worlds.WHAT:
                counts = (self.reached[side, what, state] for state in states)
                lines.append(f"{what:<10}" + "".join(f"{count:>11}" for count in counts))
        return "\n".join(lines)


def run(frames: int, seed: int) -> Fuzzer:
    """The seeded generator: at least so many frames to each side."""
    from .grammar import RandomSource

    fuzzer = Fuzzer()
    while fuzzer.frames < frames:
        source = RandomSource((seed, fuzzer.inputs))
        try:
            fuzzer.one_input(source)
        except Exception as error:
            error.add_note(f"reproduce: seed {seed}, input {fuzzer.inputs}")
            raise
    return fuzzer


def report(fuzzer: Fuzzer) -> int:
    print(f"{fuzzer.inputs} inputs\n{fuzzer.table()}")
    missing = fuzzer.missing()
    for side, what, state in missing:
        print(f"never reached: {what} to the {side} in state {state}")
    return 1 if missing else 0


def _guided(atheris: Any, frames: int, seed: int) -> None:
    """Coverage-guided, until so many frames were fed; never returns."""

    class FuzzedSource:
        def __init__(self, data: bytes) -> None:
            self._data = atheris.FuzzedDataProvider(data)
            self.integer = self._data.ConsumeIntInRange

        def bytes(self, size: int) -> bytes:
            return bytes(self._data.ConsumeBytes(size))

        @property
        def exhausted(self) -> bool:
            return not self._data.remaining_bytes()

    with atheris.instrument_imports(include=["byre_proto"]):
        fuzzer = Fuzzer()

    corpus = tempfile.mkdtemp(prefix="byre-fuzz-")

    def one_input(data: bytes) -> None:
        fuzzer.one_input(FuzzedSource(data))
        if fuzzer.frames >= frames:  # libFuzzer would leave without a chance to report
            shutil.rmtree(corpus)
            status = report(fuzzer)
            sys.stdout.flush()
            os._exit(status)

    _plant(corpus, seed)
    atheris.Setup([sys.argv[0], corpus, f"-seed={seed}", "-max_len=2000", "-len_control=0"], one_input)
    atheris.Fuzz()


def _plant(corpus: str, seed: int) -> None:
    """Inputs to begin with: one for each pair and role.  FuzzedDataProvider takes its integers from the end."""
    from . import worlds

    noise = random.Random(seed)
    for role, state, what in itertools.product(range(2), range(len(worlds.STATES)), range(len(worlds.WHAT))):
        decisions = bytes((what, 11, state, role))
        with open(os.path.join(corpus, f"{role}-{state}-{what}"), "wb") as file:
            file.write(noise.randbytes(200) + decisions)


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz byre_proto.Connection in every state.")
    parser.add_argument("--runs", type=int, default=100_000, help="frames to each side (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plain", action="store_true", help="the seeded generator even where atheris is installed")
    options = parser.parse_args()
    atheris = None
    if not options.plain:
        with suppress(ImportError):
            import atheris  # type: ignore[no-redef]
        if atheris is None:
            print(
                "atheris is not installed (pip install atheris): running without coverage guidance", file=sys.stderr
            )
    if atheris is not None:
        _guided(atheris, options.runs, options.seed)
    return report(run(options.runs, options.seed))


if __name__ == "__main__":
    sys.exit(main())
