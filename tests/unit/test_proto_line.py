"""A reliable stream over bad wire: all of it arrives, once, in order; a peer that began anew is noticed."""

from __future__ import annotations

import random
import struct
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from byre_proto import line as module
from byre_proto.line import (
    ACK,
    DATA,
    MAX_PAYLOAD,
    MAX_TIMEOUT,
    MAX_UNSENT,
    MAX_WINDOW,
    NO_NONCE,
    SYNC,
    SYNC_SECONDS,
    SYNCED,
    Line,
)
from byre_proto.stuffing import checked, stuffed, unstuffed
from tests.bad_line import BadWire

from .line_world import World, pieces

KERNEL = b"[   12.345678] Out of memory: Killed process 4711 (sh)\r\n"

#: Damaged bytes of all: the stated rates.  A good line has one in a thousand million.
RATES = (0.0, 1e-5, 1e-4, 1e-3, 1e-2)


def exchange(world: World, *data: bytes) -> None:
    """Each side sends its data; then the first one ends it."""
    world.feed = [pieces(part, 700) for part in data]
    world.run(lambda: [len(got) for got in reversed(world.got)] == [len(part) for part in data])
    world.lines[0].end()
    world.run(lambda: world.lines[0].idle)
    assert [bytes(got) for got in reversed(world.got)] == list(data)
    assert [line.over for line in world.lines] == ["", "the peer ended it"]


@pytest.mark.parametrize("rate", RATES)
def test_all_of_it_arrives_once_and_in_order(rate: float) -> None:
    wires = BadWire(1, rate), BadWire(2, rate)
    size = 60_000 if rate < 1e-2 else 15_000
    exchange(World(*wires), random.Random(3).randbytes(size), random.Random(4).randbytes(size))
    if rate >= 1e-4:
        assert min(wire.hurt for wire in wires) > 5


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(st.binary(max_size=5000), st.binary(max_size=5000)),
    st.integers(0, 2**32),
    st.tuples(st.sampled_from(RATES), st.sampled_from(RATES)),
    st.sets(st.sampled_from(BadWire.KINDS), min_size=1),
    st.sampled_from([1200.0, 9600.0, 115_200.0, 4e6]),
    st.sampled_from([0.0, 0.001, 0.3]),
    st.sampled_from([1, 16, 4096]),
)
def test_whatever_the_wire_does(
    data: tuple[bytes, bytes],
    seed: int,
    rates: tuple[float, float],
    kinds: set[str],
    baud: float,
    delay: float,
    cut: int,
) -> None:
    wires = [BadWire(seed + side, rate, tuple(sorted(kinds))) for side, rate in enumerate(rates)]
    exchange(World(*wires, seed=seed, baud=baud, delay=delay, cut=cut), *data)


def test_a_burst_of_silence_is_waited_for() -> None:
    """A cable that is out for ten minutes, with frames and their answers under way."""
    out = [False]

    def wire(data: bytes) -> bytes:
        return b"" if out[0] else data

    world = World(wire, wire)
    sent = random.Random(1).randbytes(30_000)
    world.feed[0] = pieces(sent, 1000)
    world.run(lambda: len(world.got[1]) > 5000)
    out[0] = True
    raw, begin = world.raw[0], world.now
    world.run(lambda: world.now > begin + 600)
    assert world.raw[0] - raw < 64 * 2 * MAX_PAYLOAD + 600 / MAX_TIMEOUT * 2 * MAX_PAYLOAD
    out[0] = False
    world.run(lambda: len(world.got[1]) == len(sent))
    assert world.got[1] == sent


def test_kernel_messages_in_between_are_noise_that_is_handed_on() -> None:
    world = World()
    sent = random.Random(1).randbytes(20_000)
    world.feed[0] = pieces(sent, 500)
    world.put(1, KERNEL * 3000)  # the boot

    def done() -> bool:
        world.put(1, KERNEL, world.now + world._random.random() / 5)
        return len(world.got[1]) == len(sent)

    world.run(done)
    assert world.got[1] == sent
    assert KERNEL * 3 in world.noise[1]


def test_a_line_that_reflects_is_not_its_own_peer() -> None:
    world = World()
    line = world.lines[0]
    for _ in range(20):
        line.receive_data(line.data_to_send(world.now), world.now)
        world.now += SYNC_SECONDS[1]
        line.on_time(world.now)
    assert not line.in_step
    other = world.lines[1]
    line.send(b"to the other")
    for _ in range(10):
        ours, theirs = line.data_to_send(world.now), other.data_to_send(world.now)
        line.receive_data(ours + theirs, world.now)
        other.receive_data(theirs + ours, world.now)
    assert (line.take_data(), other.take_data()) == (b"", b"to the other")


