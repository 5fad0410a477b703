"""Container images for tests, each made once and kept in the cache under a name that depends on how it is made."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from examples import busybox_image

_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "byre" / "test-images"


def busybox_layout() -> Path:
    """One layer: busybox, users root and user (1000), /tmp."""
    return _made("busybox", busybox_image.make_busybox_image)


def hundred_layers() -> Path:
    """100 layers: busybox below, and /layers/N written by each, while /layers/last is written anew by every one."""
    return _made("hundred", _make_hundred, Path(__file__))


def debian_layout() -> Path:
    """Debian in three layers: Python; a C compiler; deletions and everything else that layers can have."""
    from . import make_debian_image  # here, so that it can also be run as a program of its own

    return _made("debian", make_debian_image.make_debian_image, Path(make_debian_image.__file__))


def postgres_layout() -> Path:
    """PostgreSQL of Debian packages, with a database cluster."""
    from . import make_debian_image, make_postgres_image

    sources = (Path(make_postgres_image.__file__), Path(make_debian_image.__file__))
    return _made("postgres", make_postgres_image.make_postgres_image, *sources)


def _make_hundred(destination: Path) -> Path:
    layers = [busybox_image.busybox_layer()]
    for number in range(1, 100):
        layer = busybox_image.Layer()
        layer.add(f"layers/{number}", b"%d\n" % number)
        layer.add("layers/last", b"%d\n" % number)
        if number > 1:
            layer.add(f"layers/.wh.gone-{number - 1}")
        layer.add(f"layers/gone-{number}", b"hidden by the next layer\n")
        layers.append(layer.data())
    return busybox_image.write_layout(destination, layers, {"Cmd": ["sh"]})


def _made(name: str, make: Callable[[Path], object], *sources: Path) -> Path:
    """The image in the cache; made first, by one process at a time, where it is not there."""
    recipe = hashlib.sha256(busybox_image.BUSYBOX.read_bytes())
    for source in (Path(busybox_image.__file__), *sources):
        recipe.update(source.read_bytes())
    final = _CACHE / f"{name}-{recipe.hexdigest()[:16]}"
    if not final.is_dir():
        _CACHE.mkdir(parents=True, exist_ok=True)
        with open(_CACHE / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not final.is_dir():
                for old in _CACHE.glob(f"{name}-*"):
                    shutil.rmtree(old)
                with tempfile.TemporaryDirectory(dir=_CACHE, prefix=".new-") as folder:
                    make(Path(folder) / "image")
                    os.rename(Path(folder) / "image", final)
    return final
