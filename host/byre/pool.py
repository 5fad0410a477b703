"""`Pool`: VMs that are ready before they are asked for, each for one use.

    async with byre.Pool(size=4, memory_mib=256) as pool:
        async with pool.acquire() as vm:
            await vm.run(["uname", "-a"])

Rule: all that happens to a VM comes through `_changed`, which serves who waits, in their order; what is missing is
then started by one task, `_keep_full`.  No VM is handed out twice, or without having answered just before.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from types import TracebackType
from typing import Any, Self

from . import capacity
from .admission import Admission
from .errors import ByreError, InvalidRequest, PoolClosed, PoolQueueFull, PoolTimeout
from .pool_member import IN_USE, READY, STARTING, Member
from .pool_queue import Queue, again
from .vm import UtilityVM

logger = logging.getLogger(__name__)

#: Starts that fail one after the other until those who wait are told; one may fail for want of something passing.
FAILURES = 3

#: Seconds between a start that failed and the next: the first time, and at most.
BACKOFF_FIRST, BACKOFF_LIMIT = 0.5, 30.0

#: Memory that others give back tells nobody: seconds between two looks.
LOOK_AGAIN = 1.0


@dataclasses.dataclass(frozen=True)
class PoolStats:
    """VMs in each state now, and what has happened since the pool was opened.

    size       how many are to be ready            handed_out  VMs that were acquired
    starting   VMs that start                      started     VMs that started
    ready      VMs that wait to be acquired        failed      starts that failed
    in_use     VMs that are acquired               replaced    VMs that died or fell silent before their use
    waiting    acquirers that wait for one         expired     VMs that were idle, or lived, for too long
    lacking    "memory" while starts wait for it   timed_out   acquirers whose deadline passed
                                                   refused     acquirers for whom the queue was full
    """

    size: int
    starting: int
    ready: int
    in_use: int
    waiting: int
    lacking: str
    handed_out: int = 0
    started: int = 0
    failed: int = 0
    replaced: int = 0
    expired: int = 0
    timed_out: int = 0
    refused: int = 0


class Pool:
    """See the module.  An async context manager; leaving it ends all of its VMs.

    size              VMs that are kept ready
    memory_mib, cpus  of each VM; further `options` are those of `UtilityVM`
    max_memory_mib    what all VMs together may use, emulators included; None: what they use now, and what is free
                      on this host
    max_cpus          virtual CPUs of VMs in use at the same time; None: the processors that this process may use
    max_waiting       acquirers that may wait for a VM
    timeout           seconds that each waits, unless it says otherwise
    max_idle          seconds that a VM stands ready until it is replaced
    max_lifetime      seconds from a VM's start until it is ended, even in use: its holder gets `ConnectionLost`
    """

    def __init__(
        self,
        *,
        size: int = 2,
        memory_mib: int = 512,
        cpus: int = 1,
        max_memory_mib: float | None = None,
        max_cpus: float | None = None,
        max_waiting: int = 64,
        timeout: float = 60.0,
        max_idle: float = 600.0,
        max_lifetime: float = 3600.0,
        **options: Any,
    ) -> None:
        if size < 1 or max_waiting < 0:
            raise InvalidRequest("a pool has a size of 1 or more, and a queue of 0 or more")
        if not 0 < max_idle < max_lifetime:
            raise InvalidRequest("max_idle must be above 0, and max_lifetime above max_idle")
        if options.get("detached"):
            raise InvalidRequest("a pool's VMs belong to this process: they cannot be detached")
        self._admission = Admission(memory_mib, cpus, max_memory_mib, max_cpus)
        self._options = {"memory_mib": memory_mib, "cpus": cpus, **options}
        self._make()  # what is wrong with the options is an error here
        self._size, self._max_waiting, self._timeout = size, max_waiting, timeout
        self._limits = (max_idle, max_lifetime)
        self._members: dict[Member, None] = {}  # the first started first
        self._queue = Queue()
        self._change: asyncio.Future[None] | None = None  # done at the next change; None: not open
        self._filling: asyncio.Task[None] | None = None
        self._draining: asyncio.Task[None] | None = None
        self._failures = 0  # one after the other
        self._error: Exception | None = None  # of the last of them
        self._retry_at = 0.0
        self._memory_problem = ""
        self._counts: dict[str, int] = {}

    def _make(self) -> UtilityVM:
        return UtilityVM(**self._options)

    async def __aenter__(self) -> Self:
        """Begin to fill it.  Waits for no VM: `wait_full` does."""
        if self._change is not None:
            raise InvalidRequest("a pool is opened once", hint="make another one")
        loop = asyncio.get_running_loop()
        self._change = loop.create_future()
        self._filling = loop.create_task(self._keep_full())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def acquire(self, timeout: float | None = None) -> Lease:
        """A VM for one use: ``async with pool.acquire() as vm``; it is ended after the block.

        Raises, on entry, `PoolTimeout` after `timeout` seconds (None: the pool's), whose ``data["lacking"]`` says
        what there was too little of: "memory", "cpus" or "vm"; `PoolQueueFull`, `PoolClosed`; and what starting a
        VM raised, while none can be started.
        """
        return Lease(self, self._timeout if timeout is None else timeout)

    async def wait_full(self, timeout: float | None = None) -> None:
        """Wait until `size` VMs are ready.  Raises as `acquire` does."""
        timeout = self._timeout if timeout is None else timeout
        try:
            async with asyncio.timeout(timeout):
                while self._count(READY) < self._size:
                    change = self._check_open()
                    self._check_working()
                    await asyncio.wait({change})
        except TimeoutError as error:
            raise self._late(error, timeout) from self._error

    def stats(self) -> PoolStats:
        """What is there now, and what has happened."""
        return PoolStats(
            size=self._size,
            starting=self._count(STARTING),
            ready=self._count(READY),
            in_use=self._count(IN_USE),
            waiting=len(self._queue),
            lacking="memory" if self._memory_problem else "",
            **self._counts,
        )

    async def close(self) -> None:
        """End all VMs, those in use too; who waits gets `PoolClosed`.  To the end, even when cancelled meanwhile:
        nothing is left of them.  Harmless when repeated."""
        if self._change is not None:
            self._draining = self._draining or asyncio.get_running_loop().create_task(self._drain())
            await _finished(self._draining)

    # -- acquiring -----------------------------------------------------------------------------------------

    async def _take(self, timeout: float) -> Member:
        self._check_open()
        if self._next() is None:
            if not self._count(READY):
                self._check_working()
            if len(self._queue) >= self._max_waiting:
                self._add("refused")
                raise PoolQueueFull(f"{self._max_waiting} wait for a VM already", hint="try again later")
        try:
            async with asyncio.timeout(timeout):
                member = await self._turn()
                while not await _answers(member):
                    member = await self._turn(retry=True)
        except TimeoutError as error:
            raise self._late(error, timeout) from self._error
        self._add("handed_out")
        return member

    async def _turn(self, *, retry: bool = False) -> Member:
        self._check_open()
        ticket = self._queue.enter(retry)
        self._queue.serve(self._next)
        return await self._queue.wait(ticket)

    def _next(self) -> Member | None:
        """The VM to be handed out next, if one may be."""
        if self._admission.cpu_problem(self._count(IN_USE)):
            return None
        return next((member for member in self._members if member.state == READY), None)

    def _late(self, error: TimeoutError, timeout: float) -> Exception:
        """The error for who has waited for too long, unless it is one of a VM's start already."""
        if isinstance(error, ByreError):
            return error
        self._add("timed_out")
        lacking, why = "vm", f"{self._count(STARTING)} VMs are starting"
        if self._count(READY):
            lacking, why = "cpus", self._admission.cpu_problem(self._count(IN_USE))
        elif self._memory_problem:
            lacking, why = "memory", self._memory_problem
        elif self._error is not None:
            why += f"; the last start failed: {self._error}"
        return PoolTimeout(f"the pool had nothing to give within {timeout:g} s: {why}", lacking=lacking)

    def _check_open(self) -> asyncio.Future[None]:
        if self._change is None or self._draining is not None:
            raise PoolClosed("the pool is not open", hint="use: async with byre.Pool() as pool")
        return self._change

    def _check_working(self) -> None:
        if self._error is not None and self._failures >= FAILURES:
            raise again(self._error)

    # -- what happens to VMs -------------------------------------------------------------------------------

    def _count(self, state: str) -> int:
        return sum(member.state == state for member in self._members)

    def _add(self, counter: str) -> None:
        self._counts[counter] = self._counts.get(counter, 0) + 1

    def _changed(self, member: Member) -> None:
        if member.state == READY:
            self._failures, self._error = 0, None
            self._add("started")
        self._queue.serve(self._next)
        self._tell()

    def _tell(self) -> None:
        assert self._change is not None
        self._change.set_result(None)
        self._change = asyncio.get_running_loop().create_future()

    def _gone(self, member: Member) -> None:
        del self._members[member]
        if member.outcome:
            self._add(member.outcome)
        error = None if member.task.cancelled() else member.task.exception()
        if isinstance(error, Exception) and not member.was_ready:
            self._start_failed(error)
        elif error is not None:
            logger.error("! pool: the VM %s could not be ended: %r", member.vm.id, error)
        self._queue.serve(self._next)
        self._tell()

    def _start_failed(self, error: Exception) -> None:
        """Try again later; who waits is told when that is of no use."""
        self._add("failed")
        self._failures += 1
        self._error = error
        pause = min(BACKOFF_LIMIT, BACKOFF_FIRST * 2 ** (min(self._failures, 16) - 1))
        self._retry_at = asyncio.get_running_loop().time() + pause
        logger.warning("! pool: a VM did not start, the next one in %g s: %s", pause, error)
        if self._failures >= FAILURES and not self._count(READY):
            self._queue.turn_away(error)

    # -- filling and draining ------------------------------------------------------------------------------

    async def _keep_full(self) -> None:
        at_once = max(1, int(capacity.usable_cpus()))  # a start takes a processor
        while True:
            change = self._check_open()
            await asyncio.wait({change}, timeout=self._fill(at_once))

    def _fill(self, at_once: int) -> float | None:
        """Start what is missing, as far as it may be; when to look again, None: at the next change."""
        self._memory_problem = ""
        if self._failures:
            at_once = 1  # to see whether they still fail
        while (starting := self._count(STARTING)) + self._count(READY) < self._size and starting < at_once:
            early = self._retry_at - asyncio.get_running_loop().time()
            if early > 0:
                return early
            pids = [0 if member.state == STARTING else member.vm.machine_pid for member in self._members]
            self._memory_problem = self._admission.memory_problem(pids)
            if self._memory_problem:
                return LOOK_AGAIN
            member = Member(self._make(), *self._limits, self._changed)
            self._members[member] = None
            member.task.add_done_callback(lambda _, member=member: self._gone(member))  # type: ignore[misc]
        return None

    async def _drain(self) -> None:
        assert self._filling is not None
        self._filling.cancel()
        self._queue.turn_away(PoolClosed("the pool was closed"))
        for member in self._members:
            member.end()
        await asyncio.wait({self._filling, *(member.task for member in self._members)})
        self._tell()


class Lease:
    """What `Pool.acquire` gives: entering it waits for a VM, leaving it ends the VM."""

    def __init__(self, pool: Pool, timeout: float) -> None:
        self._pool = pool
        self._timeout = timeout
        self._member: Member | None = None

    async def __aenter__(self) -> UtilityVM:
        if self._member is not None:
            raise InvalidRequest("a lease is entered once", hint="call acquire() again")
        self._member = await self._pool._take(self._timeout)
        return self._member.vm

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._member is not None
        self._member.give_back()
        await _finished(self._member.task)


async def _answers(member: Member) -> bool:
    """Whether it does; if not, or if nobody waits for that any longer, it ends."""
    try:
        if await member.answers():
            return True
    except BaseException:
        member.give_back()
        raise
    member.give_back()
    return False


async def _finished(task: asyncio.Task[None]) -> None:
    """Wait for a task's end; a cancellation goes on after that."""
    try:
        await asyncio.wait({task})
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise
