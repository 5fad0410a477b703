"""Streams over a bridge: asyncio's readers and writers, and the credit behind them."""

from __future__ import annotations

import asyncio
import hashlib
import os
from typing import Any

import pytest

from byre.bridge import Bridge
from byre.errors import StreamReset
from byre.streams import MAX_LINE, BridgeReader, StreamTransport, open_reader, open_writer
from byre_proto.limits import INITIAL_WINDOW

from .test_bridge import SOON, connected


def stream(bridge: Bridge, guest: Any) -> tuple[BridgeReader, asyncio.StreamWriter]:
    """A stream from the guest to us: our reader, and the guest's writer."""
    number, reader = open_reader(bridge)
    _, writer, _ = open_writer(guest.bridge, number)
    return reader, writer


def stream_in(bridge: Bridge, guest: Any) -> tuple[asyncio.StreamWriter, StreamTransport, BridgeReader]:
    """A stream from us to the guest: our writer and its transport, and the guest's reader."""
    number, writer, transport = open_writer(bridge)
    _, reader = open_reader(guest.bridge, number)
    return writer, transport, reader


async def send(writer: asyncio.StreamWriter, data: bytes) -> None:
    for start in range(0, len(data), 65536):
        writer.write(data[start : start + 65536])
        await writer.drain()
    writer.close()


async def test_bytes_arrive_whole_and_then_the_end() -> None:
    async with connected() as (bridge, guest):
        reader, writer = stream(bridge, guest)
        data = os.urandom(3_000_000)
        sending = asyncio.create_task(send(writer, data))
        received = await asyncio.wait_for(reader.read(), SOON)
        await sending
        assert hashlib.sha256(received).digest() == hashlib.sha256(data).digest()
        assert reader.at_eof()
        assert await reader.read() == b""
        assert not bridge.session.streams
        assert not bridge.streams.readers
        assert not guest.bridge.streams.writers


@pytest.mark.behaviour("B3")
async def test_an_unread_stream_holds_its_first_window_and_stops_nothing_else() -> None:
    async with connected() as (bridge, guest):
        unread, flooding = stream(bridge, guest)
        flood = asyncio.create_task(send(flooding, bytes(1_000_000)))
        other, writer = stream(bridge, guest)
        asyncio.get_running_loop().call_soon(writer.write, b"line\n")
        assert await asyncio.wait_for(other.readline(), SOON) == b"line\n"
        await bridge.ping(SOON)
        assert unread.received == INITIAL_WINDOW
        assert not flood.done()
        assert len(await asyncio.wait_for(unread.read(), SOON)) == 1_000_000
        await flood
        writer.close()
        await other.read()


@pytest.mark.behaviour("B3")
async def test_a_reader_that_takes_little_is_sent_little() -> None:
    async with connected() as (bridge, guest):
        reader, writer = stream(bridge, guest)
        flood = asyncio.create_task(send(writer, bytes(1_000_000)))
        for taken in range(1, 200):
            await asyncio.wait_for(reader.readexactly(10), SOON)
            assert reader.received <= 10 * taken + 2 * INITIAL_WINDOW
        reader.stop()
        with pytest.raises(BrokenPipeError):
            await asyncio.wait_for(flood, SOON)


async def test_what_needs_more_than_a_window_gets_it() -> None:
    async with connected() as (bridge, guest):
        reader, writer = stream(bridge, guest)
        size = 5 * INITIAL_WINDOW
        sending = asyncio.create_task(send(writer, bytes(size) + b"x" * size + b"\n" + b"rest"))
        assert await asyncio.wait_for(reader.readexactly(size), SOON) == bytes(size)
        assert await asyncio.wait_for(reader.readline(), SOON) == b"x" * size + b"\n"
        assert await asyncio.wait_for(reader.read(), SOON) == b"rest"
        await sending


