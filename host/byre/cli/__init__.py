"""The command line.  This module only parses, dispatches and turns the outcome into an exit status.

Rule: what is not needed for the command at hand is not imported (`byre --version` must not load asyncio), and no
error of ours is shown as a traceback unless `--debug` asks for one.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module

from .parser import parse
from .status import OWN_ERROR, report

TYPE_CHECKING = False  # the typing module is not needed to print a version
if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status.  The entry point of `byre` and of `python -m byre`."""
    _occupy_standard_descriptors()
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()  # after --help too
    except BrokenPipeError:
        # Who read our own output (a list, a log) has enough of it; what is left in the buffer goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OWN_ERROR


def _run(argv: Sequence[str] | None) -> int:
    arguments = parse(sys.argv[1:] if argv is None else argv)
    module, function = arguments.command.split(":")
    try:
        status: int = getattr(import_module(f"{__name__}.{module}"), function)(arguments)
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return report(error, debug=arguments.debug)
    return status


def _occupy_standard_descriptors() -> None:
    """With `>&-` a socket of ours would become somebody's standard output: put /dev/null there instead."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
    for name, fd in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(fd, "w", closefd=False))
