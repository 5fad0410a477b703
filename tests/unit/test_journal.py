"""The events of a VM: order, bounds, what a reader missed, several readers, a keeper's."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from byre import events, journal
from byre.bridge import Bridge
from byre.errors import ConnectionLost
from byre.events import ContainerExited, ContainerStarted, HealthChanged, LogLine, Missed, VMEnded
from byre.keeper import Methods
from byre.relay import Relay
from byre.testing import FakeGuest

SOON = 10.0


async def take(reader: journal.EventReader, count: int) -> list[events.Event]:
    return [await asyncio.wait_for(anext(reader), SOON) for _ in range(count)]


def health(book: journal.Journal, *states: str) -> None:
    for state in states:
        book.add(HealthChanged, state=state)


async def test_a_reader_gets_what_comes_and_a_late_one_says_from_when() -> None:
    book = journal.Journal()
    health(book, "unresponsive")
    now, everything = book.read(None), book.read(0)
    health(book, "ok", "paused")
    assert [e.state for e in await take(now, 2)] == ["ok", "paused"]  # type: ignore[attr-defined]
    assert [e.number for e in await take(everything, 3)] == [1, 2, 3]
    assert [e.number for e in await take(book.read(2), 1)] == [3]
    waiting = [asyncio.ensure_future(anext(reader)) for reader in (now, everything)]
    await asyncio.sleep(0)
    health(book, "ok")
    assert [event.number for event in await asyncio.gather(*waiting)] == [4, 4]


async def test_what_a_slow_reader_missed_is_counted_where_it_is_missing() -> None:
    book = journal.Journal()
    reader = book.read(0)
    health(book, *["ok"] * (journal.KEPT + 5))
    found = await take(reader, 2)
    assert isinstance(found[0], Missed)
    assert (found[0].count, found[0].number, found[1].number) == (5, 5, 6)


async def test_a_flood_of_log_lines_pushes_nothing_else_out() -> None:
    book = journal.Journal()
    health(book, "paused")
    for _ in range(10 * journal.KEPT_LINES):
        book.add(LogLine, source="kernel", level=20, message="x", dropped=0)
    health(book, "ok")
    found = await take(book.read(0), 3 + journal.KEPT_LINES)
    assert [type(e) for e in (*found[:2], found[-1])] == [HealthChanged, Missed, HealthChanged]
    assert sum(e.count for e in found if isinstance(e, Missed)) == 9 * journal.KEPT_LINES
    assert [e.number for e in found] == sorted(e.number for e in found)


async def test_the_end_is_the_last_event_for_those_who_come_later_too() -> None:
    book = journal.Journal()
    book.add(VMEnded, reason="it was time")
    health(book, "ok")
    assert [type(event) async for event in book.read(0)] == [VMEnded]
    assert [type(event) async for event in book.read(None)] == [VMEnded]


async def pair(book: journal.Journal) -> tuple[FakeGuest, Bridge]:
    """A played agent, whose bridge the journal listens to."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    guest = FakeGuest(theirs)
    bridge = Bridge(ours)
    await asyncio.gather(bridge.open(SOON), guest.open())
    book.listen(bridge)
    return guest, bridge


async def test_what_the_agent_tells_comes_in_its_order_and_hostile_names_are_cut() -> None:
    book = journal.Journal()
    guest, bridge = await pair(book)
    reader = book.read(None)
    guest.bridge.tell("container.started", {"container": "a" * 100_000, "pid": 7})
    guest.bridge.tell("container.oom", {"container": "b", "kills": 3})
    guest.bridge.tell("container.exit", {"container": "b", "code": 137, "signal": 9, "oom": True})
    started, oom, exited = await take(reader, 3)
    assert isinstance(started, ContainerStarted)
    assert (len(started.container), started.pid) == (journal.MAX_TEXT, 7)
    assert oom.details() == {"container": "b", "kills": 3}
    assert isinstance(exited, ContainerExited)
    assert exited.oom
    await guest.close()
    assert isinstance((await take(reader, 1))[0], VMEnded)
    await bridge.close()


class Kept:
    """A VM for the keeper's methods, of which only its journal is asked."""

    def __init__(self) -> None:
        self.journal = journal.Journal()


async def keeper(kept: Any, guest: Bridge) -> tuple[Relay, asyncio.Task[None], Bridge]:
    """A keeper's relay, its one client's task, and that client's bridge."""
    relay = Relay(guest, Methods(kept, lambda reason: None).table())
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    attending = asyncio.create_task(relay.attend(theirs))
    client = Bridge(ours)
    await client.open(SOON)
    return relay, attending, client


async def test_a_keepers_events_are_those_that_it_heard() -> None:
    kept = Kept()
    guest, bridge = await pair(kept.journal)
    relay, attending, client = await keeper(kept, bridge)
    reason = ""
    view = journal.KeeperJournal(client, lambda: reason)
    health(kept.journal, "paused")
    everything, now = view.read(0), view.read(None)
    assert [event.number for event in await take(everything, 1)] == [1]
    first = asyncio.ensure_future(anext(now))
    await client.ping(SOON)  # by then the keeper has looked where that reader is
    guest.bridge.tell("container.created", {"container": "c"})
    assert (await asyncio.wait_for(first, SOON)).details() == {"container": "c"}
    assert (await take(everything, 1))[0].kind == "created"
    cancelled = asyncio.ensure_future(anext(everything))
    await asyncio.sleep(0)
    cancelled.cancel()
    await asyncio.wait((cancelled,))
    await client.ping(SOON)
    waiting = asyncio.ensure_future(anext(everything))
    await client.ping(SOON)
    await client.close()
    with pytest.raises(ConnectionLost):
        await asyncio.wait_for(waiting, SOON)
    reason = "the VM was shut down"
    ended = await asyncio.wait_for(anext(everything), SOON)
    assert ended.details() == {"reason": reason}
    await asyncio.wait_for(attending, SOON)
    await relay.close("over")
    await guest.close()
    await bridge.close()


def test_records_cross_the_keepers_wire_unchanged() -> None:
    event = ContainerExited(number=4, time=1.5, container="c", code=1, signal=0, oom=False)
    assert events.from_wire(events.to_wire(event)) == event
    assert events.from_wire([5, 1.0, "from a newer keeper", {}]) is None
