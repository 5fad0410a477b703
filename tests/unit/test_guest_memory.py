"""A guest's memory, read from outside its emulator: this process plays the emulator."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from byre.errors import MachineFailed
from byre.machines import guest_memory
from byre.machines.guest_memory import PAGE

SIZE = 4 * 1024 * 1024


class Memory:
    """Some memory of this process, as an emulator has it: of a file, private, or anonymous."""

    def __init__(self, file: int = -1) -> None:
        self._map = mmap.mmap(file, SIZE, flags=mmap.MAP_PRIVATE | (0 if file >= 0 else mmap.MAP_ANONYMOUS))
        self._pin = ctypes.c_char.from_buffer(self._map)
        self.address = ctypes.addressof(self._pin)

    def write(self, page: int, data: bytes) -> None:
        self._map[page * PAGE : page * PAGE + len(data)] = data

    def read(self) -> bytes:
        return self._map[:]

    def close(self) -> None:
        del self._pin
        self._map.close()


@pytest.fixture
def target(tmp_path: Path) -> Iterator[int]:
    with (tmp_path / "target").open("w+b") as file:
        yield file.fileno()


def nothing() -> None:
    """Called between pieces."""


def copied(memory: Memory, target: int) -> int:
    return guest_memory.copy_written(os.getpid(), memory.address, SIZE, target, nothing)


@pytest.mark.parametrize("seed", range(5))
def test_what_it_began_with_and_what_was_written_make_the_whole(seed: int, tmp_path: Path, target: int) -> None:
    chance = random.Random(seed)
    with (tmp_path / "base").open("w+b") as base:
        base.truncate(SIZE)
        for page in chance.sample(range(SIZE // PAGE), 100):
            os.pwrite(base.fileno(), chance.randbytes(PAGE), page * PAGE)
        before = os.pread(base.fileno(), SIZE, 0)
        memory = Memory(base.fileno())
        memory.read()  # pages of the file's are mapped, and are not its own
        written = set(chance.sample(range(SIZE // PAGE), 50))
        for page in written:
            memory.write(page, chance.choice([bytes(PAGE), b"x", chance.randbytes(PAGE)]))
        guest_memory.copy_base(base.fileno(), target, nothing)
        assert copied(memory, target) == len(written) * PAGE
        assert os.pread(target, SIZE + 1, 0) == memory.read() != before
        assert os.pread(base.fileno(), SIZE, 0) == before
        memory.close()


def test_memory_that_began_with_nothing_stays_sparse(target: int) -> None:
    memory = Memory()
    memory.write(7, b"something")
    memory.write(900, bytes(PAGE))
    memory.read()
    copied(memory, target)
    assert os.pread(target, SIZE + 1, 0) == memory.read()
    assert os.fstat(target).st_blocks * 512 <= SIZE // 2
    memory.close()


def test_a_copy_ends_when_nobody_wants_it(target: int) -> None:
    class Enough(Exception):
        pass

    def enough() -> None:
        raise Enough

    memory = Memory()
    memory.write(7, b"something")
    with pytest.raises(Enough):
        guest_memory.copy_written(os.getpid(), memory.address, SIZE, target, enough)
    memory.close()


def test_an_emulator_that_lies_leads_to_an_error(target: int) -> None:
    text = "Host virtual address for 0x0 (memory0) is 0x7f49d7fff000\r\n"
    assert guest_memory.parse_address(text) == 0x7F49D7FFF000
    for answer in (None, {}, "", "No memory is mapped at address 0x0", "it is 0x" + "f" * 17, "it is 0x0 and more"):
        with pytest.raises(MachineFailed):
            guest_memory.parse_address(answer)
    for address in (0xFFFF_FFFF_FFFF_F000, 0x7FFF_FFFF_F000):
        with pytest.raises((MachineFailed, OSError)):
            guest_memory.copy_written(os.getpid(), address, SIZE, target, nothing)
