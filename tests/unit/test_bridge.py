"""The bridge: calls, events and the loss of the connection, against a peer in the same loop."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from byre import bridge as bridge_module
from byre import calls
from byre.bridge import Bridge
from byre.errors import (
    ByreError,
    Cancelled,
    ConnectionLost,
    DeadlineExceeded,
    InvalidRequest,
    NotSupported,
    ProcessNotFound,
    RequestTooLarge,
)
from byre.streams import open_reader, open_writer
from byre_proto import events, limits
from byre_proto.connection import Connection, ProofRefused, VersionMismatch

SOON = 10.0


def pair() -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    return ours, theirs


class Guest:
    """The other side: keeps what it is asked until the test answers."""

    def __init__(self, sock: socket.socket) -> None:
        self.asked: asyncio.Queue[Any] = asyncio.Queue()
        self.bridge = Bridge(sock, server=self.asked.put_nowait)

    async def request(self) -> events.RequestReceived:
        event = await asyncio.wait_for(self.asked.get(), SOON)
        assert isinstance(event, events.RequestReceived)
        return event

    async def cancellation(self) -> events.CancelReceived:
        event = await asyncio.wait_for(self.asked.get(), SOON)
        assert isinstance(event, events.CancelReceived)
        return event


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[Bridge, Guest]]:
    ours, theirs = pair()
    bridge, guest = Bridge(ours, label="vm7"), Guest(theirs)
    await asyncio.gather(bridge.open(SOON), guest.bridge.open(SOON))
    try:
        yield bridge, guest
    finally:
        await bridge.close()
        await guest.bridge.close()


async def test_a_call_gets_its_own_answer() -> None:
    async with connected() as (bridge, guest):
        calls = [asyncio.create_task(bridge.call("process.resize", process=n, width=1, height=1)) for n in (1, 2)]
        calls.append(asyncio.create_task(bridge.call("system.stacks")))
        first, second, third = [await guest.request() for _ in calls]
        guest.bridge.reply(third.call, {"text": "stack"})
        guest.bridge.refuse(second.call, ProcessNotFound("no process 2"))
        guest.bridge.reply(first.call, {})
        assert await calls[0] == {}
        with pytest.raises(ProcessNotFound, match="no process 2"):
            await calls[1]
        assert await calls[2] == {"text": "stack"}


@pytest.mark.behaviour("B44")
async def test_a_call_past_its_deadline_fails_alone_and_its_late_answer_is_harmless() -> None:
    async with connected() as (bridge, guest):
        other = asyncio.create_task(bridge.call("system.info"))
        slow = asyncio.create_task(bridge.call("system.stacks", timeout=0.05))
        asked = [await guest.request(), await guest.request()]
        assert asked[1].timeout == pytest.approx(0.05)
        with pytest.raises(DeadlineExceeded, match=r"system\.stacks"):
            await slow
        guest.bridge.reply(asked[1].call, {"text": "late"})
        guest.bridge.reply(asked[0].call, {"info": {"a": 1}})
        assert await other == {"info": {"a": 1}}
        assert bridge.lost is None


@pytest.mark.behaviour("B45")
async def test_a_bad_request_fails_alone_before_it_is_sent() -> None:
    async with connected() as (bridge, guest):
        with pytest.raises(RequestTooLarge):
            await bridge.call("container.create", container="c", spec={"x": "y" * limits.MAX_CONTROL})
        with pytest.raises(InvalidRequest):
            await bridge.call("process.signal", process="one", signal=9)
        with pytest.raises(NotSupported):
            await bridge.call("no.such")
        await bridge.ping(SOON)
        assert guest.asked.empty()


@pytest.mark.behaviour("B46")
async def test_a_side_that_serves_nothing_says_so() -> None:
    async with connected() as (bridge, guest):
        with pytest.raises(NotSupported):
            await guest.bridge.call("system.info")
        assert bridge.lost is None


# -- cancellation ------------------------------------------------------------------------------------------


async def cancelled(
    answer: Callable[[Guest, int], None], *, undo: bool = True
) -> tuple[list[Any], asyncio.CancelledError]:
    """Cancel a call, let the guest answer; what was undone, and the error."""
    undone: list[Any] = []

    async def take_back(result: Any) -> None:
        undone.append(result)

    async with connected() as (bridge, guest):
        task = asyncio.create_task(bridge.call("system.stacks", undo=take_back if undo else None))
        asked = await guest.request()
        task.cancel()
        assert (await guest.cancellation()).call == asked.call
        assert not task.done(), "it waits for the verdict"
        answer(guest, asked.call)
        with pytest.raises(asyncio.CancelledError) as caught:
            await asyncio.wait_for(task, SOON)
        return undone, caught.value


@pytest.mark.behaviour("B15")
async def test_a_cancelled_call_that_succeeded_is_undone() -> None:
    undone, error = await cancelled(lambda guest, call: guest.bridge.reply(call, {"text": "x"}))
    assert undone == [{"text": "x"}]
    assert "undone" in error.__notes__[0]


@pytest.mark.behaviour("B15")
async def test_a_cancelled_call_that_did_nothing_is_not_undone() -> None:
    undone, error = await cancelled(lambda guest, call: guest.bridge.refuse(call, Cancelled("stopped")))
    assert undone == []
    assert "had not run" in error.__notes__[0]


@pytest.mark.behaviour("B15", "B42")
async def test_a_guest_that_is_silent_is_not_waited_for_with_all_that_is_to_be_taken_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calls, "CANCEL_GRACE", 0.1)
    async with connected() as (bridge, guest), asyncio.timeout(SOON):
        channel = guest.bridge._channel
        assert channel is not None
        channel.transport.pause_reading()
        over = asyncio.Event()
        for _ in range(3):
            assert await bridge.finish(over.wait(), 1000) is None
        over.set()


async def test_a_guest_that_speaks_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "CANCEL_GRACE", 0.5)
    monkeypatch.setattr(calls, "ASK_AFTER", 0.1)
    async with connected() as (bridge, _):
        assert await bridge.finish(asyncio.sleep(1, "done"), SOON) == "done"
        assert await bridge.finish(asyncio.sleep(SOON), 0.2) is None


async def test_a_cancelled_call_whose_guest_dies_is_over() -> None:
    undone, error = await cancelled(lambda guest, call: guest.bridge.fail("died"))
    assert undone == []
    assert "not known" in error.__notes__[0]


async def test_an_impatient_second_cancellation_leaves_the_tidying_to_the_bridge() -> None:
    undone = asyncio.Event()

    async def take_back(_: Any) -> None:
        undone.set()

    async with connected() as (bridge, guest):
        task = asyncio.create_task(bridge.call("system.stacks", undo=take_back))
        asked = await guest.request()
        task.cancel()
        await guest.cancellation()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, SOON)
        guest.bridge.reply(asked.call, {"text": "x"})
        await asyncio.wait_for(undone.wait(), SOON)


@pytest.mark.parametrize("ran", [True, False])
async def test_a_deadline_says_whether_what_can_be_undone_had_run(ran: bool) -> None:
    async def take_back(_: Any) -> None:
        pass

    async with connected() as (bridge, guest):
        task = asyncio.create_task(bridge.call("system.stacks", timeout=0.01, undo=take_back))
        asked = await guest.request()
        await guest.cancellation()
        if ran:
            guest.bridge.reply(asked.call, {"text": "x"})
        else:
            guest.bridge.refuse(asked.call, Cancelled("stopped"))
        with pytest.raises(DeadlineExceeded) as caught:
            await task
        assert caught.value.data["ran"] is ran


# -- events ------------------------------------------------------------------------------------------------

EXIT = {"process": 5, "code": 3, "signal": 0}


async def test_an_event_right_behind_the_answer_finds_its_subscriber() -> None:
    async with connected() as (bridge, guest):
        heard: list[Any] = []
        task = asyncio.create_task(
            bridge.call(
                "process.create",
                args=["true"],
                accept=lambda result: bridge.subscribe("process.exit", result["process"], heard.append),
            )
        )
        asked = await guest.request()
        guest.bridge.reply(asked.call, {"process": 5, "pid": 1})
        guest.bridge.tell("process.exit", EXIT)  # in the same packet
        assert (await task)["process"] == 5
        await bridge.ping(SOON)
        assert [event["code"] for event in heard] == [3]


async def test_events_that_nobody_wants_are_dropped() -> None:
    async with connected() as (bridge, guest):
        heard: list[Any] = []
        bridge.subscribe("process.exit", 6, heard.append)
        guest.bridge.tell("process.exit", EXIT)
        await bridge.ping(SOON)
        assert heard == []


@pytest.mark.behaviour("B50")
async def test_log_lines_arrive_escaped_and_a_flood_is_cut_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    async with connected() as (bridge, guest):
        with caplog.at_level(logging.DEBUG, logger="byre.guest"):
            guest.bridge.session.log("kernel", logging.ERROR, "100% \033[2J")
            for _ in range(20):  # in portions that the sender's own budget lets through
                for _ in range(500):
                    guest.bridge.session.log("agent", logging.INFO, "flood")
                guest.bridge.flush_soon()
                await bridge.ping(SOON)
        records = [record for record in caplog.records if record.name == "byre.guest.vm7"]
        assert records[0].getMessage() == "kernel: 100% \\x1b[2J"
        assert records[0].levelno == logging.ERROR
        assert 2000 <= len(records) < 8000, "the rate is limited"


# -- the loss of the connection ----------------------------------------------------------------------------


@pytest.mark.behaviour("B42", "B9", "B25")
async def test_a_loss_ends_everything_that_waits() -> None:
    async with connected() as (bridge, guest):
        _, reader = open_reader(bridge)
        _, writer, _ = open_writer(bridge)
        writer.write(bytes(1_000_000))
        told: asyncio.Queue[Any] = asyncio.Queue()
        bridge.subscribe("process.exit", 1, told.put_nowait)
        waits = [
            asyncio.create_task(work)
            for work in (
                bridge.call("system.info", timeout=None),
                bridge.call("system.info", undo=lambda _: asyncio.sleep(0)),
                reader.read(),
                writer.drain(),
                bridge.wait_lost(),
            )
        ]
        await guest.request()
        guest.bridge._channel.transport.abort()  # type: ignore[union-attr]  # as a killed VM
        _, pending = await asyncio.wait(waits, timeout=1)
        assert not pending
        errors = [task.exception() for task in waits[:4]]
        assert all(isinstance(error, ConnectionLost) for error in errors)
        assert len({id(error) for error in errors}) == 4, "each has its own, with its own traceback"
        assert isinstance(await told.get(), ConnectionLost)
        for call in (bridge.call("system.info"), bridge.ping(1)):
            with pytest.raises(ConnectionLost):
                await call
        bridge.subscribe("process.exit", 2, told.put_nowait)
        assert isinstance(told.get_nowait(), ConnectionLost), "who comes later hears of it at once"
        bridge.post("process.release", process=1)


async def test_who_knows_why_the_channel_ended_is_asked() -> None:
    async with connected() as (bridge, guest):

        async def explain() -> str:
            return "the VM was struck by lightning"

        bridge.explain = explain
        guest.bridge._channel.transport.abort()  # type: ignore[union-attr]
        assert "lightning" in str(await asyncio.wait_for(bridge.wait_lost(), SOON))


async def test_who_should_know_and_does_not_say_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge_module, "EXPLAIN_GRACE", 0.01)
    async with connected() as (bridge, guest):

        async def explain() -> str:
            await asyncio.Event().wait()
            return ""

        bridge.explain = explain
        guest.bridge._channel.transport.abort()  # type: ignore[union-attr]
        assert isinstance(await asyncio.wait_for(bridge.wait_lost(), SOON), ConnectionLost)


@pytest.mark.behaviour("B45")
async def test_a_malformed_frame_ends_the_connection_with_its_reason() -> None:
    ours, theirs = pair()
    bridge, core = Bridge(ours), Connection(first=False, name="broken")
    opening = asyncio.create_task(bridge.open(SOON))
    loop = asyncio.get_running_loop()
    with theirs:
        while not core.connected:
            core.receive_data(await asyncio.wait_for(loop.sock_recv(theirs, 65536), SOON))
            await loop.sock_sendall(theirs, b"".join(core.data_to_send()))
        await opening
        call = asyncio.create_task(bridge.call("system.info"))
        await loop.sock_sendall(theirs, b"\xff" * 12)
        with pytest.raises(ConnectionLost, match="frame") as caught:
            await asyncio.wait_for(call, SOON)
        assert isinstance(caught.value.__cause__, ByreError)
    await bridge.close()


# -- the handshake -----------------------------------------------------------------------------------------


async def test_a_guest_that_never_answers_meets_the_deadline() -> None:
    ours, theirs = pair()
    with theirs:
        with pytest.raises(DeadlineExceeded):
            await Bridge(ours).open(0.02)
        await closed(theirs)


async def test_cancelling_the_handshake_closes_the_socket() -> None:
    ours, theirs = pair()
    with theirs:
        task = asyncio.create_task(Bridge(ours).open(SOON))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await closed(theirs)


async def closed(sock: socket.socket) -> None:
    """Wait until the other end of the socket is gone."""
    async with asyncio.timeout(SOON):
        while await asyncio.get_running_loop().sock_recv(sock, 65536):
            pass


@pytest.mark.behaviour("B46")
@pytest.mark.parametrize(
    ("options", "error"),
    [({"versions": (7, 9)}, VersionMismatch), ({"secret": b"another"}, ProofRefused)],
)
async def test_whom_it_cannot_talk_to(options: dict[str, Any], error: type[Exception]) -> None:
    ours, theirs = pair()
    bridge, guest = Bridge(ours, secret=b"the one"), Bridge(theirs, secret=b"the one", server=lambda _: None)
    guest._connection = Connection(first=False, name="guest", **{"secret": b"the one", **options})
    results = await asyncio.gather(bridge.open(SOON), guest.open(SOON), return_exceptions=True)
    assert any(isinstance(result, error) for result in results)
    assert all(isinstance(result, (error, ConnectionLost)) for result in results)
    await bridge.close()
    await guest.close()