async def test_a_line_that_is_too_long_is_an_error_and_the_stream_goes_on() -> None:
    async with connected() as (bridge, guest):
        reader, writer = stream(bridge, guest)
        sending = asyncio.create_task(send(writer, bytes(MAX_LINE + 10) + b"\nnext\n"))
        with pytest.raises(ValueError, match="limit"):
            await asyncio.wait_for(reader.readline(), SOON)
        rest = await asyncio.wait_for(reader.read(), SOON)
        assert rest.endswith(b"next\n")
        await sending


async def test_a_cancelled_read_loses_nothing() -> None:
    async with connected() as (bridge, guest):
        reader, writer = stream(bridge, guest)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await reader.readexactly(100_000)
        sending = asyncio.create_task(send(writer, b"abc" * 100_000))
        assert await asyncio.wait_for(reader.read(), SOON) == b"abc" * 100_000
        await sending


async def test_what_is_buffered_can_be_read_after_stop() -> None:
    async with connected() as (bridge, guest):
        reader, writer = stream(bridge, guest)
        writer.write(b"kept")
        async with asyncio.timeout(SOON):
            while not reader.received:
                await bridge.ping(SOON)
        reader.stop()
        reader.stop()
        assert await reader.read() == b"kept"
        await bridge.ping(SOON)
        with pytest.raises(BrokenPipeError):
            await writer.drain()


async def test_a_stream_that_the_guest_gives_up_is_an_error() -> None:
    async with connected() as (bridge, guest):
        reader, writer = stream(bridge, guest)
        writer.write(b"half")
        writer.transport.abort()
        with pytest.raises(StreamReset):
            await asyncio.wait_for(reader.read(), SOON)
        assert not bridge.session.streams


@pytest.mark.behaviour("B15a")
async def test_a_blocked_writer_learns_at_once_that_nobody_reads() -> None:
    async with connected() as (bridge, guest):
        writer, _, reader = stream_in(bridge, guest)
        writer.write(bytes(1_000_000))
        blocked = asyncio.create_task(writer.drain())
        await bridge.ping(SOON)
        assert not blocked.done()
        reader.stop()
        with pytest.raises(BrokenPipeError):
            await asyncio.wait_for(blocked, SOON)
        writer.write(b"more")  # dropped, as asyncio's own transports do
        with pytest.raises(BrokenPipeError):
            await writer.drain()
        assert writer.is_closing()
        assert bridge.session.data_backlog == 0


async def test_close_sends_what_is_buffered_and_then_the_end() -> None:
    async with connected() as (bridge, guest):
        writer, transport, reader = stream_in(bridge, guest)
        writer.write(bytes(500_000))
        assert transport.get_write_buffer_size() > 0
        assert writer.can_write_eof()
        writer.write_eof()
        writer.close()
        assert writer.is_closing()
        assert len(await asyncio.wait_for(reader.read(), SOON)) == 500_000
        await asyncio.wait_for(writer.wait_closed(), SOON)


async def test_views_and_arrays_are_copied_when_written() -> None:
    async with connected() as (bridge, guest):
        writer, _, reader = stream_in(bridge, guest)
        data = bytearray(b"x" * 100_000)
        writer.write(data)
        writer.writelines([memoryview(b"tail"), b"end"])
        data[:] = b"y" * 100_000
        writer.close()
        assert await asyncio.wait_for(reader.read(), SOON) == b"x" * 100_000 + b"tailend"


async def test_many_writers_share_the_channel() -> None:
    async with connected() as (bridge, guest):
        streams = [stream_in(bridge, guest) for _ in range(20)]
        data = os.urandom(400_000)
        sending = [asyncio.create_task(send(writer, data)) for writer, _, _ in streams]
        received = await asyncio.wait_for(asyncio.gather(*(reader.read() for _, _, reader in streams)), SOON)
        await asyncio.gather(*sending)
        assert all(each == data for each in received)
        assert not bridge.streams.writers
        assert not bridge.session.streams
