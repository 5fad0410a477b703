"""What the agent keeps and counts of a container: its log, counts that rise, mounts by their ids."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from byre_guest import detours, mounts, ring, watches
from byre_guest.loop import Loop
from byre_proto.errors import InvalidRequest


@pytest.fixture
def loop() -> Iterator[Loop]:
    def fail(error: Exception) -> None:
        raise error

    made = Loop(fail)
    yield made
    made.close()


def run_until(loop: Loop, condition: Callable[[], bool]) -> None:
    def look() -> None:
        loop.stop() if condition() else loop.call_later(0.001, look)

    look()
    loop.run()


@pytest.mark.behaviour("B20")
def test_a_log_is_read_from_any_byte_and_what_fell_out_is_counted(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring, "SIZE", 10)
    log = ring.Ring(loop)
    woken: list[int] = []
    log.wait(lambda: woken.append(log.total))
    pipe = log.pipe()
    os.write(pipe, b"0123456789abcde")
    run_until(loop, lambda: bool(woken))
    assert (log.total, log.ended) == (15, False)
    assert log.read(0) == (b"56789abcde", 5)
    assert log.read(2) == (b"56789abcde", 3)
    assert log.read(12) == (b"cde", 0)
    assert log.read(99) == (b"", 0)
    assert log.read(-7) == (b"56789abcde", 5)
    unwanted = lambda: woken.append(-1)  # noqa: E731
    log.wait(unwanted)
    log.wait_no_more(unwanted)
    log.wait(lambda: woken.append(log.total))
    os.close(pipe)
    log.finish()
    assert log.ended
    assert woken == [15, 15]


@pytest.mark.behaviour("B20")
def test_a_log_whose_pipe_is_switched_over_ends_with_all_that_was_written(loop: Loop) -> None:
    log = ring.Ring(loop)
    pipe = log.pipe()
    os.write(pipe, b"before, ")
    log.detour()
    log.finish()
    assert log.closing and not log.ended, "a thread may hold some of it"
    os.write(pipe, b"after")
    os.close(pipe)
    run_until(loop, lambda: log.ended)
    assert log.read(0) == (b"before, after", 0)
    assert not log.closing


def test_a_log_that_somebody_holds_open_ends_all_the_same(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "LAST_SECONDS", 0.02)
    monkeypatch.setattr(detours, "needed", True)
    log = ring.Ring(loop)
    pipe = log.pipe()
    log.finish()
    run_until(loop, lambda: log.ended)
    os.close(pipe)


def test_a_second_attempt_has_a_log_too(loop: Loop) -> None:
    log = ring.Ring(loop)
    os.close(log.pipe())
    pipe = log.pipe()
    os.write(pipe, b"second")
    run_until(loop, lambda: log.total == 6)
    os.close(pipe)
    log.finish()
    assert log.ended


@pytest.mark.behaviour("B29", "B31")
def test_a_count_is_told_at_once_then_seldom_and_at_the_end_whole(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watches, "PAUSE", 0.02)
    value, told = [0], list[int]()
    count = watches.Count(loop, lambda: value[0], told.append)
    count.changed()
    assert told == []
    for value[0] in (1, 2, 3):
        count.changed()
    assert told == [1], "the rest waits"
    run_until(loop, lambda: len(told) == 2)
    assert told == [1, 2]
    value[0] = 7
    count.close()
    assert told == [1, 2, 4]
    value[0] = 0  # its file is gone
    count.close()
    assert sum(told) == 7


@pytest.mark.behaviour("B65")
@pytest.mark.parametrize("path", ["relative", "/", "/..", "//", "/a/..", "/../a", "/a\0b"])
def test_a_mount_has_an_absolute_place_below_the_root(path: str) -> None:
    with pytest.raises(InvalidRequest):
        mounts._checked(path)


def test_a_mounts_place_is_one_path_however_it_is_written() -> None:
    assert mounts._checked("//a/./b/../c/") == "/a/c"
    assert mounts._unescaped(b"/a\\040b\\134c") == b"/a b\\c"


def test_a_mount_is_found_by_its_id() -> None:
    root = os.open("/proc/self", os.O_PATH | os.O_DIRECTORY)
    try:
        assert mounts._mount_point(os.getpid(), mounts._mount_id(root)) == "/proc"
    finally:
        os.close(root)
    assert mounts._mount_point(os.getpid(), 0) == ""
