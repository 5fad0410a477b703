"""byre beside others that run commands in a VM, or are a way into one: one machine, one run, the same emulator.

Each peer is measured in a process of its own (`python -m benchmarks.peers NAME RUNS`), with a directory for its
temporary files; both are gone before the next one's turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import sys
import tempfile

from benchmarks.report import Report

from .interface import Peer
from .machines import Byre, Guestfs, QuickSandbox, VirtmeNg
from .on_host import Crun
from .ways_in import GuestAgent, OpenSsh, Paramiko

PEERS: dict[str, type[Peer]] = {
    "byre": Byre,
    "quick-sandbox": QuickSandbox,
    "virtme-ng": VirtmeNg,
    "qemu-guest-agent": GuestAgent,
    "openssh": OpenSsh,
    "paramiko": Paramiko,
    "guestfs": Guestfs,
    "crun": Crun,
}

#: Longest that a peer may take for all, in seconds: then it is killed, and its other figures are missing.
LIMIT = 170.0

#: For a peer to be stopped in order when it is over, in seconds.
GRACE = 15.0

TARGET = "< 1"


@dataclasses.dataclass(kw_only=True)
class PeersReport(Report):
    """`missing` has the reason for each peer and each figure that is not there; `versions` what was measured."""

    missing: dict[str, str] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)


async def run(runs: int) -> PeersReport:
    """The ratio is that of waiting for a VM of one's own: byre's quickest start over the quickest of the others."""
    report = PeersReport(name="peers", runs=runs, target=TARGET)
    for name in PEERS:
        print(f"measuring {name}", file=sys.stderr)
        with tempfile.TemporaryDirectory(prefix="byre-peers-", ignore_cleanup_errors=True) as directory:
            await _measure(name, report, directory)
    report.ratio = ratio(report.figures)
    return report


async def _measure(name: str, report: PeersReport, directory: str) -> None:
    """Take the lines that the peer's process writes, until it ends or is killed."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.peers", name, str(report.runs)),
        env={**os.environ, "TMPDIR": directory},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    end = "it ended before"
    try:
        async with asyncio.timeout(LIMIT):
            async for line in process.stdout:
                note(report, name, json.loads(line))
            await process.wait()
    except TimeoutError:
        end = f"no end within {LIMIT:.0f} s"
    finally:
        await _end(process)
    if process.returncode:
        report.missing.setdefault(name, end)


async def _end(process: asyncio.subprocess.Process) -> None:
    """First so that the peer is stopped in order: what it began may be in no group that could be killed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GRACE):
                await process.wait()


def note(report: PeersReport, name: str, line: dict[str, str | float]) -> None:
    """One line of a peer's process: `version`, `missing`, or a `step` with `seconds` or a `reason`."""
    if "version" in line:
        report.versions[name] = str(line["version"])
    elif "missing" in line:
        report.missing[name] = str(line["missing"])
    elif "seconds" in line:
        report.figures[f"{name}_{line['step']}_s"] = float(line["seconds"])
    else:
        report.missing[f"{name}_{line['step']}"] = str(line["reason"])


def ratio(figures: dict[str, float]) -> float | None:
    """Of those that bring a machine: ways into one are left out, for theirs is this benchmark's; so is crun."""
    quickest = {
        name: min(found)
        for name in ("byre", "quick-sandbox", "virtme-ng", "guestfs")
        if (found := [figures[key] for step in ("cold", "warm") if (key := f"{name}_{step}_start_s") in figures])
    }
    ours = quickest.pop("byre", None)
    return ours / min(quickest.values()) if ours and quickest else None
