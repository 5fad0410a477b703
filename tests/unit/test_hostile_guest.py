"""A guest that lies, one lie at a time: whatever waits ends with a typed error, and nobody else notices.

Lies at random are in tests/fuzz; here are those that a generator hardly makes: floods, and answers that are well
formed and mean nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest

from byre import errors
from byre.bridge import Bridge
from byre.testing import FakeGuest, MemoryHost
from byre_proto import frames
from byre_proto.encoding import pack

from .test_vm_host import booted

SOON = 10.0

#: Frames of a flood.
MANY = 5_000

#: Bytes that a flood may make the host hold: some windows and backlogs.
BOUND = 32 * 1024 * 1024

ESCAPES = "\x1b]0;owned\x07\x1b[2J\r\n%s{0}"


def integer(kind: int, stream: int = 0) -> Callable[[int], bytes]:
    return lambda number: frames.encode_integer(kind, stream, number + 1)


def message(kind: int, *fields: Any) -> Callable[[int], bytes]:
    return lambda _: frames.encode(kind, 0, pack(list(fields)))


FLOODS = {
    "logs": message(frames.LOG, "agent", 20, ESCAPES, 0),
    "exits of nobody": message(frames.EVENT, "process.exit", {"process": 77, "code": 0, "signal": 0}),
    "unknown events": message(frames.EVENT, "new.event", {"x": "y" * 100}),
    "replies to nobody": message(frames.REPLY, 7777, {}),
    "errors to nobody": message(frames.ERROR, 7777, "internal", ESCAPES, "", {}),
    "pongs": integer(frames.PONG),
    "pings": integer(frames.PING),
    "requests": lambda number: frames.encode(frames.REQUEST, 0, pack([number + 1, "system.info", {}, None])),
    "credit": integer(frames.WINDOW, 1),
    "data of no stream": lambda _: frames.encode(frames.DATA, 9, bytes(1000)),
    "acknowledgements": integer(frames.ACK),
    "cancellations": integer(frames.CANCEL),
}


async def silence(_: Any) -> dict[str, Any]:
    await asyncio.Event().wait()
    return {}


@pytest.mark.behaviour("B45", "B50")
@pytest.mark.parametrize("what", FLOODS)
async def test_a_flood_ends_in_a_typed_error_or_in_nothing(what: str) -> None:
    unheard: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context))
    try:
        async with booted(container__state=silence) as (vm, guest), MemoryHost() as other:
            waiting = asyncio.create_task(vm.bridge.call("container.state", container="c", timeout=SOON))
            await vm.run(["echo"])
            tracemalloc.start()
            try:
                channel = guest.bridge._channel
                assert channel is not None
                for begin in range(0, MANY, 500):
                    channel.transport.write(b"".join(map(FLOODS[what], range(begin, begin + 500))))
                    await other.bridge.ping(SOON)  # the loop, and who else is in it, go on
                    if vm.bridge.lost is not None:
                        break
                assert tracemalloc.get_traced_memory()[1] < BOUND
            finally:
                tracemalloc.stop()
            if vm.bridge.lost is None:
                assert (await vm.run(["echo"], capture_output=True, timeout=SOON)).stdout == b"echo\n"
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting
            else:
                with pytest.raises(errors.ConnectionLost):
                    await waiting
    finally:
        asyncio.get_running_loop().set_exception_handler(None)
    assert not unheard


NONSENSE: tuple[Any, ...] = (5, [], {"id": 5}, {"pid": "x", "memory.current": "many"}, ESCAPES)


@pytest.mark.behaviour("B45")
@pytest.mark.parametrize("answer", NONSENSE, ids=repr)
async def test_answers_that_mean_nothing_are_typed_errors(answer: Any) -> None:
    insides = answer if isinstance(answer, dict) else {"x": answer}
    async with booted(
        container__state=lambda _: {"state": {"state": answer, "started_ns": answer, "exit": answer}},
        container__wait=lambda _: {"code": 1 << 63, "signal": -5},
        container__stats=lambda _: {"stats": insides},
        container__processes=lambda _: {"processes": [answer]},
    ) as (vm, _):
        container = await vm.open_container("c")
        for ask in (container.properties, container.properties_v2):
            with contextlib.suppress(errors.AnswerInvalid):  # what is missing may be left out of the answer
                await ask("Statistics")
            with pytest.raises(errors.AnswerInvalid):
                await ask("ProcessList")
        assert (await asyncio.wait_for(container.wait(), SOON)).code == 1 << 63  # what it says, it says
        await container.close()
        assert (await vm.run(["echo"], capture_output=True, timeout=SOON)).stdout == b"echo\n"


async def test_no_text_of_a_guest_is_told_unescaped(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(_: Any) -> dict[str, Any]:
        raise errors.StartFailed(ESCAPES, hint=ESCAPES, evidence=ESCAPES)

    caplog.set_level(logging.DEBUG)
    async with booted(process__create=refuse) as (vm, guest):
        with pytest.raises(errors.StartFailed) as caught:
            await vm.run(["x"])
        assert "\x1b" not in str(caught.value)
        guest.bridge.session.log("agent" + ESCAPES, 20, ESCAPES)
        guest.bridge.flush_soon()
        await vm.bridge.ping(SOON)
    said = [record.getMessage() for record in caplog.records]
    assert any("owned" in line for line in said)
    assert not any("\x1b" in line or "\n" in line for line in said if "owned" in line)


@pytest.mark.behaviour("B42")
async def test_a_guest_that_takes_up_the_session_and_hangs_up_without_end_is_given_up() -> None:
    dialled: list[FakeGuest] = []

    async def redial() -> socket.socket:
        """Somebody is there each time, who does not know of the session."""
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setblocking(False)
        guest = FakeGuest(theirs)
        guest.bridge._bridges = lambda _: None
        guest.bridge._connection = guest.bridge._new_connection(None)
        dialled.append(guest)
        hanging_up = asyncio.create_task(guest.open())
        hanging_up.add_done_callback(lambda task: task.exception() or guest.bridge.fail("it hangs up"))
        return ours

    bridge = Bridge(await redial(), redial=redial)
    bridge.resume_seconds = 0.5
    await bridge.open(SOON)
    call = asyncio.create_task(bridge.call("system.info", timeout=SOON))
    with pytest.raises(errors.ConnectionLost):
        await asyncio.wait_for(call, SOON)
    await bridge.close()
    for guest in dialled:
        await guest.close()
