"""Where a copy goes: the rules of cp and of container tools, the same in both directions.

| source | destination | becomes |
|---|---|---|
| file | is not there | that file; with a "/" at its end an error |
| file | a file | that file, replaced |
| file | a directory | a file in it, by the source's name |
| directory | is not there | that directory |
| directory | a file | an error |
| directory | a directory | a directory in it, by the source's name |
| directory, named with "/." at its end | a directory | all that is in it, in that directory |

A link counts as a file, and is copied as a link; a destination that is one is followed.
"""

from __future__ import annotations

import posixpath
from typing import NamedTuple

from byre.errors import PathNotDirectory, PathNotFound


class Source(NamedTuple):
    """What is copied: its last name; whether only what is in it is meant."""

    name: str
    contents: bool

    @classmethod
    def of(cls, path: str) -> Source:
        """By its path, which "." and ".." at the end make no difference to but for the rule above."""
        name = posixpath.basename(posixpath.normpath("/" + path))
        return cls(name, posixpath.basename(path) == "." or not name)


class Place(NamedTuple):
    """Where it goes: a directory that must be there, and the name in it; "." for what is in the source alone."""

    directory: str
    name: str


def place(source: Source, is_directory: bool, destination: str, found: str) -> Place:
    """`found` is what is at the destination: "dir", "" for nothing, anything else counts as a file.

    Raises `PathNotFound`, `PathNotDirectory`, as the table says.
    """
    if found == "dir":
        return Place(destination, "." if source.contents and is_directory else source.name)
    if found and (is_directory or destination.endswith("/")):
        raise PathNotDirectory(f"{destination}: is a file", hint="name a directory, or what does not exist yet")
    if not is_directory and destination.endswith("/"):
        raise PathNotFound(f"{destination}: there is no such directory", hint="make it first", path=destination)
    directory, name = posixpath.split(destination.rstrip("/"))
    if name in ("", ".", ".."):
        raise PathNotFound(f"{destination}: there is no such directory", hint="make it first", path=destination)
    return Place(directory or ("/" if destination.startswith("/") else "."), name)
