"""256 MiB each way through a process's stdin and stdout, against the raw channel in the same direction.

The raw channel is the port of a bare machine: dd in the guest, plain reads and writes at the host, the best of
several block sizes.  What byre carries is checked with SHA-256 (outside the timed part).
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from typing import Any

import byre
import byre_images
from byre import ProcessParameters

from . import floor
from .report import Report, median

TARGET = ">= 0.6"
MIB = 1024 * 1024
SIZE = 256 * MIB
RAW_SIZE = 32 * MIB
BLOCKS_KIB = (4, 16, 32, 64, 128, 256)
PIECE = 16 * MIB


async def raw_out(image: Any, machine: str, runs: int) -> dict[int, list[float]]:
    """Bytes a second from the guest, by block size in KiB."""
    sizes = [kib for _ in range(runs) for kib in BLOCKS_KIB]
    script = (
        "echo ready >&3; while read k n <&3; do busybox dd if=/dev/zero bs=${k}k count=$n >&3 2>/dev/null; done"
    )
    rates: dict[int, list[float]] = {kib: [] for kib in BLOCKS_KIB}
    loop = asyncio.get_running_loop()
    async with floor.bare_machine(image, machine, script) as (channel, _):
        await loop.sock_recv(channel, 64)
        buffer = bytearray(256 * 1024)
        for kib in sizes:
            start = time.perf_counter()
            await loop.sock_sendall(channel, b"%d %d\n" % (kib, RAW_SIZE // (kib * 1024)))
            got = 0
            while got < RAW_SIZE:
                got += await loop.sock_recv_into(channel, buffer)
            rates[kib].append(RAW_SIZE / (time.perf_counter() - start))
    return rates


async def raw_in(image: Any, machine: str, runs: int) -> dict[int, list[float]]:
    """Bytes a second to the guest, by the block size in KiB of both sides."""
    sizes = [kib for _ in range(runs) for kib in BLOCKS_KIB]
    steps = "; ".join(
        f"busybox dd of=/dev/null bs={kib}k count={RAW_SIZE // (kib * 1024)} iflag=fullblock <&3 2>&-; echo >&3"
        for kib in sizes
    )
    rates: dict[int, list[float]] = {kib: [] for kib in BLOCKS_KIB}
    loop = asyncio.get_running_loop()
    async with floor.bare_machine(image, machine, f"echo ready >&3; {steps}; busybox sleep 100") as (channel, _):
        await loop.sock_recv(channel, 64)
        for kib in sizes:
            block = bytes(kib * 1024)
            start = time.perf_counter()
            for _ in range(RAW_SIZE // len(block)):
                await loop.sock_sendall(channel, block)
            await loop.sock_recv(channel, 64)
            rates[kib].append(RAW_SIZE / (time.perf_counter() - start))
    return rates


async def ours_out(vm: Any, piece: bytes) -> float:
    turns = SIZE // len(piece)
    script = f"i=0; while [ $i -lt {turns} ]; do cat /tmp/piece; i=$((i+1)); done"
    received = hashlib.sha256()
    chunks = []
    start = time.perf_counter()
    async with await vm.create_process(ProcessParameters(args=["sh", "-c", script], stdout=True)) as process:
        while chunk := await process.stdio.stdout.read(MIB):
            chunks.append(chunk)
        rate = SIZE / (time.perf_counter() - start)
    for chunk in chunks:
        received.update(chunk)
    assert received.digest() == hashlib.sha256(piece * turns).digest(), "the bytes are not those that were sent"
    return rate


async def ours_in(vm: Any, piece: bytes, command: str = "cat >/dev/null") -> tuple[float, bytes]:
    start = time.perf_counter()
    config = ProcessParameters(args=["sh", "-c", command], stdin=True, stdout=True)
    async with await vm.create_process(config) as process:
        view = memoryview(piece)
        for _ in range(SIZE // len(piece)):
            for offset in range(0, len(piece), 65536):
                process.stdio.stdin.write(view[offset : offset + 65536])
                await process.stdio.stdin.drain()
        await process.close_stdin()
        out = await process.stdio.stdout.read()
        assert (await process.wait()).code == 0
        return SIZE / (time.perf_counter() - start), out


async def run(runs: int) -> Report:
    image = byre_images.ensure()
    piece = os.urandom(PIECE)
    async with byre.UtilityVM() as vm:
        machine = (await vm.info())["machine"]["machine"].partition(":")[0]
        await vm.run(["sh", "-c", "cat >/tmp/piece"], input=piece, check=True)
        out = [await ours_out(vm, piece) for _ in range(runs)]
        into = [(await ours_in(vm, piece))[0] for _ in range(runs)]
        _, shown = await ours_in(vm, piece, "sha256sum")
        digest = hashlib.sha256(piece * (SIZE // PIECE)).hexdigest()
        assert shown.split()[0].decode() == digest, "the bytes are not those that were sent"
    raw_outs = await raw_out(image, machine, runs)
    raw_ins = await raw_in(image, machine, runs)
    best_out = max(median(rates) for rates in raw_outs.values())
    best_in = max(median(rates) for rates in raw_ins.values())
    figures = {"out_mb_s": median(out) / 1e6, "in_mb_s": median(into) / 1e6}
    figures |= {"raw_out_mb_s": best_out / 1e6, "raw_in_mb_s": best_in / 1e6}
    figures |= {f"raw_out_{kib}k_mb_s": median(rates) / 1e6 for kib, rates in raw_outs.items()}
    figures |= {f"raw_in_{kib}k_mb_s": median(rates) / 1e6 for kib, rates in raw_ins.items()}
    figures |= {"out_ratio": median(out) / best_out, "in_ratio": median(into) / best_in}
    ratio = min(figures["out_ratio"], figures["in_ratio"])
    return Report(name="stdio", runs=runs, ratio=ratio, target=TARGET, figures=figures)
