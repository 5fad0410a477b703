"""The pool, with VMs on machines of memory: always full, each used once, limits kept, nothing left."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from byre import Pool, UtilityVM, capacity, errors, health, pool, pool_member, sync
from byre.admission import EMULATOR_MIB
from byre.machines.memory import MemoryMachine
from byre.testing import FakeProcess, Handler
from tests.unit.test_vm_host import MemoryVM, Played, forever, silent_but_open

SOON = 10.0


def played(handlers: dict[str, Handler] | None = None) -> Played:
    guest = Played(handlers)
    guest.commands.update(true=true, sleep=forever)
    return guest


async def true(_: FakeProcess) -> int:
    return 0


class MemoryPool(Pool):
    """A Pool of VMs of memory; `guests` makes the next one's guest, and its machines are kept in `vms`."""

    def __init__(self, guests: Callable[[], Any] = played, **options: Any) -> None:
        self.vms: list[MemoryVM] = []
        self.guests = guests
        super().__init__(**{"max_cpus": 100, "timeout": SOON, **options})

    def _make(self) -> UtilityVM:
        vm = MemoryVM(self.guests(), boot_timeout=self._options.get("boot_timeout"))
        self.vms.append(vm)
        return vm

    @property
    def started(self) -> list[MemoryVM]:
        return [vm for vm in self.vms if vm.machine._started]

    @property
    def alive(self) -> list[MemoryVM]:
        return [vm for vm in self.started if vm.machine.exited is None]


@pytest.fixture(autouse=True)
async def nothing_is_left() -> AsyncIterator[None]:
    """No task but those of the played guests."""
    before = asyncio.all_tasks()
    yield
    after = asyncio.all_tasks() - before - {asyncio.current_task()}
    played = {task for task in after if "FakeGuest" in repr(task) or "Played" in repr(task)}
    for task in played:
        task.cancel()
    if played:
        await asyncio.wait(played, timeout=SOON)
    assert after - played == set()


async def until(pool: Pool, condition: Callable[[], bool]) -> None:
    """Wait for a condition that a change of the pool makes true."""
    async with asyncio.timeout(SOON):
        while not condition():
            await asyncio.wait({pool._check_open()})


# -- full, and used once -----------------------------------------------------------------------------------


async def test_it_is_kept_full_and_every_vm_is_used_once() -> None:
    used = []
    async with MemoryPool(size=3) as pool:
        await pool.wait_full()
        assert pool.stats().ready == 3
        for _ in range(7):
            async with pool.acquire() as vm:
                used.append(vm.id)
                assert (await vm.run(["echo"], capture_output=True)).stdout == b"echo\n"
            with pytest.raises(errors.ConnectionLost):
                await vm.run(["echo"])
        await pool.wait_full()
        stats = pool.stats()
        assert (stats.ready, stats.in_use, stats.handed_out, stats.started) == (3, 0, 7, 10)
    assert len(set(used)) == 7
    assert pool.alive == []


async def test_those_who_wait_are_served_in_their_order() -> None:
    order: list[int] = []

    async def use(number: int) -> None:
        async with pool.acquire():
            order.append(number)

    async with MemoryPool(size=1, max_cpus=1) as pool:
        async with pool.acquire():
            waiting = [asyncio.create_task(use(number)) for number in range(5)]
            while pool.stats().waiting < 5:
                await asyncio.sleep(0)
        await asyncio.wait_for(asyncio.gather(*waiting), SOON)
    assert order == [0, 1, 2, 3, 4]


async def test_its_options_are_checked_before_anything_starts() -> None:
    for wrong in (
        {"size": 0},
        {"max_waiting": -1},
        {"max_idle": 0},
        {"max_idle": 5, "max_lifetime": 5},
        {"detached": True},
        {"cpus": 2, "max_cpus": 1},
        {"memory_mib": 512, "max_memory_mib": 512},
    ):
        with pytest.raises(errors.InvalidRequest):
            Pool(**wrong)
    with pytest.raises(TypeError):
        Pool(memory="512")


