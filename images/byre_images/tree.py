"""A root file system in memory: what the packages hold, merged, normalised, and written as one tar.

Nothing is unpacked on the host, so neither its user, umask, clock nor directory order can reach the result.
Normal form: /bin, /sbin, /lib and /lib64 are links into /usr; times are 0; paths are sorted; hard links are
files (squashfs finds equal content by itself).
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO

from .errors import BuildFailed

#: Directories that are links into /usr.
MERGED = ("bin", "sbin", "lib", "lib64")


@dataclass(frozen=True)
class Entry:
    """One file: `kind` is a type of tarfile, `link` a symbolic link's target, `mode` the permission bits."""

    kind: bytes
    mode: int
    data: bytes = b""
    link: str = ""
    uid: int = 0
    gid: int = 0


class Tree:
    """Paths without a leading slash, and what is there."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        for name in MERGED:
            self.directory(f"usr/{name}")
            self.link(name, f"usr/{name}")

    def directory(self, path: str, mode: int = 0o755) -> None:
        """A directory, with its parents."""
        self._parents(path)
        self.entries[path] = Entry(tarfile.DIRTYPE, mode)

    def file(self, path: str, data: bytes | str, mode: int = 0o644) -> None:
        """A regular file, with its parents."""
        self._parents(path)
        self.entries[path] = Entry(tarfile.REGTYPE, mode, data.encode() if isinstance(data, str) else data)

    def link(self, path: str, target: str) -> None:
        """A symbolic link, with its parents."""
        self._parents(path)
        self.entries[path] = Entry(tarfile.SYMTYPE, 0o777, link=target)

    def read(self, path: str) -> bytes:
        """A regular file's bytes."""
        entry = self.entries.get(path)
        if entry is None or entry.kind != tarfile.REGTYPE:
            raise BuildFailed(f"the packages have no file {path}")
        return entry.data

    def merge(self, stream: IO[bytes], keep: Callable[[str], bool]) -> None:
        """Take in a package's tar stream: of its paths those that `keep` (given the merged path) wants."""
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                path = merged(member.name)
                if not path or path in MERGED or not keep(path):
                    continue
                if member.isreg():
                    reader = archive.extractfile(member)
                    assert reader is not None
                    entry = Entry(tarfile.REGTYPE, member.mode, reader.read(), "", member.uid, member.gid)
                elif member.islnk():
                    entry = self.entries[merged(member.linkname)]
                elif member.issym():
                    entry = Entry(tarfile.SYMTYPE, 0o777, link=member.linkname)
                elif member.isdir():
                    entry = Entry(tarfile.DIRTYPE, member.mode, uid=member.uid, gid=member.gid)
                else:
                    raise BuildFailed(f"a package holds a device or a pipe: {path}")
                self._parents(path)
                self.entries[path] = entry

    def write(self, stream: IO[bytes]) -> None:
        """The tree as a tar, parents before children."""
        with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as archive:
            for path in sorted(self.entries):
                entry = self.entries[path]
                member = tarfile.TarInfo(path)
                member.type, member.mode, member.linkname = entry.kind, entry.mode, entry.link
                member.uid, member.gid, member.size = entry.uid, entry.gid, len(entry.data)
                archive.addfile(member, io.BytesIO(entry.data))

    def _parents(self, path: str) -> None:
        parent = path.rpartition("/")[0]
        if parent and parent not in self.entries:
            self.directory(parent)


def merged(name: str) -> str:
    """A path of a package in its normal form: no leading `./`, below /usr where that is merged; "" for the root."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise BuildFailed(f"a package holds a path with '..': {name}")
    if len(parts) > 1 and parts[0] in MERGED:
        parts.insert(0, "usr")
    return "/".join(parts)
