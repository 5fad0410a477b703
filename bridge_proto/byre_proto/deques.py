"""`collections.deque`, from the C module that it lives in: `collections` costs a guest's boot 30 ms and more."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections import deque
else:
    from _collections import deque

__all__ = ["deque"]
