"""Bulk streams of a VM, whose frames are made where the bytes were read and go to the port from there.

Whatever a process does with its pipe, and whenever a stream ends: every byte once and in order, and no other stream
notices.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from typing import Any

import pytest

from byre import ProcessParameters
from byre_guest import pumps
from tests.conformance.test_process import SOON
from tests.conftest import machine_options

pytestmark = pytest.mark.vm

MIB = 1024 * 1024

#: Well past the point from which a stream counts as bulk.
SIZE = 24 * pumps.BULK_AFTER


async def digest(reader: Any) -> tuple[int, str]:
    """Size and SHA-256 of all that a stream carries."""
    size, seen = 0, hashlib.sha256()
    while chunk := await reader.read(MIB):
        size += len(chunk)
        seen.update(chunk)
    return size, seen.hexdigest()


def python(program: str, **streams: bool) -> ProcessParameters:
    return ProcessParameters(args=["python3", "-c", program], **(streams or {"stdout": True}))


#: Ways to fill a pipe, each from the bytes of /tmp/bulk.
WRITERS = {
    "large writes": "d = open('/tmp/bulk', 'rb').read(); os.write(1, b''); sys.stdout.buffer.write(d)",
    "odd pieces": """
d = open('/tmp/bulk', 'rb').read()
at, n = 0, 1
while at < len(d):
    os.write(1, d[at : at + n])
    at, n = at + n, (n * 7 + 13) % 20011 + 1""",
    "pages of the file": "f = os.open('/tmp/bulk', 0)\nwhile os.sendfile(1, f, None, 1 << 20): pass",
    "spliced pages": "f = os.open('/tmp/bulk', 0)\nwhile os.splice(f, 1, 100_000): pass",
    "failed writes": """
import ctypes
d = open('/tmp/bulk', 'rb').read()
for at in range(0, len(d), 100_000):
    os.write(1, d[at : at + 100_000])
    # It leaves an empty part in the pipe.
    assert ctypes.CDLL(None).write(1, ctypes.c_void_p(8), 100) == -1""",
    "packets": """
import fcntl
d = open('/tmp/bulk', 'rb').read()
first = len(d) // 8  # a packet that is read before there is credit for all of it is cut, as pipe(7) has it
os.write(1, d[:first])
fcntl.fcntl(1, fcntl.F_SETFL, os.O_DIRECT | os.O_WRONLY)
for at in range(first, len(d), 1500):
    os.write(1, d[at : at + 1500])""",
}


@pytest.fixture
async def bulk(vm: Any) -> bytes:
    """What /tmp/bulk in the machine holds."""
    data = os.urandom(SIZE)
    await vm.run(["sh", "-c", "cat >/tmp/bulk"], input=data, check=True)
    return data


@pytest.mark.behaviour("B1")
@pytest.mark.parametrize("how", WRITERS)
async def test_every_byte_comes_once_and_in_order(vm: Any, bulk: bytes, how: str) -> None:
    result = await vm.run(["python3", "-c", f"import os, sys\n{WRITERS[how]}"], capture_output=True, check=True)
    assert hashlib.sha256(result.stdout).hexdigest() == hashlib.sha256(bulk).hexdigest()


@pytest.mark.behaviour("B1")
async def test_many_bulk_streams_both_ways_at_once(vm: Any, bulk: bytes) -> None:
    results = await asyncio.gather(*(vm.run(["cat"], input=bulk, capture_output=True) for _ in range(6)))
    assert {hashlib.sha256(r.stdout).hexdigest() for r in results} == {hashlib.sha256(bulk).hexdigest()}


@pytest.mark.behaviour("B2")
async def test_a_writer_that_is_killed_leaves_what_it_had_written(vm: Any) -> None:
    program = "import os\nwhile True: os.write(1, bytes(range(256)) * 256)"
    async with asyncio.timeout(SOON), await vm.create_process(python(program)) as process:
        seen = await process.stdio.stdout.readexactly(SIZE)
        await process.kill()
        seen += await process.stdio.stdout.read()
        assert (await process.wait()).code == 137
    assert seen == (bytes(range(256)) * (len(seen) // 256 + 1))[: len(seen)]


@pytest.mark.behaviour("B4")
async def test_streams_that_are_closed_while_their_bytes_are_under_way_harm_no_other(vm: Any, bulk: bytes) -> None:
    async def closed(number: int) -> None:
        async with await vm.create_process(ProcessParameters(args=["cat", "/dev/zero"], stdout=True)) as process:
            await process.stdio.stdout.readexactly(2 * pumps.BULK_AFTER + number * 10_000)
            await process.close_stdout()
            assert (await process.wait()).signal in (0, 13)

    async with asyncio.timeout(SOON):
        intact = asyncio.ensure_future(vm.run(["cat", "/tmp/bulk"], capture_output=True))
        await asyncio.gather(*(closed(number) for number in range(8)))
        assert (await intact).stdout == bulk


@pytest.mark.behaviour("B3")
async def test_a_process_that_reads_its_own_output_harms_only_itself(vm: Any, bulk: bytes) -> None:
    program = """
import os, threading
mine = os.open('/proc/self/fd/1', os.O_RDONLY)
def steal():
    while True: os.read(mine, 70_000)
threading.Thread(target=steal, daemon=True).start()
while True: os.write(1, bytes(50_000))
"""
    async with asyncio.timeout(SOON), await vm.create_process(python(program)) as process:
        await process.stdio.stdout.readexactly(8 * pumps.BULK_AFTER)
        other = await vm.run(["cat", "/tmp/bulk"], capture_output=True)
        assert other.stdout == bulk
        assert not any(await process.stdio.stdout.readexactly(8 * pumps.BULK_AFTER))
        await process.kill()


@pytest.mark.behaviour("B3")
async def test_many_streams_that_were_bulk_and_are_read_no_more_do_not_fill_the_memory(vm: Any) -> None:
    processes = []
    try:
        for _ in range(3 * pumps.PIPES_BUDGET // pumps.PIPE_SIZE):
            process = await vm.create_process(ProcessParameters(args=["cat", "/dev/zero"], stdout=True))
            processes.append(process)
            await process.stdio.stdout.readexactly(2 * pumps.BULK_AFTER)
        sizes = await vm.run(
            ["python3", "-c", "import fcntl, glob, os\nfor p in glob.glob('/proc/[0-9]*/comm'):\n"
             " if open(p).read() == 'cat\\n':\n"
             "  print(fcntl.fcntl(os.open(p[:-4] + 'fd/1', os.O_WRONLY), 1032))"],
            capture_output=True, check=True,
        )  # fmt: skip
        large = [size for size in map(int, sizes.stdout.split()) if size > 65536]
        assert len(large) <= pumps.PIPES_BUDGET // pumps.PIPE_SIZE < len(processes)
        if (
            machine_options()["transport"] == "virtio-serial"
        ):  # elsewhere frames are kept for replay: nothing is bulk
            assert large
    finally:
        for process in processes:
            await process.kill()
            await process.close()
