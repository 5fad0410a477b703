"""Loads kernel modules, as modprobe would, from /lib/modules/RELEASE.

Rule: a module is loaded when something needs it: each costs milliseconds of boot under emulation.  Loading runs
the driver's code in this process and may take as long as its devices do; the loop loads only what the channel
needs.  Format: modules.dep(5).  The image's modules are not compressed.
"""

from __future__ import annotations

import errno
import os

from . import linux

DIRECTORY = "/lib/modules"


def load(*names: str, directory: str = "") -> None:
    """Load modules and what they depend on.  Harmless when they are loaded or built in.

    Raises FileNotFoundError for one that the image does not have, OSError when the kernel refuses one.
    """
    directory = directory or f"{DIRECTORY}/{os.uname().release}"
    wanted = [name.replace("-", "_") for name in names]
    paths = _order(f"{directory}/modules.dep", wanted)
    for name in wanted:
        if not paths[name] and not os.path.isdir(f"/sys/module/{name}"):
            raise FileNotFoundError(errno.ENOENT, f"the image has no kernel module {name}", directory)
        for path in paths[name]:
            _insert(f"{directory}/{path}")


def _order(index: str, wanted: list[str]) -> dict[str, list[str]]:
    """For each name the files to load, dependencies first; [] for one that is not in modules.dep."""
    found: dict[str, list[str]] = {name: [] for name in wanted}
    with open(index, encoding="utf-8") as file:
        for line in file:
            path, _, others = line.partition(":")
            name = module_name(path)
            if name in found:
                found[name] = [*reversed(others.split()), path]
    return found


def module_name(path: str) -> str:
    """The name that the kernel knows a module's file by."""
    return path.rpartition("/")[2].partition(".ko")[0].replace("-", "_")


def _insert(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        linux.finit_module(fd)
    except FileExistsError:
        pass
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}: kernel module", path) from error
    finally:
        os.close(fd)
