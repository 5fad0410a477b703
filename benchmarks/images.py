"""The container image of the benchmarks: busybox, made on the spot."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from examples.busybox_image import make_busybox_image


@contextlib.contextmanager
def busybox() -> Iterator[str]:
    """A reference to a busybox image that exists while this does."""
    with tempfile.TemporaryDirectory(prefix="byre-bench-") as folder:
        yield f"oci:{make_busybox_image(Path(folder) / 'busybox')}"