# -- beginning anew ----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32), st.sampled_from(RATES[:-1]), st.integers(0, 1), st.integers(0, 20_000))
def test_a_side_that_began_anew_is_noticed_and_nothing_is_mixed(
    seed: int, rate: float, who: int, after: int
) -> None:
    world = World(BadWire(seed, rate), BadWire(seed + 1, rate), seed=seed)
    old, new = b"o" * 30_000, b"n" * 3000
    world.feed = [pieces(old, 999), pieces(old, 999)]
    world.run(lambda: len(world.got[1 - who]) > after)
    world.restart(who)
    world.feed[who] = pieces(new, 999)
    world.run(lambda: bool(world.lines[1 - who].over))
    assert world.lines[1 - who].over == "the peer began anew"
    assert set(world.got[1 - who]) == {ord("o")}
    assert not world.got[who]
    world.restart(1 - who)
    world.feed[1 - who] = pieces(new, 999)
    world.run(lambda: len(world.got[0]) + len(world.got[1]) == 2 * len(new))
    assert world.got == [new, new]
    assert not any(line.over for line in world.lines)  # neither takes the other for a newer one again


def test_the_program_at_the_other_end_may_come_late_and_go_early() -> None:
    world = World()
    first = world.lines[0]
    first.send(b"first words")
    for _ in range(50):
        first.data_to_send(world.now)
        assert first.next_timeout is not None
        assert first.next_timeout - world.now <= SYNC_SECONDS[1] + 1e-6
        world.now = first.next_timeout
        first.on_time(world.now)
    world.run(lambda: world.got[1] == b"first words")


# -- ends --------------------------------------------------------------------------------------------------


def test_the_end_comes_behind_what_was_sent_and_is_known_to_have_arrived() -> None:
    world = World()
    world.lines[0].send(b"x" * 5000)
    world.lines[0].end()
    world.lines[0].end()
    assert not world.lines[0].idle
    world.run(lambda: world.lines[0].idle)
    assert world.got[1] == b"x" * 5000
    assert world.lines[1].over == "the peer ended it"
    world.lines[1].receive_data(stuffed(b"S" + b"z" * 8 + NO_NONCE, 0), world.now)
    assert world.lines[1].over == "the peer ended it"
    assert world.lines[1].next_timeout is None


def test_nothing_is_sent_and_no_timer_runs_when_all_has_arrived() -> None:
    world = World()
    world.lines[0].send(b"x")
    world.run(lambda: world.lines[0].idle and world.lines[1].in_step)
    for line in world.lines:
        assert line.data_to_send(world.now) == b""
        assert line.next_timeout is None


def test_room_is_small_while_the_line_is_not_there() -> None:
    line = Line()
    assert line.room == MAX_UNSENT
    line.send(bytes(MAX_UNSENT + 1))
    assert line.room == 0
    assert not line.idle


# -- resends and the window --------------------------------------------------------------------------------


def frames(data: bytes) -> list[bytes]:
    """The bodies, whatever their checksums."""
    return [body[:-4] for piece in data.split(b"\x7e") if (body := unstuffed(piece))]


def in_step() -> tuple[World, Line, Line]:
    world = World()
    world.run(lambda: all(line.in_step for line in world.lines))
    for line in world.lines:
        line.data_to_send(world.now)
    return world, *world.lines


def test_a_lost_frame_is_sent_again_as_soon_as_a_later_one_is_answered() -> None:
    world, first, second = in_step()
    first._payload = 10
    first.send(b"".join(b"frame %4d" % n for n in range(4)))
    sent = first.data_to_send(world.now).split(b"\x7e\x7e")
    assert len(sent) == 4
    sent[1] = sent[1][:9] + b"?" + sent[1][10:]
    second.receive_data(b"\x7e\x7e".join(sent), world.now)
    (ack,) = frames(answer := second.data_to_send(world.now))
    assert ack == struct.pack("!BHB", ACK, 1, 0b11)
    first.receive_data(answer, world.now)
    (again,) = frames(first.data_to_send(world.now))
    assert again[5:] == b"frame    1"
    second.receive_data(stuffed(again, second._seeds[1]), world.now)
    assert second.take_data() == b"frame    0frame    1frame    2frame    3"


