"""256 MiB each way through a process's stdin and stdout, against the raw channel in the same direction.

The raw channel is the port of a bare machine: dd in the guest, plain reads and writes at the host, the best of
several block sizes.  What byre carries is checked with SHA-256 (outside the timed part).

A process has pipes for stdin and stdout, so what a pipe inside the VM gives without an agent is reported too, and
how much was reached of what port and pipe would give in turn (`*_of_port_and_pipe`): the VM has one virtual CPU.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

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


#: Two processes and a pipe as large as the agent's; the most of several block sizes, in bytes a second.
PIPE_INSIDE = f"""
import fcntl, os, time
def rate(block):
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, {MIB})
    buffer = bytearray(block)
    if os.fork() == 0:
        os.close(writing)
        while os.readv(reading, [buffer]):
            pass
        os._exit(0)
    os.close(reading)
    start = time.perf_counter()
    for _ in range({SIZE} // block):
        rest = memoryview(buffer)
        while rest:
            rest = rest[os.write(writing, rest):]
    os.close(writing)
    os.wait()
    return {SIZE} / (time.perf_counter() - start)
print(max(rate(kib * 1024) for kib in (64, 256, 1024)))
"""


class Carried(NamedTuple):
    """Bytes a second, and processor time: QEMU's, which is the guest's and the emulator's, and this process's."""

    rate: float
    guest_s: float
    host_s: float


class Meter:
    """Begins with its making; `carried` is said when SIZE bytes are through."""

    def __init__(self, vm: Any) -> None:
        self._pid = vm.machine_pid
        self._begin = self._now()

    def _now(self) -> tuple[float, float, float]:
        fields = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
        guest = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), guest, time.process_time()

    def carried(self) -> Carried:
        wall, guest, host = (now - begin for now, begin in zip(self._now(), self._begin, strict=True))
        return Carried(SIZE / wall, guest, host)


async def ours_out(vm: Any, piece: bytes) -> Carried:
    turns = SIZE // len(piece)
    script = f"i=0; while [ $i -lt {turns} ]; do cat /tmp/piece; i=$((i+1)); done"
    received = hashlib.sha256()
    chunks = []
    meter = Meter(vm)
    async with await vm.create_process(ProcessParameters(args=["sh", "-c", script], stdout=True)) as process:
        while chunk := await process.stdio.stdout.read(MIB):
            chunks.append(chunk)
        carried = meter.carried()
    for chunk in chunks:
        received.update(chunk)
    assert received.digest() == hashlib.sha256(piece * turns).digest(), "the bytes are not those that were sent"
    return carried


async def ours_in(vm: Any, piece: bytes, command: str = "cat >/dev/null") -> tuple[Carried, bytes]:
    meter = Meter(vm)
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
        return meter.carried(), out


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
        command = ["/usr/bin/python3", "-c", PIPE_INSIDE]
        pipes = [float((await vm.run(command, capture_output=True, check=True)).stdout) for _ in range(runs)]
    raw_outs = await raw_out(image, machine, runs)
    raw_ins = await raw_in(image, machine, runs)
    best_out = max(median(rates) for rates in raw_outs.values())
    best_in = max(median(rates) for rates in raw_ins.values())
    rates = {"out": median([one.rate for one in out]), "in": median([one.rate for one in into])}
    figures = {f"{way}_mb_s": rate / 1e6 for way, rate in rates.items()}
    figures |= {"raw_out_mb_s": best_out / 1e6, "raw_in_mb_s": best_in / 1e6}
    for way, runs_of_it in (("out", out), ("in", into)):
        figures[f"{way}_guest_cpu_s_per_gib"] = median([one.guest_s for one in runs_of_it]) * 1024 * MIB / SIZE
        figures[f"{way}_host_cpu_s_per_gib"] = median([one.host_s for one in runs_of_it]) * 1024 * MIB / SIZE
    figures |= {f"raw_out_{kib}k_mb_s": median(rates) / 1e6 for kib, rates in raw_outs.items()}
    figures |= {f"raw_in_{kib}k_mb_s": median(rates) / 1e6 for kib, rates in raw_ins.items()}
    figures["pipe_inside_mb_s"] = median(pipes) / 1e6
    for way, raw in (("out", best_out), ("in", best_in)):
        figures[f"{way}_of_port_and_pipe"] = rates[way] * (1 / raw + 1 / median(pipes))
    figures |= {"out_ratio": rates["out"] / best_out, "in_ratio": rates["in"] / best_in}
    ratio = min(figures["out_ratio"], figures["in_ratio"])
    return Report(name="stdio", runs=runs, ratio=ratio, target=TARGET, figures=figures)
