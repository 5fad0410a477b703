"""Ways out of a VM, without one: what passes, what speaks for a guest, and the card of the agent's side."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from byre import errors
from byre.networks import filter as passing
from byre.networks import registry, slirp
from byre.networks.filter import Filter, is_ours, refusal
from byre_guest import cards, networks
from byre_guest.loop import Loop
from byre_guest.pumps import Pumps
from byre_proto.events import DataReceived
from tests.namespaces import needs_user_namespaces

PATIENCE = 10.0

CARD, GATE = bytes.fromhex("020000000001"), bytes.fromhex("52550a000202")


def packet(target: str, protocol: int = 6, port: int = 80, *, fragment: int = 0, options: int = 0) -> bytes:
    length = struct.pack(">BBHHHBBH", 0x45 + options, 0, 28 + 4 * options, 1, fragment, 64, protocol, 0)
    ends = socket.inet_aton("10.0.2.100") + socket.inet_aton(target)
    return length + ends + bytes(4 * options) + struct.pack(">HHHH", 1234, port, 8, 0)


def frame(data: bytes, kind: bytes = b"\x08\0") -> bytes:
    return GATE + CARD + kind + data


# -- what passes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["192.0.2.1", "10.1.2.3", "172.16.0.1", "223.255.255.254"])
def test_other_hosts_are_reached(target: str) -> None:
    assert Filter().passes(frame(packet(target)))


@pytest.mark.parametrize(
    "target",
    [
        *("127.0.0.1", "127.1.2.3", "127.255.255.255", "0.0.0.0", "0.1.2.3", "169.254.169.254", "169.254.0.1"),
        *("224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255"),
    ],
)
def test_this_host_and_its_link_are_not(target: str) -> None:
    assert not Filter().passes(frame(packet(target)))
    assert not Filter().passes(frame(packet(target, fragment=1))), "a fragment"
    assert not Filter().passes(frame(packet(target, options=5))), "with options"


def test_no_address_of_this_host_is(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = ["192.0.2.7"]
    monkeypatch.setattr(passing, "is_ours", lambda address: address in ours)
    judge = Filter()
    assert not judge.passes(frame(packet("192.0.2.7")))
    assert judge.passes(frame(packet("192.0.2.8")))
    ours.append("192.0.2.8")
    monkeypatch.setattr(passing, "_REMEMBERED", 0.0)
    assert not judge.passes(frame(packet("192.0.2.8"))), "an address that this host got meanwhile"


def test_it_is_asked_whose_an_address_is() -> None:
    assert is_ours("127.0.0.1")
    assert not is_ours("192.0.2.1")


def test_the_name_server_is_asked_for_names_only() -> None:
    judge = Filter()
    for protocol in (6, 17):
        assert judge.passes(frame(packet(passing.NAMESERVER, protocol, 53)))
        assert judge.passes(frame(packet(passing.NAMESERVER, protocol, 53, options=3)))
        assert not judge.passes(frame(packet(passing.NAMESERVER, protocol, 80)))
        for fragment in (0x2000, 1):  # the port may be in another one, and be another one
            assert not judge.passes(frame(packet(passing.NAMESERVER, protocol, 53, fragment=fragment)))
    assert not judge.passes(frame(packet(passing.NAMESERVER, 1)))


def test_the_gateway_answers_to_a_ping_and_to_nothing_else() -> None:
    assert Filter().passes(frame(packet(passing.GATEWAY, 1)))
    assert not Filter().passes(frame(packet(passing.GATEWAY, 6)))
    assert not Filter().passes(frame(packet(passing.GATEWAY, 17)))


@pytest.mark.parametrize("kind", [b"\x86\xdd", b"\x81\0", b"\x88\xa8", b"\x00\x40"])
def test_other_protocols_do_not_pass(kind: bytes) -> None:
    assert not Filter().passes(frame(packet("192.0.2.1"), kind))


def test_addresses_are_asked_for() -> None:
    assert Filter().passes(frame(bytes(28), b"\x08\x06"))


@given(st.binary(max_size=200))
def test_whatever_a_guest_sends_is_judged(data: bytes) -> None:
    for given_frame in (data, frame(data)):
        passed = Filter().passes(given_frame)
        assert isinstance(refusal(given_frame), bytes)
        if passed and given_frame[12:14] == b"\x08\0":
            target = ipaddress.IPv4Address(given_frame[30:34])
            assert not (target.is_loopback or target.is_multicast or target.is_link_local or target.is_unspecified)


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passing, "_MAX_REMEMBERED", 10)
    judge = Filter()
    for number in range(100):
        judge.passes(frame(packet(f"192.0.2.{number}")))
    assert len(judge._known) <= 10


def checksum_is_right(data: bytes) -> bool:
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    return (total & 0xFFFF) + (total >> 16) == 0xFFFF


def test_who_is_refused_is_told() -> None:
    asked = packet("127.0.0.1")
    told = refusal(frame(asked))
    assert told[:14] == CARD + GATE + b"\x08\0"
    header, icmp = told[14:34], told[34:]
    assert (header[9], header[12:16], header[16:20]) == (1, socket.inet_aton(passing.GATEWAY), asked[12:16])
    assert struct.unpack(">H", header[2:4])[0] == len(told) - 14
    assert icmp[:2] == b"\x03\x0d" and icmp[8:] == asked
    assert checksum_is_right(header) and checksum_is_right(icmp)
    for silent in (packet("224.0.0.1"), packet("127.0.0.1", 1), packet("127.0.0.1", fragment=1), asked[:21]):
        assert refusal(frame(silent)) == b""


def test_both_sides_have_the_same_frames() -> None:
    assert (registry.PREFIX, registry.MAX_FRAME, registry.MIN_FRAME) == (
        cards.PREFIX,
        cards.MAX_FRAME,
        cards.HEADER,
    )
    assert registry.MTU <= networks.MAX_MTU


# -- who speaks for a guest --------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def running() -> AsyncIterator[slirp.Slirp]:
    made = await slirp.started(registry.MTU)
    try:
        yield made
    finally:
        made.sock.close()
        made.kill()
        await made.wait()


async def answered(made: slirp.Slirp) -> bytes:
    """What comes when its gateway's address is asked for."""
    loop = asyncio.get_running_loop()
    mine, gateway = socket.inet_aton("10.0.2.100"), socket.inet_aton(passing.GATEWAY)
    question = struct.pack(">HHBBH", 1, 0x800, 6, 4, 1) + CARD + mine + bytes(6) + gateway
    await loop.sock_sendall(made.sock, b"\xff" * 6 + CARD + b"\x08\x06" + question)
    return await asyncio.wait_for(loop.sock_recv(made.sock, registry.MAX_FRAME), PATIENCE)


