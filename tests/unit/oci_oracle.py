"""Independent judges of converted layers: the kernel, which mounts the images, and GNU tar, which unpacks
the image.

Needs root (loop devices, overlay mounts, device nodes), so it is used only by tests that say so.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path


@contextmanager
def mounted(images: Sequence[Path], folder: Path) -> Iterator[Path]:
    """The merged tree of squashfs `images`, lowest first, as the guest sees it: an overlay with an upper
    directory."""
    with ExitStack() as stack:
        lower = []
        for number, image in enumerate(images):
            target = folder / f"l{number}"
            target.mkdir()
            subprocess.run(["mount", "-t", "squashfs", "-o", "loop,ro", image, target], check=True)
            stack.callback(subprocess.run, ["umount", target], check=True)
            lower.insert(0, target.name)
        for name in ("upper", "work", "merged"):
            (folder / name).mkdir()
        top = os.stat(folder / lower[0])  # the root is the upper directory's, so that has to look like the image's
        os.chown(folder / "upper", top.st_uid, top.st_gid)
        os.chmod(folder / "upper", stat.S_IMODE(top.st_mode))
        options = f"lowerdir={':'.join(lower)},upperdir=upper,workdir=work"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, "merged"], check=True, cwd=folder)
        stack.callback(subprocess.run, ["umount", folder / "merged"], check=True)
        yield folder / "merged"


def unpack(tars: Sequence[Path], folder: Path) -> Path:
    """The layers unpacked one over the other by GNU tar, after the whiteouts of each were done by hand."""
    root = folder / "unpacked"
    root.mkdir()
    for tar in tars:
        listed = subprocess.run(["tar", "-tf", tar], check=True, capture_output=True, text=True).stdout.split("\n")
        for name in listed:
            base = os.path.basename(name)
            parent = root / os.path.dirname(name)
            if base == ".wh..wh..opq" and parent.is_dir():
                for inside in parent.iterdir():
                    _remove(inside)
            elif base.startswith(".wh.") and base != ".wh..wh..opq":
                _remove(parent / base.removeprefix(".wh."))
        flags = ["--numeric-owner", "--xattrs", "--xattrs-include=*", "--same-permissions", "--same-owner"]
        subprocess.run(
            ["tar", "-xf", tar, "-C", root, *flags, "--exclude=.wh.*", "--delay-directory-restore"], check=True
        )
    return root


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def describe(root: Path) -> dict[str, tuple[object, ...]]:
    """Path → everything that a program could see there: type, mode, owner, time, device, xattrs, contents, link
    partners."""
    partners: dict[tuple[int, int], list[str]] = {}
    found = {}
    for folder, folders, files in os.walk(root):
        for name in [*folders, *files, "."] if folder == str(root) else [*folders, *files]:
            path = os.path.join(folder, name)
            status = os.lstat(path)
            relative = os.path.relpath(path, root)
            if not stat.S_ISDIR(status.st_mode):
                partners.setdefault((status.st_dev, status.st_ino), []).append(relative)
            found[relative] = (path, status)
    return {name: _facts(path, status, partners) for name, (path, status) in found.items()}


def _facts(path: str, status: os.stat_result, partners: dict[tuple[int, int], list[str]]) -> tuple[object, ...]:
    mode, content = status.st_mode, ""
    if stat.S_ISREG(mode):
        content = sha256(Path(path).read_bytes()).hexdigest()
    elif stat.S_ISLNK(mode):
        content = os.readlink(path)
    attributes = sorted((key, os.getxattr(path, key, follow_symlinks=False)) for key in _xattrs(path))
    linked = sorted(partners.get((status.st_dev, status.st_ino), ()))
    time = (
        0 if stat.S_ISDIR(mode) else int(status.st_mtime)
    )  # a directory's depends on what is made in it, and when
    device = status.st_rdev if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else 0
    return (oct(mode), status.st_uid, status.st_gid, time, device, content, attributes, linked)


def _xattrs(path: str) -> list[str]:
    try:
        listed = os.listxattr(path, follow_symlinks=False)
    except OSError as error:
        if error.errno != errno.ENOTSUP:  # squashfs says so where the whole image has none
            raise
        return []
    return [key for key in listed if not key.startswith("trusted.overlay.")]
