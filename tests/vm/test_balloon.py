"""Memory that a VM gives back to its host."""

from __future__ import annotations

from typing import Any

import pytest

import byre
from byre import errors
from tests.conftest import machine_options

pytestmark = pytest.mark.vm

MIB = 1024 * 1024


async def available(vm: Any) -> int:
    found = await vm.run(["grep", "MemAvailable", "/proc/meminfo"], capture_output=True)
    return int(found.stdout.split()[1]) * 1024


async def test_memory_comes_back_to_the_host_and_goes_to_the_guest_again() -> None:
    async with byre.UtilityVM(**machine_options(), memory_mib=512, template="off") as vm:
        await vm.run(["python3", "-I", "-S", "-c", "b'x' * (200 << 20)"], check=True)
        before = await available(vm)
        came = await vm.reclaim(256)
        assert came.memory == 256 * MIB
        assert came.resident_before - came.resident_after > 100 * MIB
        assert await available(vm) < before - 200 * MIB
        with pytest.raises(errors.InvalidRequest):
            await vm.reclaim(1024)
        assert (await vm.reclaim(512)).memory == 512 * MIB
        assert await available(vm) > before - 50 * MIB


async def test_a_clone_gives_nothing_back(vm: Any) -> None:
    with pytest.raises(errors.NotSupported):
        await vm.reclaim(256)
