"""The pool with real VMs: each use a clone of its own, none that died or hangs, memory as promised, no trace."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest

import byre
from byre import capacity, health, pool_member
from byre.admission import EMULATOR_MIB
from tests.conformance.test_process import SOON
from tests.conftest import machine_options
from tests.vm.test_vm import descriptors, qemus_of, until

pytestmark = pytest.mark.vm

MEMORY_MIB = 256


def pool(**options: Any) -> byre.Pool:
    return byre.Pool(memory_mib=MEMORY_MIB, timeout=SOON * 4, **machine_options(), **options)


async def test_every_use_has_a_vm_that_nobody_had() -> None:
    async with pool(size=2) as vms:
        for _ in range(4):
            async with vms.acquire() as vm:
                listed = await vm.run(["sh", "-c", "ls /tmp; touch /tmp/mine"], capture_output=True, check=True)
                assert listed.stdout == b""
        await vms.wait_full()
        stats = vms.stats()
        assert (stats.handed_out, stats.ready, stats.failed, stats.replaced) == (4, 2, 0, 0)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_vm_that_died_or_hangs_while_it_was_ready_is_not_handed_out(
    how: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_member, "CHECK_TIMEOUT", SOON / 20)
    monkeypatch.setattr(health, "INTERVAL", 10 * SOON)  # it is found when it is to be handed out
    async with pool(size=2, max_cpus=2) as vms:
        await vms.wait_full()
        bad = next(iter(vms._members)).vm.machine_pid
        os.kill(bad, how)
        async with vms.acquire() as one, vms.acquire() as other:
            for vm in (one, other):
                assert vm.machine_pid != bad
                assert (await vm.run(["true"], timeout=SOON)).returncode == 0
        await until(lambda: vms.stats().replaced >= 1)
        await until(lambda: bad not in qemus_of(os.getpid()))


async def test_a_vm_that_hangs_is_replaced_before_anybody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "INTERVAL", SOON / 100)
    monkeypatch.setattr(health, "PATIENCE", SOON / 20)
    async with pool(size=1) as vms:
        await vms.wait_full()
        bad = next(iter(vms._members)).vm.machine_pid
        os.kill(bad, signal.SIGSTOP)
        await until(lambda: vms.stats().replaced >= 1)
        await until(lambda: bad not in qemus_of(os.getpid()))
        await vms.wait_full()


async def test_a_vm_uses_no_more_than_it_is_counted_for() -> None:
    async with pool(size=1) as vms, vms.acquire() as vm:
        before = capacity.own_memory_mib(vm.machine_pid)
        assert 0 < before < EMULATOR_MIB + MEMORY_MIB / 4
        fill = "mount -t tmpfs -o size=200m none /mnt; dd if=/dev/urandom of=/mnt/fill bs=1M 2>/dev/null; true"
        await vm.run(["sh", "-c", fill], check=True, timeout=SOON * 3)
        after = capacity.own_memory_mib(vm.machine_pid)
        assert before + 100 < after < MEMORY_MIB + EMULATOR_MIB


async def test_one_that_may_have_one_vm_has_one() -> None:
    async with pool(size=3, max_memory_mib=1.5 * (MEMORY_MIB + EMULATOR_MIB)) as vms:
        async with vms.acquire():
            with pytest.raises(byre.errors.PoolTimeout) as caught:
                async with vms.acquire(timeout=0.2):
                    pass
            assert caught.value.data["lacking"] == "memory"
            assert len(qemus_of(os.getpid())) >= 1
        async with vms.acquire():
            pass


@pytest.mark.behaviour("B41")
@pytest.mark.parametrize("delay", [0.0, 0.05, 0.3])
async def test_left_while_it_is_being_filled_nothing_is_left(delay: float) -> None:
    before = descriptors(), qemus_of(os.getpid()), set(os.listdir("/tmp")), asyncio.all_tasks()

    async def fill() -> None:
        async with pool(size=3):
            await asyncio.Event().wait()

    filling = asyncio.create_task(fill())
    await asyncio.sleep(delay)
    filling.cancel()
    done, _ = await asyncio.wait({filling}, timeout=SOON)
    assert filling in done
    assert qemus_of(os.getpid()) == before[1]
    assert asyncio.all_tasks() <= before[3]
    await until(lambda: descriptors() <= before[0])  # threads that watched the emulators close theirs
    assert not {name for name in set(os.listdir("/tmp")) - before[2] if "byre" in name}
