"""The interpreter's `_signal`, typed as `signal`, which wraps it in enums at the price of 20 ms under emulation."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as signals
else:
    import _signal as signals

__all__ = ["signals"]