async def test_before_and_after_its_block_it_gives_nothing() -> None:
    pool = MemoryPool()
    await pool.close()
    with pytest.raises(errors.PoolClosed):
        async with pool.acquire():
            pass
    async with pool:
        pass
    await pool.close()
    with pytest.raises(errors.PoolClosed):
        async with pool.acquire():
            pass
    with pytest.raises(errors.InvalidRequest):
        await pool.__aenter__()


async def test_a_lease_is_for_one_use() -> None:
    async with MemoryPool(size=1) as pool:
        lease = pool.acquire()
        async with lease:
            pass
        with pytest.raises(errors.InvalidRequest):
            await lease.__aenter__()


# -- admission ---------------------------------------------------------------------------------------------


async def test_vms_in_use_share_the_processors() -> None:
    async with MemoryPool(size=2, cpus=2, max_cpus=3) as pool:
        await pool.wait_full()
        async with pool.acquire():
            await pool.wait_full()
            with pytest.raises(errors.PoolTimeout, match="CPUs") as caught:
                async with pool.acquire(timeout=0.05):
                    pass
            assert caught.value.data["lacking"] == "cpus"
            assert isinstance(caught.value, TimeoutError)
            next_one = asyncio.create_task(pool.acquire().__aenter__())
        await asyncio.wait_for(next_one, SOON)
        assert (pool.stats().in_use, pool.stats().timed_out) == (1, 1)


async def test_all_vms_share_the_memory() -> None:
    async with MemoryPool(size=2, memory_mib=100, max_memory_mib=2 * (100 + EMULATOR_MIB)) as pool:
        await pool.wait_full()
        async with pool.acquire(), pool.acquire():
            assert pool.stats().lacking == "memory"
            with pytest.raises(errors.PoolTimeout, match="328 MiB") as caught:
                async with pool.acquire(timeout=0.05):
                    pass
            assert caught.value.data["lacking"] == "memory"
            assert len(pool.alive) == 2
        await pool.wait_full()
        assert pool.stats().lacking == ""


async def test_memory_is_what_is_free_beside_what_the_vms_may_yet_use(monkeypatch: pytest.MonkeyPatch) -> None:
    need, free = 100 + EMULATOR_MIB, 0.0
    monkeypatch.setattr(pool, "LOOK_AGAIN", 0.01)
    monkeypatch.setattr(capacity, "free_memory_mib", lambda: free)
    monkeypatch.setattr(capacity, "own_memory_mib", lambda pid: 60.0)
    monkeypatch.setattr(MemoryVM, "machine_pid", 4711)
    async with MemoryPool(size=4, memory_mib=100) as one:
        with pytest.raises(errors.PoolTimeout, match="MiB"):
            await one.wait_full(0.05)
        assert one.started == []
        free = need  # given back by others, which is seen at the next look
        await until(one, lambda: one.stats().ready == 1)
        free = 2 * need - 60 - 1  # one more would not fit, if the first comes to use all that it may
        with pytest.raises(errors.PoolTimeout):
            await one.wait_full(0.05)
        assert one.stats().ready == 1
        free = 2 * need - 60
        await until(one, lambda: one.stats().ready == 2)


async def test_the_queue_has_an_end() -> None:
    async with MemoryPool(size=1, max_cpus=1, max_waiting=1) as pool, pool.acquire():
        first = asyncio.create_task(pool.acquire().__aenter__())
        while not pool.stats().waiting:
            await asyncio.sleep(0)
        with pytest.raises(errors.PoolQueueFull):
            async with pool.acquire():
                pass
        assert pool.stats().refused == 1
        first.cancel()
        await asyncio.wait({first})
        assert pool.stats().waiting == 0


# -- health and age ----------------------------------------------------------------------------------------


async def test_a_vm_that_dies_while_it_is_ready_is_replaced() -> None:
    async with MemoryPool(size=2) as pool:
        await pool.wait_full()
        dead = pool.started[0]
        dead.machine.die("killed")
        await until(pool, lambda: pool.stats().replaced >= 1)
        await pool.wait_full()
        async with pool.acquire() as one, pool.acquire() as other:
            assert dead not in (one, other)


