"""How far a pull and the conversion of layers are: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from . import terminal
from .status import say

if TYPE_CHECKING:
    from byre.oci.pull import PullProgress
    from byre.oci.store import LayerProgress

#: Where nobody looks at a terminal, seconds between two lines about one pull.
PLAIN_INTERVAL = 10.0
#: A terminal is written to at most this often, in seconds.
_REDRAW = 0.1
_BAR = 24


class Progress:
    """To be called with each step.  On a terminal the line is written over, and gone at the end.

    `verb` is what is done with an image: pulling, importing.
    """

    def __init__(self, verb: str = "pulling") -> None:
        self._verb = verb
        self._terminal = sys.stderr.isatty()
        self._shown = ""
        self._said = 0.0  # when
        self._name = ""
        self._total = 0

    def __call__(self, step: PullProgress | LayerProgress) -> None:
        from byre.oci.pull import PullProgress  # here: a command without an image does without it

        if isinstance(step, PullProgress):
            self._pull(step)
        elif self._terminal:
            percent = 100 * step.done // max(1, step.total)
            text = f"preparing layer {step.number} of {step.layers}: {percent} %"
            self._show("" if percent >= 100 and step.number == step.layers else text)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing more comes: an error's own line, say, is next."""
        self._show("")

    def _pull(self, step: PullProgress) -> None:
        now = time.monotonic()
        if step.name != self._name:
            self._name, self._total = step.name, 0
            say(f"{self._verb} {step.name}")
            self._said = now
        if step.total and not self._total:
            self._total, self._start, self._first, self._said = step.total, now, step.done, now
            if step.done:
                say(f"{size(step.done)} of {size(step.total)} are here already")
        if not self._total or step.done >= step.total:
            self._show("")
            if self._total and step.done > self._first:
                rate = (step.done - self._first) / max(now - self._start, 1e-3)
                layers = f"{step.layers} layer{'s' * (step.layers > 1)}"
                say(f"{size(step.done)} in {layers}, {size(rate)}/s")
                self._first = step.done
        elif self._terminal:
            if now - self._said >= _REDRAW:
                self._said = now
                self._show(self._line(step, now))
        elif now - self._said >= PLAIN_INTERVAL:
            self._said = now
            say(self._amounts(step, now))

    def _line(self, step: PullProgress, now: float) -> str:
        bar = "=" * (_BAR * step.done // step.total)
        return f"[{bar:<{_BAR}}] {self._amounts(step, now)}"

    def _amounts(self, step: PullProgress, now: float) -> str:
        rate = (step.done - self._first) / max(now - self._start, 1e-3)
        return f"{size(step.done)} of {size(step.total)}, {size(rate)}/s"

    def _show(self, text: str) -> None:
        if self._terminal and text != self._shown:
            self._shown = text
            line = f"byre: {text}"[: terminal.size(2)[0] - 1] if text else ""
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


def size(count: float) -> str:
    """Bytes as people read them, in powers of 1024."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
