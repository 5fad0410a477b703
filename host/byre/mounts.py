"""What is mounted in a container beside its image, and what `-v` says of it.

    Volume          a named volume: it outlives the container and the VM
    HostDirectory   a directory of this host, shared with the container

Rule: plain frozen records, checked when they are made, before anything is started; nothing here looks at a file or
talks to a VM.  Whether a source exists is for those who mount it.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TypeAlias

from .errors import InvalidRequest

#: As docker has it; the name becomes that of a file.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def host_path(path: str | os.PathLike[str]) -> str:
    """A path of this host as it is meant here and now, for whoever serves it.  Raises `InvalidRequest`."""
    text = os.fspath(path)
    if not text or "\0" in text:
        raise InvalidRequest(f"{text!r} is no path", hint="give a directory of this host")
    return os.path.abspath(os.path.expanduser(text))


def _check_target(target: str) -> None:
    """An absolute path inside, other than the root.  What links on the way to it do is the runtime's to settle."""
    if not target.startswith("/") or "\0" in target:
        raise InvalidRequest(
            f"{target!r} is no place for a mount", hint="give an absolute path inside the container, such as /data"
        )
    if ".." in target.split("/"):
        raise InvalidRequest(f"{target!r} leads upwards", hint="give the path without ..")
    if not target.strip("/."):
        raise InvalidRequest(
            f"{target!r} is the root of the container", hint="byre run --rootfs makes a directory its root"
        )


def check_name(name: str) -> None:
    """Whether a volume can be called so.  Raises `InvalidRequest`."""
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"{name!r} cannot name a volume",
            hint="64 letters, digits, _ . and - at most; a directory of this host has a / in it, as ./data",
        )


@dataclass(frozen=True)
class Volume:
    """The volume `name` at `target`, an absolute path inside.  Raises `InvalidRequest`."""

    name: str
    target: str
    read_only: bool = False

    def __post_init__(self) -> None:
        check_name(self.name)
        _check_target(self.target)


@dataclass(frozen=True)
class HostDirectory:
    """The directory `path` of this host at `target`, an absolute path inside.  Raises `InvalidRequest`.

    A relative `path` is taken from the present directory, `~` is the user's home; the record has it absolute.
    """

    path: str | os.PathLike[str]
    target: str
    read_only: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", host_path(self.path))
        _check_target(self.target)


#: What `mounts=` of `create_container` takes, beside OCI mounts.
Mount: TypeAlias = Volume | HostDirectory


def parse_mount(text: str) -> Mount:
    """``SRC:DST[:ro|rw]``, as docker's `-v`.  Raises `InvalidRequest`.

    A SRC with a slash in it, or one that begins with ``.`` or ``~``, is a directory of this host; else it names a
    volume.  A directory whose name has a colon in it can be given from Python only.
    """
    parts = text.split(":")
    if len(parts) not in (2, 3) or not all(parts):
        raise InvalidRequest(
            f"{text!r} is not SRC:DST[:ro]", hint="such as ./src:/src, ./src:/src:ro or data:/var/lib/data"
        )
    source, target = parts[:2]
    mode = parts[2] if len(parts) == 3 else "rw"
    if mode not in ("ro", "rw"):
        raise InvalidRequest(f"{text!r}: {mode!r} is not known", hint="what may follow is :ro or :rw")
    if "/" in source or source.startswith((".", "~")):
        return HostDirectory(source, target, read_only=mode == "ro")
    return Volume(source, target, read_only=mode == "ro")
