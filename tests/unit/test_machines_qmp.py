"""QMP against a peer that is silent, rude, talkative or gone: every call ends, and nothing grows."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest

from byre.errors import ConnectionLost, DeadlineExceeded, MachineFailed
from byre.machines import qmp as module
from byre.machines.qmp import Qmp

GREETING = {"QMP": {"version": {"qemu": {"major": 9, "minor": 1, "micro": 2}, "package": ""}, "capabilities": []}}

Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter
Peer = Callable[[Reader, Writer], Awaitable[None]]


def send(writer: Writer, message: Mapping[str, Any]) -> None:
    writer.write(json.dumps(message).encode() + b"\r\n")


async def receive(reader: Reader) -> Any:
    """The client's next message; nothing marks its end but its syntax."""
    text = ""
    while True:
        text += (await reader.readexactly(1)).decode()
        try:
            return json.loads(text)
        except ValueError:
            continue


async def greet(reader: Reader, writer: Writer) -> None:
    send(writer, GREETING)
    await receive(reader)
    send(writer, {"return": {}})


def run(peer: Peer, client: Callable[[Qmp, list[Any]], Awaitable[None]]) -> None:
    """`client(qmp, events)` against `peer`, over a socket pair; the session is closed at the end."""

    async def main() -> None:
        near, far = socket.socketpair()
        events: list[Any] = []
        qmp = Qmp("test", lambda name, data: events.append((name, data)))
        reader, writer = await asyncio.open_connection(sock=far)
        task = asyncio.ensure_future(peer(reader, writer))
        try:
            await qmp.connect(near)
            await client(qmp, events)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            writer.close()
            await qmp.close()

    asyncio.run(asyncio.wait_for(main(), 20))


async def nothing(qmp: Qmp, events: list[Any]) -> None:
    raise AssertionError("connected")


def test_version_results_and_refusals() -> None:
    async def peer(reader: Reader, writer: Writer) -> None:
        await greet(reader, writer)
        asked = await receive(reader)
        send(writer, {"return": {"echo": asked["arguments"]}, "id": asked["id"]})
        asked = await receive(reader)
        send(writer, {"error": {"class": "DeviceNotFound", "desc": "no \x1b[31m"}, "id": asked["id"]})
        await reader.read()

    async def client(qmp: Qmp, events: list[Any]) -> None:
        assert qmp.version == (9, 1, 2)
        assert await qmp.execute("x", {"a": 1}) == {"echo": {"a": 1}}
        with pytest.raises(MachineFailed, match=r"no \\x1b\[31m") as caught:
            await qmp.execute("device_del")
        assert caught.value.data == {"command": "device_del", "qmp_class": "DeviceNotFound"}

    run(peer, client)


def test_silence_at_the_greeting(monkeypatch: pytest.MonkeyPatch) -> None:
    async def peer(reader: Reader, writer: Writer) -> None:
        await reader.read()

    monkeypatch.setattr(module, "GREETING_TIMEOUT", 0.05)
    with pytest.raises(DeadlineExceeded):
        run(peer, nothing)


@pytest.mark.parametrize("greeting", [b"", b"nonsense\r\n", b'{"QMP": 7}\r\n', b"x" * (2 * module.MAX_MESSAGE)])
def test_no_greeting_or_a_wrong_one(greeting: bytes) -> None:
    async def peer(reader: Reader, writer: Writer) -> None:
        writer.write(greeting)
        writer.close()

    with pytest.raises(ConnectionLost):
        run(peer, nothing)


@pytest.mark.behaviour("B44")
def test_silence_during_a_call_fails_that_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async def peer(reader: Reader, writer: Writer) -> None:
        await greet(reader, writer)
        late = await receive(reader)
        asked = await receive(reader)
        send(writer, {"return": "late", "id": late["id"]})
        send(writer, {"return": "in time", "id": asked["id"]})
        await reader.read()

    async def client(qmp: Qmp, events: list[Any]) -> None:
        monkeypatch.setattr(module, "CALL_TIMEOUT", 0.05)
        with pytest.raises(DeadlineExceeded) as caught:
            await qmp.execute("stop")
        assert caught.value.data["command"] == "stop"
        monkeypatch.setattr(module, "CALL_TIMEOUT", 10.0)
        assert await qmp.execute("cont") == "in time"

    run(peer, client)


@pytest.mark.behaviour("B42")
def test_gone_during_a_call_and_before_one() -> None:
    async def peer(reader: Reader, writer: Writer) -> None:
        await greet(reader, writer)
        await receive(reader)
        writer.close()

    async def client(qmp: Qmp, events: list[Any]) -> None:
        for _ in range(2):
            with pytest.raises(ConnectionLost):
                await qmp.execute("stop")

    run(peer, client)


def test_events_are_dispatched_and_not_kept() -> None:
    flood = 2000

    async def peer(reader: Reader, writer: Writer) -> None:
        await greet(reader, writer)
        for number in range(flood):
            send(writer, {"event": "BLOCK_IO_ERROR", "data": {"n": number}, "timestamp": {}})
        send(writer, {"event": "STOP", "timestamp": {}})
        asked = await receive(reader)
        send(writer, {"return": {}, "id": asked["id"]})
        await reader.read()

    async def client(qmp: Qmp, events: list[Any]) -> None:
        await qmp.execute("stop")
        assert events[0] == ("BLOCK_IO_ERROR", {"n": 0})
        assert events[-1] == ("STOP", {})
        assert len(events) == flood + 1
        for listener in qmp._client._listeners:
            assert not listener.history
            assert listener.empty()

    run(peer, client)


def test_its_own_errors_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """qemu.qmp logs at ERROR what it raises as well."""

    async def peer(reader: Reader, writer: Writer) -> None:
        writer.close()

    with caplog.at_level(logging.INFO), pytest.raises(ConnectionLost):
        run(peer, nothing)
    assert not caplog.records
