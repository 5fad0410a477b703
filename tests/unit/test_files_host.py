"""`Files` against a guest that is played, and does what no agent would."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from byre import errors
from byre.testing import FakeProcess, MemoryHost
from byre_proto import records

SOON = 10.0

TOP = ("entry", ".", "file", 0o644, 0, 0, 0, 5, "", [], {})
RESULT = records.message("result", {"entries": 1, "bytes": 5})


def sends(*pieces: bytes, code: int = 0) -> Callable[[FakeProcess], Awaitable[int]]:
    """A guest that sends just this."""

    async def command(process: FakeProcess) -> int:
        assert process.stdout is not None
        for piece in pieces:
            process.stdout.write(piece)
        await process.stdout.drain()
        return code

    return command


async def with_guest(operation: str, command: Any, use: Callable[[Any], Awaitable[Any]]) -> Any:
    async with MemoryHost({f"files.{operation}": command}) as host, asyncio.timeout(SOON):
        try:
            return await use(host.files)
        finally:
            assert [process.id for process in host.guest.processes.values() if not process.task.done()] == []  # type: ignore[union-attr]


async def test_a_file_as_it_is_sent() -> None:
    played = sends(records.message(*TOP), records.header(5) + b"12345", RESULT)
    assert await with_guest("read", played, lambda files: files.read("/x")) == b"12345"


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        ((), "ended early"),
        ((records.message(*TOP), records.header(5) + b"12345"), "ended early"),
        ((records.message(*TOP), records.header(5) + b"12"), "ended early"),
        ((b"\xff\xff\xff\xff",), "data record"),
        ((b"\x00\xff\xff\xff",), "most"),
        ((records.header(5) + b"12345", RESULT), "malformed"),
        ((RESULT,), "malformed"),
        ((records.message(*TOP), records.message(*TOP), RESULT), "malformed"),
        ((records.message(*TOP), records.message("nonsense"), RESULT), "malformed"),
        ((records.message(*TOP), records.message("result", 5)), "malformed"),
        ((records.message(*TOP), records.message("error", "no-space")), "malformed"),
        ((records.message("entry", "."), RESULT), "malformed"),
    ],
)
async def test_what_a_guest_must_not_send_is_an_error(pieces: tuple[bytes, ...], text: str) -> None:
    with pytest.raises(errors.FileFailed, match=text):
        await with_guest("read", sends(*pieces), lambda files: files.read("/x"))


async def test_its_error_is_ours_with_its_text_escaped() -> None:
    played = sends(records.message("error", "path-not-found", "no \x1b[31m such", "look", {"errno": 2}), code=1)
    with pytest.raises(errors.PathNotFound) as caught:
        await with_guest("read", played, lambda files: files.read("/x"))
    assert caught.value.message == "no \\x1b[31m such" and caught.value.data["errno"] == 2
    with pytest.raises(errors.PathNotFound):
        await with_guest("stat", played, lambda files: files.stat("/x"))
    assert not await with_guest("stat", played, lambda files: files.exists("/x"))


async def without_end(process: FakeProcess) -> int:
    assert process.stdout is not None
    process.stdout.write(records.message(*TOP))
    while True:
        process.stdout.write(records.header(1000) + bytes(1000))
        await process.stdout.drain()


async def test_what_never_ends_is_ended() -> None:
    """A fake ends when its output is closed, or by a signal."""

    async def until_signalled(process: FakeProcess) -> int:
        try:
            return await asyncio.wait_for(without_end(process), SOON)
        except ConnectionError:
            return 1

    with pytest.raises(errors.ResourceExhausted):
        await with_guest("read", until_signalled, lambda files: files.read("/x", limit=100_000))


async def test_a_guest_that_gives_up_reading_says_why() -> None:
    async def full(process: FakeProcess) -> int:
        assert process.stdin is not None and process.stdout is not None
        await process.stdin.read(10)
        process.stdout.write(records.message("error", "no-space", "full", "", {}))
        process.stdin.stop()  # type: ignore[attr-defined]
        return 1

    with pytest.raises(errors.NoSpace):
        await with_guest("write", full, lambda files: files.write("/x", bytes(4 << 20)))


@pytest.mark.behaviour("B65")
@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/../../x", "."])
async def test_a_hostile_copy_makes_nothing_outside(name: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    top = ("entry", ".", "dir", 0o755, 0, 0, 0, 0, "", [], {})
    entry = ("entry", name, "file", 0o644, 0, 0, 0, 1, "", [], {})
    played = sends(records.message(*top), records.message(*entry), records.header(1) + b"x", RESULT)
    with pytest.raises(errors.FileFailed):
        await with_guest("pack", played, lambda files: files.copy_out("/d/.", target, archive=True))
    assert [path.name for path in tmp_path.rglob("*")] == ["target"]


async def test_a_result_is_checked_and_escaped() -> None:
    top = ("entry", ".", "dir", 0o755, 0, 0, 0, 0, "", [], {})

    async def copied(result: dict[str, Any]) -> Any:
        played = sends(records.message(*top), records.message("result", result))
        return await with_guest("pack", played, lambda files: files.get_archive("/d", io.BytesIO()))

    assert (await copied({"entries": 1, "dropped": {"\x1b": 2}})).dropped == {"\\x1b": 2}
    for wrong in ({"entries": "many"}, {"dropped": 5}, {"dropped": {"owner": "x"}}):
        with pytest.raises(errors.FileFailed, match="malformed"):
            await copied(wrong)