async def test_a_vm_that_falls_silent_while_it_is_ready_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "INTERVAL", 0.01)
    monkeypatch.setattr(health, "PATIENCE", 0.5)
    async with MemoryPool(size=1) as pool:
        await pool.wait_full()
        silent = pool.started[0]
        silence(silent)
        await until(pool, lambda: pool.stats().replaced >= 1)
        assert silent not in pool.alive
        async with pool.acquire() as vm:
            assert vm is not silent


async def test_a_vm_that_does_not_answer_is_not_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_member, "CHECK_TIMEOUT", 0.5)
    async with MemoryPool(size=2) as pool:
        await pool.wait_full()
        silent = pool.started[0]
        silence(silent)
        async with pool.acquire() as vm:
            assert vm is not silent
        await until(pool, lambda: silent not in pool.alive)
        assert (pool.stats().replaced, pool.stats().handed_out) == (1, 1)


def silence(vm: MemoryVM) -> None:
    """From now on its guest hears nothing."""
    vm.machine._guest.guest.bridge._channel.transport.pause_reading()  # type: ignore[attr-defined]


async def test_a_vm_that_nobody_takes_is_replaced() -> None:
    async with MemoryPool(size=1, max_idle=0.05) as pool:
        await pool.wait_full()
        old = pool.started[0]
        await until(pool, lambda: pool.stats().expired >= 1)
        await until(pool, lambda: old not in pool.alive)
        await pool.wait_full()


async def test_a_vm_in_use_is_ended_after_its_lifetime_and_its_holder_told() -> None:
    async with MemoryPool(size=1, max_idle=0.05, max_lifetime=0.1) as pool, pool.acquire() as vm:
        with pytest.raises(errors.ConnectionLost, match="live for more than"):
            await asyncio.wait_for(vm.run(["sleep"]), SOON)


# -- starts that fail --------------------------------------------------------------------------------------


class Broken:
    """A guest whose first `failures` ones refuse to be told who they are."""

    def __init__(self, failures: float) -> None:
        self.failures = failures

    def __call__(self) -> Played:
        def refuse(_: Any) -> dict[str, Any]:
            if self.failures > 0:
                self.failures -= 1
                raise errors.StorageFailed("the image is broken", file="root")
            return {"info": {}}

        return played({"system.configure": refuse})


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "BACKOFF_FIRST", 0.001)
    monkeypatch.setattr(pool, "BACKOFF_LIMIT", 0.02)


async def test_who_waits_for_vms_that_cannot_start_is_told_why(quick: None) -> None:
    broken = Broken(float("inf"))
    async with MemoryPool(broken, size=2, timeout=60.0) as pool:

        async def acquire() -> None:
            async with pool.acquire():
                pass

        waiting = [asyncio.create_task(acquire()) for _ in range(3)]
        done, _ = await asyncio.wait(waiting, timeout=SOON)
        raised = [task.exception() for task in done]
        assert len(raised) == 3
        assert len(set(map(id, raised))) == 3
        for error in raised:
            assert isinstance(error, errors.StorageFailed)
            assert (error.message, error.data["file"]) == ("the image is broken", "root")
        for call in (acquire, pool.wait_full):  # and who comes now does not wait at all
            with pytest.raises(errors.StorageFailed):
                await asyncio.wait_for(call(), 0.01)
        broken.failures = 0
        await until(pool, lambda: pool.stats().ready == 2)  # it went on trying
        async with pool.acquire(), pool.acquire(), pool.acquire():  # the third one waits again
            pass
        assert pool.stats().failed >= 3


async def test_while_a_vm_is_ready_starts_that_fail_are_nobodys_concern(quick: None) -> None:
    broken = Broken(0)
    async with MemoryPool(broken, size=2, max_cpus=1) as one:
        await one.wait_full()
        broken.failures = float("inf")
        async with one.acquire():
            early = asyncio.create_task(one.acquire().__aenter__())
            await until(one, lambda: one.stats().failed > pool.FAILURES)
            late = asyncio.create_task(one.acquire().__aenter__())
            while one.stats().waiting < 2:
                await asyncio.sleep(0)
        await asyncio.wait_for(early, SOON)
        with pytest.raises(errors.StorageFailed):  # the last one that was ready is taken
            await asyncio.wait_for(late, SOON)


