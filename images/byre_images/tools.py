"""Runs the host's programs for the builder.  Every run has a fixed environment, so that nothing of the caller's
locale, time zone or PATH order reaches a result, and a failure is told with the command, ready to paste.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from byre_proto.errors import printable

from .errors import BuildFailed, ToolMissing

#: Debian package of each program that the builder may run.
PACKAGE_OF = {
    "apt-config": "apt",
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
    "tar2sqfs": "squashfs-tools-ng",
    "zstd": "zstd",
}

#: Where Debian keeps them; an ordinary user's PATH may lack the sbin directories.
SEARCH = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"

#: LC_ALL for messages that can be parsed, SOURCE_DATE_EPOCH for tools that stamp what they write.
ENVIRONMENT = {"PATH": SEARCH, "LC_ALL": "C.UTF-8", "TZ": "UTC", "SOURCE_DATE_EPOCH": "0"}

#: Longest quotation of a failed command's words, in characters: its last lines are what counts.
MAX_QUOTE = 2000

#: No single step of a build takes longer, in seconds; downloads on a slow line are the longest.
STEP_TIMEOUT = 3600.0


def find(tool: str) -> str:
    """Absolute path of a program; `ToolMissing` with its Debian package when it is not there."""
    path = shutil.which(tool, path=SEARCH)
    if path is None:
        package = PACKAGE_OF[tool]
        raise ToolMissing(f"{tool} is not installed", hint=f"apt-get install {package}", tool=tool)
    return path


def run(
    command: Sequence[str | Path], *, env: Mapping[str, str] | None = None, stdin: bytes | None = None
) -> bytes:
    """Standard output of a command that must succeed; `BuildFailed` with its words otherwise."""
    try:
        done = subprocess.run(
            command,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            env={**ENVIRONMENT, **(env or {})},
            timeout=STEP_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise BuildFailed(f"{command[0]} did not end within {STEP_TIMEOUT:.0f} s") from error
    if done.returncode:
        raise failed(command, done.returncode, done.stderr)
    return done.stdout


@contextmanager
def reading(command: Sequence[str | Path]) -> Iterator[IO[bytes]]:
    """The standard output of a command as a stream, for as long as the block runs; it must be read to its end."""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    ) as process:
        assert process.stdout and process.stderr
        try:
            yield process.stdout
        except BaseException:
            process.kill()
            raise
        while process.stdout.read(1 << 16):
            pass  # the padding after a tar's end
        words = process.stderr.read()
    if process.returncode:
        raise failed(command, process.returncode, words)


def failed(command: Sequence[str | Path], status: int, words: bytes) -> BuildFailed:
    """The error of a failed command, for the caller to raise."""
    line = shlex.join(str(part) for part in command)
    said = printable(words.decode(errors="replace").strip()[-MAX_QUOTE:])
    return BuildFailed(f"status {status} from: {line}\n{said}", command=line, status=status)