async def test_slirp_answers_at_the_other_end_of_the_cable() -> None:
    async with running() as made:
        answer = await answered(made)
        assert answer[:6] == CARD and answer[6:12] == GATE
        assert not os.path.exists(made._directory)


@needs_user_namespaces
@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user may not look into it")
async def test_slirp_is_shut_in() -> None:
    """It has this host's networks, and nothing else of it, before it looks at what a guest sent."""
    async with running() as made:
        await answered(made)
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{made.pid}/status").read_text().splitlines())
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        for kind in ("user", "mnt", "ipc", "uts"):
            assert os.readlink(f"/proc/{made.pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}"), kind
        assert os.readlink(f"/proc/{made.pid}/ns/net") == os.readlink("/proc/self/ns/net")
        assert set(os.listdir(f"/proc/{made.pid}/root")) <= {"etc", "run", "old"}


async def test_slirp_that_is_killed_says_so() -> None:
    async with running() as made:
        os.kill(made.pid, signal.SIGKILL)
        assert "killed by signal 9" in await asyncio.wait_for(made.wait(), PATIENCE)


@pytest.mark.behaviour("B43")
def test_slirp_dies_with_its_owner() -> None:
    script = (
        "import asyncio; from byre.networks import slirp\n"
        "async def main():\n"
        "    made = await slirp.started(1500); print(made.pid, flush=True); await asyncio.sleep(60)\n"
        "asyncio.run(main())"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=env) as owner:
        assert owner.stdout is not None
        pidfd = os.pidfd_open(int(owner.stdout.readline()))
        try:
            owner.kill()
            assert select.select([pidfd], [], [], PATIENCE)[0], "it outlived its owner"
        finally:
            os.close(pidfd)