async def test_one_start_that_fails_is_nobodys_concern(quick: None) -> None:
    async with MemoryPool(Broken(1), size=1) as pool, pool.acquire() as vm:
        await vm.run(["echo"], capture_output=True)
        assert pool.stats().failed == 1


async def test_the_pause_between_starts_that_fail_grows_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(pool, "BACKOFF_FIRST", 0.001)
    monkeypatch.setattr(pool, "BACKOFF_LIMIT", 0.004)
    loop = asyncio.get_running_loop()
    failed = Pool._start_failed

    def spy(self: Pool, error: Exception) -> None:
        failed(self, error)
        waits.append(self._retry_at - loop.time())

    monkeypatch.setattr(Pool, "_start_failed", spy)
    async with MemoryPool(Broken(float("inf")), size=2) as one:
        await until(one, lambda: len(waits) >= 6)
    assert max(waits) <= 0.004
    assert waits[5] > waits[0]


async def test_a_deadline_tells_of_the_start_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "BACKOFF_FIRST", 60.0)
    async with MemoryPool(Broken(1), size=1) as one:
        await until(one, lambda: one.stats().failed >= 1)
        with pytest.raises(errors.PoolTimeout, match="the image is broken") as caught:
            async with one.acquire(timeout=0.02):
                pass
        assert isinstance(caught.value.__cause__, errors.StorageFailed)


async def test_a_vm_that_runs_nothing_is_not_ready_and_ends(quick: None) -> None:
    def refuse(_: Any) -> Any:
        raise errors.StartFailed("nothing runs here")

    async with MemoryPool(lambda: played({"process.create": refuse}), size=1) as pool:
        with pytest.raises(errors.StartFailed):
            async with pool.acquire():
                pass
        assert pool.stats().started == 0
    assert pool.alive == []


async def test_an_error_that_is_not_ours_is_told_too(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(self: Any, progress: Any) -> Any:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(MemoryVM, "_config", fail)
    async with MemoryPool(size=1) as pool:
        with pytest.raises(errors.MachineFailed, match="no such thing"):
            async with pool.acquire():
                pass


# -- the end -----------------------------------------------------------------------------------------------


async def test_closing_ends_those_in_use_and_turns_away_who_waits() -> None:
    async with contextlib.AsyncExitStack() as holders:
        async with MemoryPool(size=1, max_cpus=1) as pool:
            vm = await holders.enter_async_context(pool.acquire())
            waiting = asyncio.create_task(pool.acquire().__aenter__())
            while not pool.stats().waiting:
                await asyncio.sleep(0)
        with pytest.raises(errors.PoolClosed):
            await asyncio.wait_for(waiting, SOON)
        with pytest.raises(errors.ConnectionLost):
            await vm.run(["echo"])
        assert pool.alive == []


@pytest.mark.behaviour("B41")
@pytest.mark.parametrize("turns", [0, 1, 2, 5, 20, 60])
@pytest.mark.parametrize("guests", [played, lambda: silent_but_open], ids=["answers", "silent"])
async def test_left_at_any_moment_of_the_filling_nothing_is_left(turns: int, guests: Any) -> None:
    async with MemoryPool(guests, size=3) as pool:
        for _ in range(turns):
            await asyncio.sleep(0)
    assert pool.alive == []
    assert pool.stats().ready + pool.stats().starting + pool.stats().in_use == 0


@pytest.mark.parametrize("turns", [0, 1, 2, 5, 10])
async def test_the_end_goes_on_when_it_is_cancelled(turns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async def kill(self: MemoryMachine) -> None:
        for _ in range(20):  # an emulator takes its time to end
            await asyncio.sleep(0)
        self.die("killed")

    monkeypatch.setattr(MemoryMachine, "kill", kill)
    pool = MemoryPool(size=2)

    async def use() -> None:
        async with pool:
            await pool.wait_full()

    task = asyncio.create_task(use())
    while pool._draining is None:
        await asyncio.sleep(0)
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task}, timeout=SOON)
    assert task.cancelled()
    assert pool.started
    assert pool.alive == []


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 4, 6, 9])
async def test_an_acquirer_who_is_cancelled_keeps_nothing(turns: int) -> None:
    async with MemoryPool(size=1, max_cpus=1) as pool:
        await pool.wait_full()
        task = asyncio.create_task(pool.acquire().__aenter__())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task}, timeout=SOON)
        if task.cancelled():
            async with pool.acquire():  # the only processor is free again
                pass