def test_the_last_frame_is_sent_again_by_the_clock_less_and_less_often() -> None:
    world, first, _ = in_step()
    first.send(b"nobody hears it")
    times = []
    while len(times) < 10:
        if first.data_to_send(world.now):
            times.append(world.now)
        assert first.next_timeout is not None
        world.now = first.next_timeout
        first.on_time(world.now)
    waits = [later - earlier for earlier, later in pairwise(times)]
    assert [round(wait, 6) for wait in waits] == sorted(round(wait, 6) for wait in waits)
    assert waits[-1] == pytest.approx(MAX_TIMEOUT)


def test_the_window_follows_the_line() -> None:
    slow, fast = World(baud=9600), World(baud=4e6)
    for world in (slow, fast):
        world.feed[0] = pieces(bytes(200_000 if world is fast else 20_000), 1000)
        size = 200_000 if world is fast else 20_000
        world.run(lambda world=world, size=size: len(world.got[1]) == size)  # type: ignore[misc]
    assert slow.lines[0]._window <= 3
    assert fast.lines[0]._window > 10


def test_numbers_begin_again_after_65536() -> None:
    world, first, second = in_step()
    first._next_number = second._expected = 65_500
    sent = random.Random(5).randbytes(50_000)
    world.feed[0] = pieces(sent, 700)
    world._wires = (BadWire(3, 1e-3), BadWire(4, 1e-3))
    world.run(lambda: len(world.got[1]) == len(sent))
    assert world.got[1] == sent
    assert first._next_number > 65_536


# -- a hostile peer ----------------------------------------------------------------------------------------


def held(line: Line) -> int:
    """Bytes that the peer can make it keep."""
    return (
        sum(map(len, line._early.values()))
        + len(line._splitter._begun)
        + len(line._splitter._noise)
        + len(line._data)
    )


@given(st.lists(st.binary(max_size=300)), st.booleans())
def test_junk_does_nothing(junk: list[bytes], stepped: bool) -> None:
    line = in_step()[1] if stepped else Line()
    for data in junk:
        line.receive_data(data, 1.0)
        line.data_to_send(1.0)
    assert line.take_data() == b""
    assert not line.over
    assert held(line) <= 40_000


numbers = st.integers(0, 65_535) | st.integers(0, 70)
bodies = st.one_of(
    st.builds(lambda n, e, p: struct.pack("!BHH", DATA, n, e) + p, numbers, numbers, st.binary(max_size=600)),
    st.builds(lambda n, m: struct.pack("!BH", ACK, n) + m, numbers, st.binary(max_size=12)),
    st.builds(lambda k, a, b: bytes((k,)) + a + b, st.sampled_from([SYNC, SYNCED]), *[st.binary(max_size=9)] * 2),
    st.binary(min_size=1, max_size=20),
)


@settings(deadline=None)
@given(st.lists(bodies, max_size=60), st.integers(0, 2000))
def test_frames_with_right_checksums_that_lie(lies: list[bytes], own: int) -> None:
    """No exception, and nothing grows; what is delivered is what the peer says, that is its affair."""
    _, line, _ = in_step()
    line.send(bytes(own))
    for number, body in enumerate(lies):
        seed = 0 if body[0] in (SYNC, SYNCED) else line._seeds[1]
        line.receive_data(stuffed(body, seed), number)
        assert len(line.data_to_send(number)) <= 3 * MAX_WINDOW * 2 * MAX_PAYLOAD
        line.on_time(number)
        assert len(line._early) < MAX_WINDOW
        assert len(line._under_way) <= MAX_WINDOW
        line.take_data()
        assert held(line) <= MAX_WINDOW * MAX_PAYLOAD + 20_000


def test_a_flood_of_syncs_is_answered_once_for_each_time_it_is_asked() -> None:
    line = Line()
    line.receive_data(b"".join(stuffed(b"S" + struct.pack("!Q", n + 1) + NO_NONCE, 0) for n in range(5000)), 0.0)
    (sync,) = frames(line.data_to_send(0.0))
    assert sync[9:] == struct.pack("!Q", 5000)


def test_a_frame_that_is_too_long_is_noise() -> None:
    _, line, _ = in_step()
    body = struct.pack("!BHH", DATA, 0, 0) + bytes(MAX_PAYLOAD + 1)
    assert checked(unstuffed(stuffed(body, 1)[1:-1]), 1) == body
    line.receive_data(stuffed(body, line._seeds[1]), 0.0)
    assert line.take_data() == b""


def test_the_limits_fit_each_other() -> None:
    assert MAX_WINDOW % 8 == 0
    assert module.MIN_PAYLOAD <= module.FIRST_PAYLOAD <= MAX_PAYLOAD
    assert module.MIN_WINDOW <= module.FIRST_WINDOW <= MAX_WINDOW < module._NUMBERS // 2
