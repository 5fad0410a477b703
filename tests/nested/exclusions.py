"""Tests that are not run on the nested vehicle, each with its reason.  The key is a test's id without its vehicle."""

from __future__ import annotations

_SLOW = "a thousand round trips take minutes where the host's Python is itself emulated"
_OUTER = "about the owner's processes on the host, which the first run shows; the accelerator plays no part"
_IMAGE = "needs the large Debian image, whose tests are about layers, not about the accelerator"

#: Node id (or its beginning) -> reason.
EXCLUDED = {
    "tests/conformance/test_memory.py::test_a_thousand_in_turn": _SLOW,
    "tests/conformance/test_memory.py::test_a_thousand_unread": _SLOW,
}


def reason(node_id: str) -> str | None:
    """Why a test is left out; None: it is run."""
    return next((text for start, text in EXCLUDED.items() if node_id.startswith(start)), None)
