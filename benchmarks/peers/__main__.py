"""One peer, in this process: `python -m benchmarks.peers NAME RUNS` writes a line of JSON for each result."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
from pathlib import Path

from . import PEERS
from .interface import Cannot
from .measure import measure, reason


def say(**fields: str | float) -> None:
    print(json.dumps(fields), flush=True)


def said(step: str, result: float | str) -> None:
    if isinstance(result, float):
        say(step=step, seconds=result)
    else:
        say(step=step, reason=result)


def main(name: str, runs: int) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that it is stopped in order
    with tempfile.TemporaryDirectory() as directory:
        try:
            peer = PEERS[name](Path(directory))
            say(version=peer.version())
        except ImportError as error:
            say(missing=f"not installed here ({error.name}): make peers")
        except Cannot as error:
            say(missing=str(error))
        except Exception as error:
            say(missing=reason(error))
        else:
            measure(peer, runs, said)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
