"""The operations of `files.start` but those on trees: each runs in a child of its own, which may block.

    operation(place, path, options, source, sink) -> fields of the result

Rule: an operation is done, or has changed nothing; what it made on the way is gone when it raises.  Options come
from the host, which may do all of this; the files are hostile (`places`).
"""

from __future__ import annotations

import errno
import os

from byre_proto import records

from . import packing, places, unpacking

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .exchange import Sink, Source
    from .places import Place

    Operation = Callable[[Place, str, dict[str, Any], Source, Sink], dict[str, Any]]


def _read(place: Place, path: str, options: dict[str, Any], _source: Source, sink: Sink) -> dict[str, Any]:
    fd = places.open_regular(place.find(path), path)
    sink.message(*places.entry(".", os.fstat(fd)))
    os.lseek(fd, options.get("offset", 0), os.SEEK_SET)
    left = options.get("length", -1)
    while left:
        data = os.read(fd, records.MAX_RECORD if left < 0 else min(left, records.MAX_RECORD))
        if not data:
            break
        sink.data(data)
        left -= min(left, len(data)) if left > 0 else 0
    return {}


def _write(place: Place, path: str, options: dict[str, Any], source: Source, _sink: Sink) -> dict[str, Any]:
    """A new file in the place of the old one, whose owner and mode it takes over where no others are given."""
    directory, name = place.final(path)
    mode, owner, exclusive = options.get("mode"), _owner(place, options), options.get("exclusive", False)
    try:
        old = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        old = None
    if old is not None:
        if exclusive:
            raise FileExistsError(errno.EEXIST, "", path)
        places.check_regular(old, path)
        mode = old.st_mode & 0o7777 if mode is None else mode
        owner = owner or (old.st_uid, old.st_gid)
    written = [0]

    def make(temporary: str) -> None:
        fd = places.create_file(directory, temporary)
        try:
            while True:
                data = source.data()
                if not data:
                    break
                places.write_all(fd, data)
                written[0] += len(data)
            if owner is not None and owner != _owner_of(fd):
                os.fchown(fd, *owner)
            os.fchmod(fd, 0o644 if mode is None else mode)
            os.fsync(fd)  # a file that is there after a power cut is whole
            if exclusive:
                os.link(temporary, name, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=False)
        finally:
            os.close(fd)

    places.place_new(directory, name, make)
    return {"size": written[0]}


def _owner_of(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_uid, status.st_gid


def _owner(place: Place, options: dict[str, Any]) -> tuple[int, int] | None:
    """The user that the options name, looked up inside."""
    if not options.get("owner"):
        return None
    from . import users

    found = users.look_up(place.root, options["owner"])
    return found["uid"], found["gid"]


def _stat(place: Place, path: str, options: dict[str, Any], _source: Source, sink: Sink) -> dict[str, Any]:
    fd = place.find(path, 0 if options.get("follow", True) else os.O_NOFOLLOW)
    status = os.fstat(fd)
    sink.message(*places.entry(".", status, places.link_target("", fd, status)))
    return {}


def _list(place: Place, path: str, options: dict[str, Any], _source: Source, sink: Sink) -> dict[str, Any]:
    top = places.reopen(place.directory(path), os.O_RDONLY | os.O_DIRECTORY)
    for name, directory, base, status in places.walk(top, recursive=options.get("recursive", False)):
        try:
            target = places.link_target(base, directory, status)
        except OSError:  # something else has its name now
            continue
        sink.message(*places.entry(name, status, target))
    return {}


def _mkdir(place: Place, path: str, options: dict[str, Any], _source: Source, _sink: Sink) -> dict[str, Any]:
    if options.get("parents"):
        unpacking.make_directories(place, path.rstrip("/").rpartition("/")[0])
    directory, name = place.parent(path)
    try:
        os.mkdir(name, options.get("mode", 0o755), dir_fd=directory)
    except FileExistsError:
        if not options.get("exist_ok"):
            raise
        os.close(place.directory(path))
        return {}
    owner = _owner(place, options)
    if owner is not None:
        os.chown(name, *owner, dir_fd=directory, follow_symlinks=False)
    return {}


def _remove(place: Place, path: str, options: dict[str, Any], _source: Source, _sink: Sink) -> dict[str, Any]:
    try:
        directory, name = place.parent(path)
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        if not options.get("missing_ok"):
            raise
        return {}
    if places.kind_of(status) != records.DIRECTORY:
        os.unlink(name, dir_fd=directory)
    elif options.get("recursive"):
        packing.remove_tree(directory, name)
    else:
        os.rmdir(name, dir_fd=directory)
    return {}


def _rename(place: Place, path: str, options: dict[str, Any], _source: Source, _sink: Sink) -> dict[str, Any]:
    old_directory, old = place.parent(path)
    new_directory, new = place.parent(options["destination"])
    os.rename(old, new, src_dir_fd=old_directory, dst_dir_fd=new_directory)
    return {}


def _pack(place: Place, path: str, options: dict[str, Any], _source: Source, sink: Sink) -> dict[str, Any]:
    return packing.Packer(sink).pack(place, path, follow=options.get("follow", False))


def _unpack(place: Place, path: str, options: dict[str, Any], source: Source, _sink: Sink) -> dict[str, Any]:
    return unpacking.Unpacker(place, path, keep=options.get("keep", False)).unpack(source)


OPERATIONS: dict[str, Operation] = {
    "read": _read,
    "write": _write,
    "stat": _stat,
    "list": _list,
    "mkdir": _mkdir,
    "remove": _remove,
    "rename": _rename,
    "pack": _pack,
    "unpack": _unpack,
}
