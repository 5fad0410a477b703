"""`python -m tests.cuts --bytes N --cuts N --seed S`: bytes through a session whose channel is cut again and again.

Numbered blocks go into `cat` and come back, N bytes both ways together and until as many cuts were made; beside
them one process after the other is run, whose output and exit code are known.  The last line says what was found:

    bytes=… cuts=… handshake=… header=… payload=… between=… processes=… wrong=0 … seconds=…

The four places say where each direction of each cut connection ended, so they add up to twice the cuts.  Exits with
1 when the checksums differ, a process was wrong, or the session was lost.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import random
import sys
import time
from typing import Any

from byre import ProcessParameters
from byre.sockethost import SocketHost

from .agent import cut_host
from .proxy import PLACES, CuttingProxy

#: No power of two: no buffer's or frame's size that could hide a repetition.
BLOCK = 1_000_003


async def exchange(host: SocketHost, proxy: CuttingProxy, size: int, cuts: int, seed: int) -> tuple[int, bool]:
    """Blocks there and back until there were so many bytes and cuts: how many bytes, and whether all was right."""
    block = bytearray(random.Random(seed).randbytes(BLOCK))
    sent, received = hashlib.sha256(), hashlib.sha256()
    total = came = 0
    async with await host.create_process(ProcessParameters(args=["cat"], stdin=True, stdout=True)) as process:
        stdin, stdout = process.stdio.stdin, process.stdio.stdout
        assert stdin is not None and stdout is not None

        async def read() -> None:
            nonlocal came
            while data := await stdout.read(1 << 20):
                received.update(data)
                came += len(data)

        reading = asyncio.create_task(read())
        while 2 * total < size or proxy.cuts < cuts:
            block[:8] = total.to_bytes(8, "big")
            sent.update(block)
            stdin.write(bytes(block))
            total += BLOCK
            await stdin.drain()
        stdin.close()
        await reading
        code = (await process.wait()).code
    return 2 * total, came == total and code == 0 and sent.digest() == received.digest()


async def run_processes(host: SocketHost, counts: dict[str, int]) -> None:
    """One after the other, for as long as there is time; each says who it is."""
    while True:
        number = counts["processes"]
        result = await host.run(["sh", "-c", f"echo {number}; exit {number % 250}"], capture_output=True)
        if result.returncode != number % 250 or result.stdout != b"%d\n" % number:
            counts["wrong"] += 1
        counts["processes"] += 1


def peak_mib(pid: int) -> int:
    """The most memory that a process ever had."""
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) // 1024


async def measure(size: int, cuts: int, seed: int) -> dict[str, Any]:
    """One session; see the module's text."""
    counts = {"processes": 0, "wrong": 0}
    begin = time.monotonic()
    mean = max(1, size // 2 // cuts) if cuts else 0
    async with cut_host(mean=mean, seed=seed) as (host, proxy, agent):
        beside = asyncio.create_task(run_processes(host, counts))
        try:
            total, right = await exchange(host, proxy, size, cuts, seed)
        finally:
            beside.cancel()
            await asyncio.wait([beside])
        if not beside.cancelled():
            beside.result()  # raises: it has ended by itself
        counts["wrong"] += not right
        memory = {"host_mib": peak_mib(os.getpid()), "agent_mib": peak_mib(agent.pid)}
        return {
            "bytes": total,
            "cuts": proxy.cuts,
            **{place: proxy.places[place] for place in PLACES},
            **counts,
            **memory,
            "seconds": round(time.monotonic() - begin, 1),
        }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cuts")
    parser.add_argument("--bytes", type=int, default=1 << 30)
    parser.add_argument("--cuts", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    found = asyncio.run(measure(options.bytes, options.cuts, options.seed))
    print(" ".join(f"{name}={value}" for name, value in found.items()))
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