async def test_one_that_does_not_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / slirp.SLIRP
    broken.write_text("#!/bin/sh\necho out of order >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(slirp, "found", lambda: str(broken))
    with pytest.raises(errors.NetworkFailed, match="status 3: out of order"):
        await slirp.started(1500)


async def test_one_that_is_not_there_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_args, **_more: None)
    with pytest.raises(errors.ToolMissing) as caught:
        slirp.Slirp(1500)
    assert caught.value.hint == "apt install slirp4netns"


# -- the card of the agent's side --------------------------------------------------------------------------


class FakeSession:
    """What a card uses of a session."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.credits = 1 << 20
        self.consumed = 0
        self.ended: set[str] = set()
        self.outbox = type("Outbox", (), {"keep_for_replay": False})

    def accept_stream(self, _stream: int, *, sending: bool, receiving: bool) -> None:
        assert sending != receiving

    def credit(self, _stream: int) -> int:
        return self.credits

    def send(self, _stream: int, data: bytes) -> None:
        self.credits -= len(data)
        self.sent.append(data)

    def consume(self, _stream: int, amount: int) -> None:
        self.consumed += amount

    def stop(self, _stream: int, _reason: int = 0) -> None:
        self.ended.add("in")

    def reset(self, _stream: int) -> None:
        self.ended.add("out")


@contextlib.contextmanager
def plugged_in() -> Iterator[Any]:
    """`(pumps, session, device, ended)`: a card whose device is a socket that keeps messages apart."""
    session, channel = FakeSession(), type("Channel", (), {"max_data": 1 << 18, "idle": True})
    pumps = Pumps(Loop(lambda error: pytest.fail(str(error))), session, channel)  # type: ignore[arg-type]
    device, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    device.setblocking(False)
    ended: list[bool] = []
    cards.Card(pumps, theirs.detach(), 1, 3, lambda: ended.append(True))
    yield pumps, session, device, ended
    pumps.close()
    device.close()


@pytest.fixture
def plugged() -> Iterator[Any]:
    with plugged_in() as made:
        yield made


def came(pumps: Any, *pieces: bytes) -> None:
    for piece in pieces:
        pumps.on_event(DataReceived(1, memoryview(piece)))
        pumps.write_out()


def prefixed(*frames: bytes) -> bytes:
    return b"".join(len(each).to_bytes(2, "big") + each for each in frames)


@given(st.lists(st.binary(min_size=14, max_size=300), max_size=6), st.integers(1, 400))
def test_frames_come_to_the_card_however_they_were_cut(sent: list[bytes], size: int) -> None:
    with plugged_in() as (pumps, session, device, _):
        data = prefixed(*sent)
        came(pumps, *(data[at : at + size] for at in range(0, len(data), size)))
        assert [device.recv(1 << 16) for _ in sent] == sent
        assert session.consumed == len(data)


def test_frames_of_the_card_go_out_whole_and_only_with_credit(plugged: Any) -> None:
    pumps, session, device, _ = plugged
    sent = [os.urandom(60), os.urandom(cards.MAX_FRAME), os.urandom(14)]
    for each in sent:
        device.send(each)
    session.credits = cards.MAX_FRAME + cards.PREFIX
    pump = pumps._by_stream[3]
    pump._readable = True
    while pump.step():
        pass
    assert b"".join(session.sent) == prefixed(*sent[:1]), "there is no credit for the largest frame"
    session.credits = 1 << 20
    while pump.step():
        pass
    assert b"".join(session.sent) == prefixed(*sent)


@pytest.mark.parametrize("size", [0, 13, cards.MAX_FRAME + 1, 0xFFFF])
def test_a_host_that_breaks_the_rules_loses_the_card(plugged: Any, size: int) -> None:
    pumps, session, device, ended = plugged
    came(pumps, size.to_bytes(2, "big") + bytes(20))
    assert ended == [True] and session.ended == {"in", "out"}
    assert device.recv(1) == b""


def test_a_card_that_is_full_loses_frames_and_nothing_else(plugged: Any) -> None:
    pumps, session, _, ended = plugged
    data = prefixed(bytes(8000)) * 1000
    came(pumps, data)
    assert session.consumed == len(data) and not ended
