"""Aligned columns, as people and `awk` read them.  What comes from a guest is shown escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from byre_proto.errors import printable


def show(rows: Sequence[Iterable[object]]) -> None:
    """Print rows, the first being the heads of the columns."""
    cells = [[printable(str(cell)).replace("\n", " ").replace("\t", " ") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def age(seconds: float) -> str:
    """A time span in its largest unit."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{max(0, int(seconds))} s"
