"""A shared directory beside the same work on this host: a large file in both directions, and many small ones.

The work is done by the same program in the VM and here, so that what is compared is the way to the files, and the
processor, which is emulated where there is no KVM.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import tempfile
from pathlib import Path

import byre

from .report import Report, median

#: Bytes of the large file, and small files: a minute's work of an emulated guest.
LARGE = 16 * 1024 * 1024
FILES = 300

#: Prints how long each step took, in seconds.
WORK = """
import json, os, sys, time
where, large, files = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
os.chdir(where)
times = {}
def timed(name, work):
    begin = time.perf_counter(); work(); times[name] = time.perf_counter() - begin
def write():
    with open("large", "wb", buffering=0) as file:
        for _ in range(large >> 20): file.write(bytes(1 << 20))
def read():
    with open("large", "rb", buffering=0) as file:
        while file.read(1 << 20): pass
def create():
    os.mkdir("small")
    for number in range(files):
        with open(f"small/{number}", "wb", buffering=0) as file: file.write(b"x" * 100)
def look():
    for number in range(files): os.stat(f"small/{number}")
def read_all():
    for number in range(files):
        with open(f"small/{number}", "rb", buffering=0) as file: file.read()
def listing():
    os.listdir("small")
def remove():
    for number in range(files): os.unlink(f"small/{number}")
    os.rmdir("small")
for work in (write, read, create, listing, look, read_all, remove): timed(work.__name__, work)
print(json.dumps(times))
"""


async def run(runs: int) -> Report:
    """`runs` counts the large file; the small ones are many enough to be made once each time."""
    there: list[dict[str, float]] = []
    here: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        async with byre.UtilityVM() as vm, await vm.share(directory) as share:
            for _ in range(runs):
                done = await vm.run(_command("python3", share.path), capture_output=True, check=True)
                there.append(json.loads(done.stdout))
                native = await asyncio.to_thread(
                    subprocess.run, _command("python3", directory), capture_output=True, check=True
                )
                here.append(json.loads(native.stdout))
    figures: dict[str, float] = {}
    for place, times in (("share", there), ("host", here)):
        middle = {step: median([each[step] for each in times]) for step in times[0]}
        for step in ("write", "read"):
            figures[f"{place}_{step}_mb_s"] = LARGE / middle[step] / 1e6
        for step in ("create", "look", "read_all", "remove"):
            figures[f"{place}_{step}_files_s"] = FILES / middle[step]
        figures[f"{place}_listing_ms"] = middle["listing"] * 1e3
    return Report(name="shares", runs=runs, figures=figures)


def _command(python: str, where: Path | str) -> list[str]:
    return [python, "-I", "-S", "-c", WORK, str(where), str(LARGE), str(FILES)]