async def test_a_vm_that_comes_at_the_moment_of_the_cancellation_is_given_back() -> None:
    async with MemoryPool(size=1, max_cpus=1) as pool:
        first = await pool._take(SOON)
        waiting = asyncio.create_task(pool._take(SOON))
        while not pool.stats().waiting:
            await asyncio.sleep(0)
        first.give_back()
        while pool.stats().waiting:
            await asyncio.sleep(0)
        waiting.cancel()  # it has its VM, and has not run since
        await asyncio.wait({waiting})
        async with pool.acquire():
            pass


async def test_who_was_given_a_vm_that_is_no_good_is_served_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_member, "CHECK_TIMEOUT", 0.5)
    order: list[str] = []

    async def use(name: str) -> None:
        async with pool.acquire():
            order.append(name)

    async with MemoryPool(size=1, max_cpus=1) as pool:
        await pool.wait_full()
        silence(pool.started[0])
        first = asyncio.create_task(use("first"))
        while not pool.stats().in_use:
            await asyncio.sleep(0)
        await asyncio.wait_for(asyncio.gather(first, use("second")), SOON)
    assert order == ["first", "second"]


@pytest.mark.parametrize("seed", range(5))
async def test_whatever_acquirers_and_vms_do_each_vm_has_one_user_and_none_is_lost(seed: int, quick: None) -> None:
    """Acquirers that give up or are cancelled at any moment, and VMs that die at any moment."""
    chance = random.Random(seed)
    used: list[str] = []

    async def use() -> None:
        with contextlib.suppress(errors.PoolTimeout, errors.PoolQueueFull):
            async with pool.acquire(timeout=chance.choice((0.001, 0.01, SOON))) as vm:
                used.append(vm.id)
                await asyncio.sleep(chance.choice((0, 0, 0.002)))

    async with MemoryPool(size=3, max_cpus=4, max_waiting=20) as pool:
        tasks = []
        for _ in range(150):
            tasks.append(asyncio.create_task(use()))
            for _ in range(chance.choice((0, 1, 5, 20))):
                await asyncio.sleep(0)
            if chance.random() < 0.2:
                chance.choice(tasks).cancel()
            started = [member.vm for member in pool._members if member.was_ready]
            if started and chance.random() < 0.05:
                chance.choice(started).machine.die("killed")  # type: ignore[attr-defined]
        done = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), SOON)
        assert {type(outcome) for outcome in done if outcome} <= {asyncio.CancelledError}
        await pool.wait_full()
        stats = pool.stats()
        assert (stats.in_use, stats.waiting, stats.ready) == (0, 0, 3)
        assert stats.handed_out >= len(used) > 5
        assert len(pool.alive) == 3
    assert len(set(used)) == len(used)


# -- without async -----------------------------------------------------------------------------------------


class SyncPool(sync.Pool):
    def __init__(self, **options: Any) -> None:
        self._target = MemoryPool(**options)


def test_threads_share_one_pool() -> None:
    seen: list[str] = []

    def work() -> None:
        with pool.acquire() as vm:
            assert isinstance(vm, sync.UtilityVM)
            assert vm.run(["echo"], capture_output=True).stdout == b"echo\n"
            seen.append(vm.id)

    with SyncPool(size=2) as pool:
        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SOON)
        assert len(set(seen)) == 6
        assert pool.stats().handed_out == 6
        with pytest.raises(errors.PoolTimeout), pool.acquire(timeout=0) as _:
            pass
    assert pool._target.alive == []
