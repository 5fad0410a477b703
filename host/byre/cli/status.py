"""Exit statuses and how errors look.

0 to 255   the command's own status; 128+n: it was killed by signal n
2          usage error
124        --timeout passed (as timeout(1) says it)
125        an error of byre's own: the command did not run, or its fate is not known
126, 127   the command is not executable, is not found
"""

from __future__ import annotations

import sys

from byre_proto.errors import ByreError, ProgramNotExecutable, ProgramNotFound, printable

USAGE = 2
TIMED_OUT = 124
OWN_ERROR = 125
NOT_EXECUTABLE = 126
NOT_FOUND = 127


def status_of(error: BaseException) -> int:
    """The exit status that an error makes."""
    if isinstance(error, ProgramNotFound):
        return NOT_FOUND
    if isinstance(error, ProgramNotExecutable):
        return NOT_EXECUTABLE
    return OWN_ERROR


def report(error: Exception, *, debug: bool = False) -> int:
    """Say on stderr what went wrong and what to do next; returns the exit status."""
    if debug:
        import traceback

        traceback.print_exception(error)
    if isinstance(error, ByreError):
        message, hint = error.message or error.code, error.hint
        console = str(error.data.get("console") or "")
    else:
        message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        hint = "" if debug else "this is a defect of byre; `byre --debug ...` shows where"
        console = ""
    if isinstance(error, OSError) and not isinstance(error, ByreError):
        message, hint = str(error), ""
    if console and console.strip() not in message:
        say("the console's last lines:")
        for line in printable(console).splitlines():
            print(f"  | {line}", file=sys.stderr)
    say(f"error: {printable(message)}")
    if hint:
        print(f"hint: {printable(hint)}", file=sys.stderr)
    return status_of(error)


def say(message: str) -> None:
    """One line about what byre itself does, on stderr: stdout is the command's."""
    print(f"byre: {message}", file=sys.stderr)
