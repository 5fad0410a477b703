"""The console ring: bounded, escaped, and watched without polling."""

from __future__ import annotations

from byre.machines.console import RING_SIZE, ConsoleRing


def test_a_flood_keeps_the_last_bytes_only() -> None:
    ring = ConsoleRing()
    for number in range(RING_SIZE // 4):
        ring.feed(b"%07d\n" % number)
    assert ring.tail(1) == f"{RING_SIZE // 4 - 1:07d}"
    assert len(ring.tail(10**9)) <= RING_SIZE


def test_the_tail_is_escaped_and_without_carriage_returns() -> None:
    ring = ConsoleRing()
    ring.feed(b"one\r\ntwo \x1b[31m\xff\x07\r\nthree\r\n")
    assert ring.tail(2) == "two \\x1b[31m\N{REPLACEMENT CHARACTER}\\x07\nthree"
    assert "\x1b" not in ring.tail(40)


def test_a_watch_sees_what_was_there_what_comes_and_what_is_split() -> None:
    ring, seen = ConsoleRing(), []
    ring.feed(b"early ")
    with ring.watch("early", lambda: seen.append("early")), ring.watch("later", lambda: seen.append("later")):
        assert seen == ["early"]
        ring.feed(b"lat")
        ring.feed(b"er, later")
        assert seen == ["early", "later"]


def test_a_watch_that_is_over_is_not_called() -> None:
    ring, seen = ConsoleRing(), []
    with ring.watch("late", lambda: seen.append("late")):
        pass
    ring.feed(b"late")
    assert seen == []
