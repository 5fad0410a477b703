"""A VM over its 16550, where it differs from other channels: the kernel's console may be the same line."""

from __future__ import annotations

import asyncio
import hashlib
import random

import pytest

import byre
from byre import ProcessParameters
from tests.conftest import machine_options

pytestmark = pytest.mark.vm

SOON = 60.0

#: Of the highest level, so that a quiet kernel shows them as well.
SHOUT = "while :; do echo '<0>shouted from the kernel' >/dev/kmsg; sleep 0.01; done"


def serial_vm(*kernel_arguments: str, machine: str = "auto") -> byre.UtilityVM:
    options = {**machine_options(), "transport": "serial"}
    return byre.UtilityVM(machine=machine, kernel_arguments=kernel_arguments, **options)


async def echoed(vm: byre.UtilityVM, data: bytes) -> bytes:
    async with asyncio.timeout(SOON):
        return (await vm.run(["cat"], input=data, capture_output=True)).stdout


async def test_the_kernel_writes_to_the_agents_own_line() -> None:
    data = random.Random(1).randbytes(30_000)
    async with serial_vm("console=ttyS1") as vm:
        async with await vm.create_process(ProcessParameters(args=["sh", "-c", SHOUT])) as shouting:
            assert await echoed(vm, data) == data
            await shouting.kill()
        assert "shouted from the kernel" in vm.console_tail(400)
        with pytest.raises(byre.errors.ConnectionLost):
            await vm.run(["sh", "-c", "echo c >/proc/sysrq-trigger"], timeout=SOON)
        assert "Kernel panic" in vm.console_tail(400)


async def test_a_machine_with_two_lines_keeps_them_apart() -> None:
    async with serial_vm(machine="pc") as vm:
        info = await vm.info()
        assert info["machine"]["transport"].startswith("serial")
        data = random.Random(1).randbytes(30_000)
        sent = await vm.run(["sha256sum"], input=data, capture_output=True)
        assert sent.stdout.split()[0].decode() == hashlib.sha256(data).hexdigest()
        await vm.run(["sh", "-c", "echo to the console >/dev/console"], check=True)
        async with asyncio.timeout(SOON):
            while "to the console" not in vm.console_tail(5):
                await vm.run(["true"])
