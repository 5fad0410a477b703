"""What a peer is: something that runs a command elsewhere, and can be measured in the steps of `measure`.

To add one: a subclass, and a line in `PEERS` of this package.  A peer does what its users would do, with its
defaults where they can work, and never guesses: what it has no notion of is `Cannot`, with the reason.  Its methods
block; each is interrupted when its time is up, and the process that a peer runs in is killed with all it started.
"""

from __future__ import annotations

import subprocess
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

#: Of every machine, whatever this host has: some peers have no other, or none that can be chosen.
ACCELERATOR = "tcg"


class Cannot(Exception):
    """Why a peer is missing here, or has no figure for a step; in words for the table."""


class Peer(ABC):
    """`directory` is empty, the peer's own, and is gone afterwards.

    A constructor prepares what is not measured (keys, images, a template), and raises `Cannot` or ImportError where
    the peer is not there.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @abstractmethod
    def version(self) -> str:
        """What was measured."""

    @abstractmethod
    def start(self) -> None:
        """From nothing to a peer that takes commands."""

    def start_warm(self) -> None:
        """The same in its quickest way, from what it keeps for that."""
        raise Cannot("keeps nothing to start from")

    @abstractmethod
    def run(self, script: str) -> bytes:
        """The stdout of `sh -c script`, whole; an error where it fails."""

    @abstractmethod
    def put(self, data: bytes, path: str) -> None:
        """Write a file."""

    @abstractmethod
    def get(self, path: str) -> bytes:
        """Read a file."""

    @abstractmethod
    def stop(self) -> None:
        """End what `start` or `start_warm` began; nothing is left running."""


def output_of(command: Sequence[str | Path], *, stdin: bytes = b"") -> bytes:
    """The stdout of a program of this host; `Cannot` with what it said where it is missing or fails."""
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, check=True)
    except FileNotFoundError as error:
        raise Cannot(f"{command[0]} is not installed") from error
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout).decode(errors="replace").strip().splitlines()
        raise Cannot(
            f"{Path(command[0]).name}: {said[-1] if said else f'exit status {error.returncode}'}"
        ) from error
    return done.stdout


def debian_version(package: str) -> str:
    """The version of an installed Debian package, with its name."""
    return f"{package} {output_of(['dpkg-query', '-W', '-f', '${Version}', package]).decode()}"
