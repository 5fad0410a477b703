"""A layer from its gzip blob to its squashfs image, over the same tar fed to tar2sqfs directly.

Ours reads the blob three times (its digest; the tar's digest and list; the contents), verifies and normalises it.
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from byre.oci.layout import open_image
from byre.oci.store import LayerStore
from examples.busybox_image import Layer, write_layout

from .report import Report, median

#: About what a language runtime's layer has: many small files of text, and a few large ones that compress badly.
SMALL_FILES, SMALL_SIZE = 5000, 12_000
LARGE_FILES, LARGE_SIZE = 4, 16 << 20
_DIRECT = ("tar2sqfs", "--quiet", "--no-skip", "--compressor", "lz4")


async def run(runs: int) -> Report:
    return await asyncio.to_thread(_measure, runs)


def _measure(runs: int) -> Report:
    direct, piped, ours, cached = [list[float]() for _ in range(4)]
    with tempfile.TemporaryDirectory(prefix="byre-bench-") as name:
        folder = Path(name)
        tar = _layer()
        (folder / "layer.tar").write_bytes(tar)
        source = f"oci:{write_layout(folder / 'layout', [tar], {})}"
        with open_image(source) as image:
            blob = folder / "layout/blobs/sha256" / image.layers[0].digest.partition(":")[2]
            for number in range(runs):
                out, store = folder / f"direct-{number}", LayerStore(folder / f"store-{number}")
                direct.append(_timed(lambda out=out: _direct(["cat", folder / "layer.tar"], out)))
                piped.append(_timed(lambda out=out: _direct(["gzip", "-dc", blob], out)))
                ours.append(_timed(lambda store=store: store.prepare(image)))
                cached.append(_timed(lambda store=store: store.prepare(image)))
        mib = len(tar) / 2**20
    return Report(
        name="layers",
        runs=runs,
        ratio=median(ours) / median(piped),
        target="reported",
        figures={
            "tar_mib": mib,
            "tar2sqfs_of_tar_s": median(direct),
            "tar2sqfs_of_gzip_s": median(piped),
            "layer_s": median(ours),
            "layer_mib_per_s": mib / median(ours),
            "cached_ms": median(cached) * 1e3,
        },
    )


def _layer() -> bytes:
    source, layer = random.Random(1), Layer()
    words = [source.randbytes(4).hex() for _ in range(2000)]
    for number in range(SMALL_FILES):
        text = " ".join(source.choices(words, k=SMALL_SIZE // 9)).encode()
        layer.add(f"lib/{number % 100}/{number}", text)
    for number in range(LARGE_FILES):
        layer.add(f"share/{number}", source.randbytes(LARGE_SIZE))
    return layer.data()


def _timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _direct(feed: list[str | Path], out: Path) -> None:
    out.unlink(missing_ok=True)
    with subprocess.Popen(feed, stdout=subprocess.PIPE) as source:
        subprocess.run([*_DIRECT, out], stdin=source.stdout, check=True, stderr=subprocess.DEVNULL)
    with open(out, "rb") as file:
        os.fsync(file.fileno())
